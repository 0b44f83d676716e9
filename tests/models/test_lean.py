"""Parts of an LLM that keep less for the backward pass give what transformers' own give."""

import copy

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM

from lavis.models.lean import lean
from tests.models.test_attention import LLMS, SIZES, make

LEAN = {"Qwen2": 2 + 5, "Qwen3": 3 + 13, "Llama": 3 + 7, "Mistral, window": 3 + 7}
"""Gated MLPs and norms of each."""


def run(llm, dtype):
    """Hidden states, the gradient of what goes in, and the bytes kept for it but for weights."""
    torch.manual_seed(0)
    embeds = torch.randn(2, 11, llm.config.hidden_size, dtype=dtype, requires_grad=True)
    weights, kept = {p.untyped_storage().data_ptr() for p in llm.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = llm.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return out.detach(), embeds.grad, sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LEAN)
def test_outputs_and_gradients_are_transformers_bit_for_bit(name, dtype):
    llm = make(name).to(dtype)
    thin = copy.deepcopy(llm)
    lean(thin)
    assert sum("forward" in vars(m) for m in thin.modules()) == LEAN[name]
    (out, gradient, most), (same, close, least) = run(llm, dtype), run(copy.deepcopy(thin), dtype)
    assert torch.equal(out, same) and least < most
    if dtype == torch.float32:
        assert torch.equal(close, gradient)
    else:
        torch.testing.assert_close(close, gradient, rtol=3e-2, atol=3e-2 * gradient.abs().max().item())


def test_a_trained_norm_gets_its_gradient():
    llm = make("Llama").requires_grad_(True)
    thin = copy.deepcopy(llm)
    lean(thin)
    run(llm, torch.float32), run(thin, torch.float32)
    for (name, p), q in zip(llm.named_parameters(), thin.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-5, msg=name)


def test_what_is_written_otherwise_is_left():
    llm = GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=8))  # scales by 1 + weight, and its gate is a GELU
    lean(llm)
    assert not any("forward" in vars(m) for m in llm.modules())
    assert set(LEAN) < set(LLMS)
