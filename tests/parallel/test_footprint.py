"""What shapes alone say of memory and arithmetic is what the same modules do with data."""

from dataclasses import asdict, replace

import pytest
import torch
from transformers import Qwen2Config

from lavis.models.scoring import Scorer
from lavis.models.stages import Part, Stage
from lavis.models.vlm import Vlm
from lavis.parallel.footprint import CostMode, Footprints, MicroBatch, Modules, Precision
from tests.models.conftest import IMAGE_ID, VOCAB, model_config, tower_settings

BATCH = MicroBatch(rows=3, tokens=50, images=3, supervised=40)
PACKED = replace(BATCH, samples=2)
DEPTH = 5
LLM = Qwen2Config(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=72,
    num_hidden_layers=DEPTH,
    num_attention_heads=4,
    num_key_value_heads=2,
)
CHANGES = {
    "projection": {},
    "recomputed": {"llm_grad_checkpoint": True},
    "LoRA": {"get_lora": True, "lora_dropout": 0.0},
    "trained LLM": {"freeze_llm": False},
    "trained tower": {"freeze_vit": False, "freeze_qformer": False, "qformer_dropout": 0.0},
}


def settings(**changes):
    values = tower_settings(vit={"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4})
    values["qformer"]["dropout"] = changes.pop("qformer_dropout", 0.1)
    return model_config(**values | changes)


def counted(config, precision, batch):
    """A CostMode after a forward and a backward with data, with the bytes held between them and the peaks."""
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    llm = Qwen2ForCausalLM(LLM).to(torch.float32 if config.llm.train == "full" else precision.frozen_llm)
    stage = Stage(config, llm, Part(0, 1, 0, DEPTH), IMAGE_ID).train()
    for p in stage.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    ids = torch.zeros(BATCH.rows, BATCH.tokens, dtype=torch.long)
    ids[:, 2:6] = IMAGE_ID
    with CostMode([*stage.parameters(), *stage.buffers()]) as costs:
        positions = torch.arange(batch.tokens) % (50 // batch.samples) + torch.zeros_like(ids)
        images = torch.randn(BATCH.images, 3, 32, 32)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision.amp is not None):
            hidden = stage((ids, positions, images))
            held = costs.now
            chosen = torch.arange(BATCH.supervised)
            loss = Scorer(stage.llm).cross_entropy(hidden.flatten(0, 1).index_select(0, chosen), chosen)
            del hidden
        forward = costs.flops
        loss.backward()
        return held, costs.lap(), forward, costs.flops - forward


@pytest.mark.parametrize(
    ("name", "amp", "batch"),
    [
        ("projection", None, BATCH),
        ("projection", None, PACKED),
        ("projection", torch.bfloat16, BATCH),
        ("recomputed", None, BATCH),
        ("recomputed", torch.bfloat16, PACKED),
        ("LoRA", torch.bfloat16, BATCH),
        ("trained LLM", torch.bfloat16, BATCH),
        ("trained tower", torch.bfloat16, BATCH),
    ],
)
def test_shapes_say_what_data_would(name, amp, batch):
    config, precision = settings(**CHANGES[name]), Precision(amp, amp or torch.float32)
    plan = Footprints(config, LLM, batch, precision).stage(DEPTH)
    held, peak, forward, backward = counted(config, precision, batch)
    assert plan.held == pytest.approx(held, rel=0.02)
    assert plan.peak == pytest.approx(peak, rel=0.04)
    assert (plan.forward_flops, plan.backward_flops) == (forward, backward)


def test_parameters_are_those_of_the_model_however_it_is_cut():
    config = settings(get_lora=True)
    with torch.device("meta"):
        from transformers import Qwen2ForCausalLM

        model = Vlm(config, Qwen2ForCausalLM(LLM), IMAGE_ID)
        model.add_adapters()
    f = Footprints(config, LLM, BATCH, Precision())
    whole = f.stage(DEPTH)
    assert whole.parameters == sum(p.numel() for p in model.parameters())
    assert whole.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert whole.weight_bytes == 4 * whole.parameters
    parts = [f.stage(2, last=False), f.stage(1, first=False, last=False), f.stage(2, first=False)]
    for name in ("parameters", "trained", "weight_bytes", "forward_flops"):
        assert sum(asdict(p)[name] for p in parts) == asdict(whole)[name], name


def test_a_frozen_llm_costs_less_backward_than_a_trained_one():
    frozen, trained, recomputed = (
        Footprints(settings(**changes), LLM, BATCH, Precision()).stage(DEPTH)
        for changes in ({}, {"freeze_llm": False}, {"llm_grad_checkpoint": True})
    )
    assert frozen.forward_flops == trained.forward_flops == recomputed.forward_flops
    assert frozen.backward_flops < 1.1 * frozen.forward_flops < 1.5 * frozen.forward_flops < trained.backward_flops
    assert recomputed.backward_flops > 1.5 * frozen.backward_flops
    assert recomputed.held < frozen.held / 3


def test_quantised_blocks_take_fewer_bytes():
    sizes = {
        kind: Footprints(settings(llm_quantization=kind), LLM, BATCH, Precision(frozen_llm=torch.bfloat16))
        .stage(DEPTH)
        .weight_bytes
        for kind in (None, "int8", "int4")
    }
    assert sizes["int4"] < sizes["int8"] < sizes[None]


def test_planning_leaves_the_random_numbers_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    Footprints(settings(), LLM, BATCH, Precision()).stage(DEPTH)
    assert torch.equal(torch.rand(3), expected)


class Anew(Footprints):
    """Builds each stage anew for each batch, and runs all of it."""

    def _built(self, *shape):
        self._modules = Modules()
        return super()._built(*shape)

    def _frozen_parts(self, *_):
        pass

    def _deeper(self, blocks, tower_depth, last):
        return self._cached(blocks, tower_depth + 1, True, last)


FROZEN_BESIDE_TRAINED = {
    "trained tower alone": {"freeze_vit": False},
    "trained Q-Former": {"freeze_qformer": False, "qformer_dropout": 0.0},
}


@pytest.mark.parametrize("name", [*CHANGES, *FROZEN_BESIDE_TRAINED])
def test_what_is_run_once_counts_as_if_it_were_run_each_time(name):
    """Stages are built once for all batches, and frozen parts run once for all stages: no number changes by that."""
    config = settings(**(CHANGES | FROZEN_BESIDE_TRAINED)[name])
    amp = torch.bfloat16 if name != "projection" else None
    precision, modules = Precision(amp, amp or torch.float32, amp or torch.float32), Modules()
    for batch in (BATCH, replace(BATCH, rows=1, images=1)):
        once, anew = Footprints(config, LLM, batch, precision, modules), Anew(config, LLM, batch, precision)
        for blocks, last in ((DEPTH, True), (2, False)):
            assert once.stage(blocks, last=last) == anew.stage(blocks, last=last)
