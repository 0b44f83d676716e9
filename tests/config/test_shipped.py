"""The shipped recipes keep the original's paths and figures, and say nothing twice in two ways."""

import functools
from typing import Any

import pytest

from lavis.config.recipe import Recipe, load_recipe, shipped_recipes
from lavis.weights.sources import SOURCES

ZERO = {f"deepspeed/train_zero{stage}_3090x4": stage for stage in (0, 1, 2)}
WITH_DEEPSPEED = [*ZERO, "pp_qwen14b/train_pp"]
GPUS = {"instruction_tuning/train_3090x4": 4, "pp_qwen14b/train_pp": 1, **dict.fromkeys(ZERO, 4)}
"""Data-parallel ranks that a recipe is for; 8 for the others."""
ORIGINAL: dict[str, dict[str, Any]] = {
    "instruction_tuning/train": {"run.accum_grad_iters": 16},
    "instruction_tuning/train_3090x4": {"run.accum_grad_iters": 32},
    **{name: {"run.batch_size_train": 2, "run.accum_grad_iters": 16} for name in ZERO},
    "pp_qwen14b/train_pp": {
        "run.accum_grad_iters": 128,
        "run.max_epoch": 20,
        "model.preset": "minigpt4qwen/qwen14b_chat",
    },
}
COMMON = {
    "model.preset": "minigpt4qwen/qwen7b_chat",
    "model.max_length": 256,
    "run.batch_size_train": 1,
    "run.max_epoch": 10,
    "run.init_lr": 1e-4,
    "run.min_lr": 1e-6,
    "run.warmup_lr": 0,
    "run.warmup_steps": 500,
    "run.weight_decay": 0.05,
    "run.grad_norm_clip": 1,
    "run.lr_sched": "linear_warmup_cosine_lr",
    "run.autocast_dtype": "bf16",
    "run.seed": 42,
}


@functools.cache
def recipe_of(name: str) -> Recipe:
    return load_recipe(name)


@pytest.mark.parametrize("name", ORIGINAL)
def test_figures_are_the_originals(name: str) -> None:
    flat = recipe_of(name).flat()
    expected = COMMON | ORIGINAL[name]
    assert {key: flat[key] for key in expected} == expected
    adam = (0.99, 1e-7) if name in WITH_DEEPSPEED else (0.999, 1e-8)
    assert (flat["run.beta2"], flat["run.adam_eps"]) == adam


@pytest.mark.parametrize("name", [n for n in shipped_recipes() if not n.startswith(("shapes/", "llava/"))])
def test_a_step_has_128_samples_on_the_gpus_a_recipe_is_for(name: str) -> None:
    run = recipe_of(name).run
    assert run.batch_size_train * run.accum_grad_iters * GPUS.get(name, 8) == 128


@pytest.mark.parametrize("name", [n for n in shipped_recipes() if not n.startswith("shapes/")])
def test_the_weights_of_a_recipe_have_a_known_source(name: str) -> None:
    model = recipe_of(name).model
    paths = [model.tower.weights, model.connector.weights, model.llm.weights]
    assert None not in paths or name.startswith("llava/")  # whose connector is trained from nothing
    assert [path for path in paths if path and path.rsplit("/", 1)[-1] not in SOURCES] == []


def shared_with_deepspeed(recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Key of the deepspeed_config to (value there, value in the run section)."""
    run, config = recipe.run, recipe.run.deepspeed_config
    adam = config["optimizer"]["params"]
    return {
        "gradient_accumulation_steps": (config["gradient_accumulation_steps"], run.accum_grad_iters),
        "train_micro_batch_size_per_gpu": (config["train_micro_batch_size_per_gpu"], run.batch_size_train),
        "gradient_clipping": (config["gradient_clipping"], run.grad_norm_clip),
        "bf16": (config["bf16"]["enabled"], run.autocast_dtype == "bf16"),
        "lr": (adam["lr"], run.init_lr),
        "betas": (adam["betas"], [run.beta1, run.beta2]),
        "eps": (adam["eps"], run.adam_eps),
        "weight_decay": (adam["weight_decay"], run.weight_decay),
    }


@pytest.mark.parametrize("options", [[], ["run.accum_grad_iters=4", "run.init_lr=0.5", "run.beta1=0.8"]])
@pytest.mark.parametrize("name", WITH_DEEPSPEED)
def test_deepspeeds_section_says_what_the_recipe_says_also_with_options(name: str, options: list[str]) -> None:
    shared = shared_with_deepspeed(load_recipe(name, options))
    assert {key: values for key, values in shared.items() if values[0] != values[1]} == {}


def test_the_zero_recipes_differ_by_their_stage() -> None:
    assert {name: recipe_of(name).run.deepspeed_config["zero_optimization"]["stage"] for name in ZERO} == ZERO
    assert {recipe_of(name).run.runner for name in ZERO} == {"deepspeed_runner"}


@pytest.mark.parametrize("value", ["false", "true", "null"])
def test_the_originals_switch_for_loss_scaling_is_read(value: str) -> None:
    assert load_recipe("instruction_tuning/train", [f"run.loss_scale={value}"]).run.loss_scale is None
    assert load_recipe("instruction_tuning/train", ["run.loss_scale=1"]).run.loss_scale == 1


LLAVA = {
    # stage, samples a step, peak rate, what is trained of tower, connector and LLM
    "llava/pretrain": (256, 1e-3, ("frozen", "full", "frozen")),
    "llava/finetune": (128, 2e-5, ("frozen", "full", "full")),
}


@pytest.mark.parametrize("name", LLAVA)
def test_llavas_figures_are_the_published_ones(name: str) -> None:
    recipe = recipe_of(name)
    model, run = recipe.model, recipe.run
    trained = (model.tower.train, model.connector.train, model.llm.train)
    assert (run.global_batch_size, run.init_lr, trained) == LLAVA[name]
    same = (run.max_epoch, run.warmup_ratio, run.weight_decay, run.min_lr, run.lr_sched, run.grad_norm_clip)
    assert same == (1, 0.03, 0.0, 0.0, "linear_warmup_cosine_lr_step-wise", 1.0)
    assert (run.beta1, run.beta2, run.adam_eps, run.autocast_dtype) == (0.9, 0.999, 1e-8, "bf16")
    assert (model.tokens_per_tile, model.max_length, model.media.resize, model.media.format) == (
        576,
        2048,
        "pad",
        "llava",
    )
    assert (model.tower.layer, model.tower.class_token, model.chat_template) == (-2, "drop", "vicuna")
    assert recipe.data.length_grouping


def test_the_second_stage_of_llava_starts_from_the_first() -> None:
    for world in ("llava/pretrain", "llava/finetune"), ("shapes/llava_pretrain", "shapes/llava_finetune"):
        first, second = map(recipe_of, world)
        assert second.init == [{"from": first.run.output_dir, "parts": ["connector"]}]
        assert (first.model.tower, first.model.media) == (second.model.tower, second.model.media)
