"""Plans of the shipped recipes on the hardware that they are meant for."""

import gc
import weakref
from functools import cache

import pytest
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from lavis.cli import main
from lavis.config.recipe import load_recipe
from lavis.core.errors import ConfigError
from lavis.core.paths import ASSETS_ROOT
from lavis.parallel.plan import Layout, Machine, Planner

GIB = 2**30


@cache
def planner(recipe="pp_qwen14b/train_pp", gpu="3090", *options, **settings):
    return Planner(load_recipe(recipe, options), Machine.gpu(gpu), ranks=2, **settings)


def test_qwen_14b_fits_on_two_24_gib_cards_as_a_pipeline_and_in_no_other_way():
    p = planner()
    plans = {str(layout): p.plan(layout) for layout in p.layouts(2)}
    assert list(plans) == ["data-parallel, 2 ranks", "ZeRO-2, 2 ranks", "ZeRO-3, 2 ranks", "pipeline of 2"]
    assert [plan.fits(p.machine) for plan in plans.values()][0:2] == [False, False]
    pipeline = plans["pipeline of 2"]
    assert pipeline.fits(p.machine) and sum(pipeline.blocks) == 40
    assert all(12 * GIB < m.weights < 17 * GIB for m in pipeline.memory)
    whole = plans["data-parallel, 2 ranks"]
    assert sum(m.weights for m in pipeline.memory) == pytest.approx(whole.memory[0].weights, rel=1e-6)
    assert whole.footprints[0].trained == 768 * 5120 + 5120
    assert max(f.flops for f in pipeline.footprints) < 0.55 * sum(f.flops for f in pipeline.footprints)


def test_earlier_stages_hold_more_micro_batches_and_recomputing_makes_them_small():
    p = planner()
    plan, recomputed = (p.plan(Layout(4, 4), recompute=value) for value in (False, True))
    per_block = [m.activations / n for m, n in zip(plan.memory, plan.blocks, strict=True)]
    assert per_block[0] > per_block[1] > per_block[2] > per_block[3]
    assert all(b.activations < a.activations / 4 for a, b in zip(plan.memory, recomputed.memory, strict=True))
    assert recomputed.seconds > 1.2 * plan.seconds


def test_pipelines_idle_less_with_more_micro_batches():
    few, many = (planner(samples=n).plan(Layout(2, 2)) for n in (2, 128))
    per_micro_batch = [plan.seconds / plan.micro_batches for plan in (few, many)]
    assert per_micro_batch[0] / per_micro_batch[1] == pytest.approx(1.5 / (129 / 128), rel=0.05)


def test_zero_splits_what_it_says():
    p = planner("instruction_tuning/train", "3090", "model.freeze_llm=false", "model.llm_grad_checkpoint=false")
    plain, two, three = (p.plan(Layout(8, zero=zero)).memory[0] for zero in (0, 2, 3))
    assert two.optimizer < plain.optimizer / 4 and two.gradients < plain.gradients / 4
    assert two.weights == plain.weights > 2 * three.weights


def test_zero_3_has_its_share_and_the_weights_that_are_used_soon():
    zero = "parallel.deepspeed.zero_optimization"
    p, near = (
        planner(),
        planner(
            "pp_qwen14b/train_pp",
            "3090",
            f"{zero}.stage3_max_live_parameters=100000000",
            f"{zero}.stage3_max_reuse_distance=0",
        ),
    )
    plain, usual, least = p.plan(Layout(2)), p.plan(Layout(2, zero=3)), near.plan(Layout(2, zero=3))
    share = plain.memory[0].weights / 2
    assert usual.memory[0].weights - least.memory[0].weights == pytest.approx(2 * 9e8, rel=0.05)  # bf16
    assert least.memory[0].weights - share == pytest.approx(2 * 1e8, rel=0.05)
    head = 2 * p.llm_config.vocab_size * p.llm_config.hidden_size
    assert least.footprints[0].largest_bytes == head < least.memory[0].workspace


def test_an_impossible_split_and_an_unknown_card_are_told():
    with pytest.raises(ConfigError, match="41 stages but the LLM has 40 blocks"):
        planner().plan(Layout(41, 41))
    with pytest.raises(ConfigError, match="unknown GPU '3091'"):
        Machine.gpu("3091")
    with pytest.raises(ConfigError, match="plans are made for models with an LLM"):
        Planner(load_recipe("shapes/tokenizer_a"), Machine.gpu("3090"))


def test_the_command_proposes_what_a_recipe_takes(capsys):
    assert main(["plan", "pp_qwen14b/train_pp", "--gpus", "2", "--gpu", "3090"]) == 0
    text = capsys.readouterr().out
    command = next(line for line in text.splitlines() if "train_pipeline.py" in line)
    assert "--nproc_per_node=2" in command and "--num-stages 2" in command
    options = command.split("--options ")[1].split()
    recipe = load_recipe("pp_qwen14b/train_pp", options)
    assert recipe.train.micro_batch_size * recipe.train.accumulation == 128
    assert "stage 1: " in text and "data-parallel, 2 ranks" in text


def test_what_does_not_fit_is_told(capsys):
    assert main(["plan", "pp_qwen14b/train_pp", "--gpu", "3090"]) == 1
    assert "Nothing fits" in capsys.readouterr().out
    assert main(["plan", "pp_qwen14b/train_pp", "--gpu-memory", "24 gibs"]) == 2
    assert "24GiB" in capsys.readouterr().err


def two_blocks(tmp_path, *changes):
    """A recipe of an LLM with two blocks, on its own or behind the shapes world's tower."""
    folder = tmp_path / "llm"
    if not folder.exists():
        Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=700, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, use_sliding_window=True, sliding_window=8, max_window_layers=1,
            )
        ).save_pretrained(folder)  # fmt: skip
        AutoTokenizer.from_pretrained(ASSETS_ROOT / "shapes/llm_b").save_pretrained(folder)
    return load_recipe("shapes/align", [f"model.llm.weights={folder}", "model.max_length=64", *changes])


TEXT = ["model.tower=null", "model.connector=null", "model.llm.train=lora", "objective.name=sft"]
TEXT += ["run.cache_features=false", "datasets.shapes_instruction.data_type=text"]


@pytest.mark.parametrize("changes", [[], TEXT])
def test_as_many_stages_as_blocks(tmp_path, changes):
    recipe = two_blocks(tmp_path, *changes)
    planner = Planner(recipe, Machine.gpu("3090"), ranks=2)
    plan = planner.plan(Layout(2, 2))
    assert plan.blocks == (1, 1) and plan.fits(planner.machine)
    whole = planner.plan(Layout(1))
    anchor = not changes  # stands for something to train in the stage behind
    assert sum(f.parameters for f in plan.footprints) == whole.footprints[0].parameters + anchor
    assert sum(f.forward_flops for f in plan.footprints) == whole.footprints[0].forward_flops
    assert whole.batch.images == 0 if changes else whole.batch.images > 0


def test_a_new_llm_is_planned_by_its_dimensions():
    recipe = load_recipe("shapes/llm_b", ["model.llm.tokenizer=shapes/llm_b"])
    planner = Planner(recipe, Machine.gpu("3090"))
    (footprint,) = planner.best(Layout(1)).footprints
    assert footprint.trained == footprint.parameters > 900_000


def test_a_planner_is_gone_when_nothing_holds_it():
    planner = Planner(load_recipe("shapes/align"), Machine.gpu("3090"))
    planner.plan(Layout(1))
    alive = weakref.ref(planner)
    del planner
    gc.collect()
    assert alive() is None
