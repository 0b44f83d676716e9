"""Attention within samples is what each sample has by itself, and costs that."""

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lavis.models import attention
from lavis.models.adapters import add_lora
from lavis.models.attention import prepare, prepared, runs_of
from lavis.models.beginning import Beginnings
from lavis.models.llm import hidden_states, recompute_activations
from lavis.models.parts import LoraSettings
from lavis.parallel.footprint import CostMode
from tests.models.conftest import batch_of, loss_of, pack, small_llm, small_model

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLMS = {
    "Qwen2": small_llm,
    "Qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "Mistral, window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
    "Gemma 3, windows": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4)),
}
RUNS = ((9, 4, 1), (7, 2), (14,))
WIDTH = 14


def make(name):
    torch.manual_seed(0)
    llm = LLMS[name]().eval().requires_grad_(False)
    for p in llm.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return llm


def rows_of(width, runs=RUNS):
    """Random embeddings and positions of rows; padding goes on counting."""
    torch.manual_seed(1)
    positions = [[*(i for n in row for i in range(n)), *range(row[-1], row[-1] + WIDTH - sum(row))] for row in runs]
    return torch.randn(len(runs), WIDTH, width, requires_grad=True), torch.tensor(positions)


def alone(llm, embeds, runs):
    """Each sample by itself, by transformers: hidden states in rows, zeros where padding is."""
    rows = []
    for row, lengths in zip(embeds, runs, strict=True):
        pieces = row[: sum(lengths)].split(lengths)
        found = [llm.base_model(inputs_embeds=p[None], use_cache=False).last_hidden_state[0] for p in pieces]
        rows.append(torch.cat([*found, row.new_zeros(WIDTH - sum(lengths), row.shape[1])]))
    return torch.stack(rows)


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, b.abs().max().item()))


def with_gradient(hidden, embeds):
    weights = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
    return hidden, torch.autograd.grad((hidden * weights).sum(), embeds)[0]


@pytest.mark.parametrize("name", LLMS)
def test_samples_of_a_row_are_as_if_alone(name):
    llm = make(name)
    embeds, positions = rows_of(llm.config.hidden_size)
    expected = with_gradient(alone(llm, embeds, RUNS), embeds)
    prepare(llm)
    assert prepared(llm)
    same(with_gradient(hidden_states(llm, embeds, positions, RUNS), embeds), expected)


@pytest.mark.parametrize("name", LLMS)
def test_a_shared_beginning_is_read_once(name):
    llm = make(name)
    embeds, positions = rows_of(llm.config.hidden_size, runs := ((9, 5), (14,), (4, 6)))
    ids = (3, 1, 2)
    with torch.no_grad():
        for row, lengths in zip(embeds, runs, strict=True):
            for piece in row[: sum(lengths)].split(lengths):
                piece[:3] = llm.get_input_embeddings()(torch.tensor(ids))
    expected = with_gradient(alone(llm, embeds, runs), embeds)
    prepare(llm)
    seen = []
    llm.base_model.register_forward_hook(
        lambda m, a, k, out: seen.append(k["inputs_embeds"].shape[1]), with_kwargs=True
    )
    beginnings = Beginnings()
    for _ in range(2):
        shared = beginnings.of(llm, ids)
        hidden, gradient = with_gradient(hidden_states(llm, embeds, positions, runs, shared), embeds)
    same([hidden], expected[:1])
    assert seen == [3, 9 + 5 + 14 + 4 + 6 - 5 * 3, 9 + 5 + 14 + 4 + 6 - 5 * 3]
    own = torch.ones(3, WIDTH, dtype=torch.bool)  # what stands before has no gradient, as nothing trained is there
    for row, lengths in enumerate(runs):
        for start in (0, *([lengths[0]] if len(lengths) > 1 else [])):
            own[row, start : start + 3] = False
    same([gradient[own]], [expected[1][own]])
    assert not gradient[~own].any()


def test_weights_that_are_loaded_anew_are_read_anew():
    llm = make("Llama")
    prepare(llm)
    beginnings = Beginnings()
    before = beginnings.of(llm, (1, 2, 3))
    assert beginnings.of(llm, (1, 2, 3)) is before and beginnings.of(llm, (1, 2)) is not before
    before = beginnings.of(llm, (1, 2, 3))
    llm.load_state_dict({key: 2 * value for key, value in llm.state_dict().items()})
    assert not torch.equal(beginnings.of(llm, (1, 2, 3)).hidden, before.hidden)


