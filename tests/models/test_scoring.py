"""The head of an LLM at chosen positions is what its own forward gives there, in chunks as at once."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from lavis.models import scoring
from lavis.models.scoring import Scorer

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
FALCON = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
CPM = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
LLMS = {
    "plain": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)),
    "Granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=7.0, embedding_multiplier=3.0)),
    "Cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)),
    "Falcon-H1": lambda: FalconH1ForCausalLM(FalconH1Config(**SIZES, **FALCON, lm_head_multiplier=0.2)),
    "HyperCLOVA X": lambda: HyperCLOVAXForCausalLM(HyperCLOVAXConfig(**SIZES, logits_scaling=0.2)),
    "MiniCPM3": lambda: MiniCPM3ForCausalLM(
        MiniCPM3Config(**SIZES | {"num_key_value_heads": 4}, **CPM, dim_model_base=8)
    ),
    "RecurrentGemma": lambda: RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(**SIZES | {"num_hidden_layers": 3}, lru_width=32, logits_soft_cap=2.0)
    ),
}


@pytest.fixture(autouse=True)
def no_logits_are_small(monkeypatch):
    monkeypatch.setattr(scoring, "KEPT_LOGITS_BYTES", 0)


def case(name):
    """(LLM, its logits, hidden states, targets) of one row."""
    torch.manual_seed(0)
    llm = LLMS[name]().eval()
    for p in llm.parameters():
        p.data += 0.1 * torch.randn_like(p)
    ids = torch.randint(3, 50, (1, 9))
    hidden = llm.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return llm, llm(input_ids=ids, use_cache=False).logits[0, :-1], hidden[0, :-1], ids[0, 1:]


@pytest.mark.parametrize("name", LLMS)
def test_logits_and_what_is_made_of_them_are_the_llms_own(name):
    llm, logits, hidden, targets = case(name)
    scorer = Scorer(llm)
    assert (scorer._scale != 1 or scorer._softcap is not None) == (name != "plain")  # it is what is tested
    torch.testing.assert_close(scorer.logits(hidden), logits, rtol=1e-5, atol=1e-5)
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(scorer.logprobs(hidden, targets), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scorer.cross_entropy(hidden, targets), -expected.sum(), rtol=1e-5, atol=1e-5)


def test_softcapped_logits_are_honoured():
    torch.manual_seed(0)
    llm = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0,
        )
    )  # fmt: skip
    ids = torch.randint(3, 50, (1, 9))
    hidden = llm.base_model(input_ids=ids, use_cache=False).last_hidden_state
    expected = llm(input_ids=ids, labels=ids).loss * 8
    torch.testing.assert_close(Scorer(llm).cross_entropy(hidden[0, :-1], ids[0, 1:]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "Granite"])
def test_chunks_equal_the_whole(name, monkeypatch):
    llm, _, hidden, targets = case(name)
    hidden = hidden.detach().requires_grad_()
    found = []
    for size in (1 << 20, 4 * 50 * 3):  # all at once; three positions at a time
        monkeypatch.setattr(scoring, "LOGITS_CHUNK_BYTES", size)
        scorer = Scorer(llm)
        loss = scorer.cross_entropy(hidden, targets)
        (gradient,) = torch.autograd.grad(loss, hidden)
        found.append((loss.detach(), gradient, scorer.logprobs(hidden, targets).detach()))
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)


def test_ranks_that_share_weights_call_the_head_equally_often():
    llm, _, hidden, targets = case("plain")
    calls = []
    llm.lm_head.register_forward_hook(lambda *_: calls.append(1))
    scorer = Scorer(llm, lambda own: max(own, 4))
    for n in (0, 1, 8):
        calls.clear()
        loss = scorer.cross_entropy(hidden[:n], targets[:n])
        assert len(calls) == 4
        torch.testing.assert_close(loss, Scorer(llm).cross_entropy(hidden[:n], targets[:n]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [100, 3])
@pytest.mark.parametrize("name", LLMS)
def test_a_frozen_head_gives_the_gradient_of_autograd_beside_the_loss(name, rows, monkeypatch):
    llm, _, hidden, targets = case(name)
    hidden = hidden.detach().requires_grad_()
    found = []
    for frozen in (False, True):
        llm.requires_grad_(not frozen)
        monkeypatch.setattr(scoring, "LOGITS_CHUNK_BYTES", 4 * 50 * rows)
        loss = Scorer(llm).cross_entropy(hidden, targets)
        assert (type(loss.grad_fn).__name__ == "_SumOfFrozenBackward") == frozen
        (gradient,) = torch.autograd.grad(0.37 * loss, hidden)
        found.append((loss.detach(), gradient))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_frozen_head_keeps_no_logits_and_is_called_once_for_each_chunk(monkeypatch):
    llm, _, hidden, targets = case("plain")
    llm.requires_grad_(False)
    hidden, calls, kept = hidden.detach().requires_grad_(), [], []
    llm.lm_head.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(scoring, "LOGITS_CHUNK_BYTES", 4 * 50 * 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = Scorer(llm).cross_entropy(hidden, targets)
    loss.backward()
    assert len(calls) == 3 and kept == [hidden.numel()]


def test_a_trained_head_gets_its_gradient():
    llm, logits, hidden, targets = case("plain")
    Scorer(llm).cross_entropy(hidden.detach(), targets).backward()
    expected = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), llm.lm_head.weight)
    torch.testing.assert_close(llm.lm_head.weight.grad, expected[0], rtol=1e-5, atol=1e-6)


def test_no_supervised_position_is_a_loss_of_zero_with_a_gradient():
    llm, _, hidden, targets = case("plain")
    llm.requires_grad_(False)
    hidden = hidden.detach().requires_grad_()
    loss = Scorer(llm).cross_entropy(hidden[:0], targets[:0])
    loss.backward()
    assert loss == 0 and torch.equal(hidden.grad, torch.zeros_like(hidden))