@pytest.mark.parametrize("change", ["recomputed", "adapters"])
def test_it_goes_with_recomputation_and_adapters(change):
    found = []
    for ours in (False, True):
        llm = make("Qwen2")
        if change == "adapters":
            torch.manual_seed(2)
            add_lora(llm, LoraSettings(rank=2, dropout=0.0), lambda name: name)
            for n, p in llm.named_parameters():
                if "lora_B" in n:
                    p.data += 0.1
        else:
            recompute_activations(llm)
            llm.train()
        embeds, positions = rows_of(llm.config.hidden_size)
        if ours:
            prepare(llm)
        found.append(
            with_gradient(hidden_states(llm, embeds, positions, RUNS) if ours else alone(llm, embeds, RUNS), embeds)
        )
    same(*found)


def test_padding_is_not_run_and_a_packed_row_costs_what_its_samples_cost():
    llm = make("Llama")
    prepare(llm)
    costs = {}
    for name, runs in {
        "one by one": ((7,), (7,), (7,), (7,)),
        "packed": ((7, 7), (7, 7)),
        "long": ((14,), (14,)),
    }.items():
        embeds, positions = rows_of(32, runs)
        with CostMode() as mode:
            hidden_states(llm, embeds, positions, runs)
        costs[name] = mode.flops
    assert costs["one by one"] == costs["packed"] < costs["long"]


def test_runs_are_read_off_positions_where_nobody_says_them():
    assert runs_of(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])) == ((3, 2), (5,))
    llm = make("Llama")
    prepare(llm)
    embeds, positions = rows_of(32, runs := ((9, 5), (14,)))
    assert torch.equal(hidden_states(llm, embeds, positions), hidden_states(llm, embeds, positions, runs))


def test_an_llm_that_remembers_otherwise_is_left_to_transformers():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    llm = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=scaling))
    prepare(llm)
    assert not prepared(llm)


def test_a_model_that_sees_has_the_loss_and_gradients_of_padded_rows_in_packed_ones_with_a_beginning():
    batch = batch_of([20, 17, 15], [1, 1, 0])
    batch.input_ids[:, :2] = torch.tensor([5, 6])
    found = []
    for shape in ("padded", "packed", "shared"):
        model = small_model(qformer={"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
                                     "intermediate_size": 56, "dropout": 0.0})  # fmt: skip
        one = batch if shape == "padded" else pack(batch, 60)
        if shape == "shared":
            one = batch.told(runs=((20,), (17,), (15,)), beginning=(5, 6))
        loss = loss_of(model, one)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    same(found[1], found[0])
    same(found[2], found[0])


# ---- the kernel of GPUs, by its documented meaning


def kernel(q, k, v, begins, others, longest, longest_other, *, scale, window_size, enable_gqa=False):
    """torch's varlen_attn on [T, H, D]: causal from the right below, `window_size[0]` tokens back."""
    outs = []
    for i in range(len(begins) - 1):
        one, two = (slice(int(b[i]), int(b[i + 1])) for b in (begins, others))
        assert one.stop - one.start <= longest and two.stop - two.start <= longest_other
        repeat = q.shape[1] // k.shape[1]
        assert enable_gqa or repeat == 1
        qs, ks, vs = q[one], k[two].repeat_interleave(repeat, 1), v[two].repeat_interleave(repeat, 1)
        scores = torch.einsum("qhd,khd->hqk", qs, ks) * scale
        at = torch.arange(len(qs))[:, None] + len(ks) - len(qs)
        key = torch.arange(len(ks))[None]
        seen = (key <= at) & ((key >= at - window_size[0]) if window_size[0] >= 0 else True)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, vs))
    return torch.cat(outs)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("before", [0, 2])
def test_what_the_kernel_is_asked_for_is_what_the_processor_computes(monkeypatch, before, window, grouped):
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_GROUPED", grouped)
    torch.manual_seed(0)
    q, (k, v) = torch.randn(1, 4, 12, 8), torch.randn(2, 1, 2, 12, 8)
    prefix = ((torch.randn(1, 2, before, 8), torch.randn(1, 2, before, 8)),) if before else ()
    samples = attention.Samples((7, 4, 1), prefix)
    module = torch.nn.Module()
    module.layer_idx, module.num_key_value_groups, module.is_causal = 0, 2, True
    settings = {"scaling": 0.3, "sliding_window": window}
    expected, _ = attention._attend(module, q, k, v, samples, **settings)
    got = attention._by_kernel(q, k, v, samples, prefix[0] if before else None, **settings)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
