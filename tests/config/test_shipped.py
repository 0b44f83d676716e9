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
    "instruction_tuning/train": {"train.accumulation": 16},
    "instruction_tuning/train_3090x4": {"train.accumulation": 32},
    **{name: {"train.micro_batch_size": 2, "train.accumulation": 16} for name in ZERO},
    "pp_qwen14b/train_pp": {
        "train.accumulation": 128,
        "train.epochs": 20,
        "model.preset": "minigpt4qwen/qwen14b_chat",
    },
}
COMMON = {
    "model.preset": "minigpt4qwen/qwen7b_chat",
    "model.max_length": 256,
    "train.micro_batch_size": 1,
    "train.epochs": 10,
    "optim.lr": 1e-4,
    "optim.min_lr": 1e-6,
    "optim.warmup_lr": 0,
    "optim.warmup_steps": 500,
    "optim.weight_decay": 0.05,
    "optim.max_grad_norm": 1,
    "optim.schedule": "linear_warmup_cosine_lr",
    "train.autocast_dtype": "bf16",
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
    assert (flat["optim.beta2"], flat["optim.eps"]) == adam


@pytest.mark.parametrize("name", [n for n in shipped_recipes() if not n.startswith(("shapes/", "llava/"))])
def test_a_step_has_128_samples_on_the_gpus_a_recipe_is_for(name: str) -> None:
    recipe = recipe_of(name)
    assert recipe.train.micro_batch_size * recipe.train.accumulation * GPUS.get(name, 8) == 128


@pytest.mark.parametrize("name", [n for n in shipped_recipes() if not n.startswith("shapes/")])
def test_the_weights_of_a_recipe_have_a_known_source(name: str) -> None:
    model = recipe_of(name).model
    paths = [model.tower.weights, model.connector.weights, model.llm.weights]
    assert None not in paths or name.startswith("llava/")  # whose connector is trained from nothing
    assert [path for path in paths if path and path.rsplit("/", 1)[-1] not in SOURCES] == []


def shared_with_deepspeed(recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Key of the deepspeed_config to (value there, value in the run section)."""
    config = recipe.parallel.deepspeed
    adam = config["optimizer"]["params"]
    return {
        "gradient_accumulation_steps": (config["gradient_accumulation_steps"], recipe.train.accumulation),
        "train_micro_batch_size_per_gpu": (config["train_micro_batch_size_per_gpu"], recipe.train.micro_batch_size),
        "gradient_clipping": (config["gradient_clipping"], recipe.optim.max_grad_norm),
        "bf16": (config["bf16"]["enabled"], recipe.train.autocast_dtype == "bf16"),
        "lr": (adam["lr"], recipe.optim.lr),
        "betas": (adam["betas"], [recipe.optim.beta1, recipe.optim.beta2]),
        "eps": (adam["eps"], recipe.optim.eps),
        "weight_decay": (adam["weight_decay"], recipe.optim.weight_decay),
    }


@pytest.mark.parametrize("options", [[], ["train.accumulation=4", "optim.lr=0.5", "optim.beta1=0.8"]])
@pytest.mark.parametrize("name", WITH_DEEPSPEED)
def test_deepspeeds_section_says_what_the_recipe_says_also_with_options(name: str, options: list[str]) -> None:
    shared = shared_with_deepspeed(load_recipe(name, options))
    assert {key: values for key, values in shared.items() if values[0] != values[1]} == {}


def test_the_zero_recipes_differ_by_their_stage() -> None:
    assert {name: recipe_of(name).parallel.deepspeed["zero_optimization"]["stage"] for name in ZERO} == ZERO
    assert {recipe_of(name).parallel.strategy for name in ZERO} == {"zero"}


@pytest.mark.parametrize("value", ["false", "true", "null"])
def test_the_originals_switch_for_loss_scaling_is_read(value: str) -> None:
    assert load_recipe("instruction_tuning/train", [f"run.loss_scale={value}"]).train.loss_scale is None
    assert load_recipe("instruction_tuning/train", ["run.loss_scale=1"]).train.loss_scale == 1


LLAVA = {
    # stage, samples a step, peak rate, what is trained of tower, connector and LLM
    "llava/pretrain": (256, 1e-3, ("frozen", "full", "frozen")),
    "llava/finetune": (128, 2e-5, ("frozen", "full", "full")),
    "llava/finetune_lora": (128, 2e-4, ("frozen", "full", "lora")),
    "llava/finetune_xtuner": (128, 2e-4, ("lora", "full", "lora")),
}


@pytest.mark.parametrize("name", LLAVA)
def test_llavas_figures_are_the_published_ones(name: str) -> None:
    recipe = recipe_of(name)
    model, optim, train = recipe.model, recipe.optim, recipe.train
    trained = (model.tower.train, model.connector.train, model.llm.train)
    assert (train.global_batch_size, optim.lr, trained) == LLAVA[name]
    same = (train.epochs, optim.warmup_ratio, optim.weight_decay, optim.min_lr, optim.schedule, optim.max_grad_norm)
    assert same == (1, 0.03, 0.0, 0.0, "linear_warmup_cosine_lr_step-wise", 1.0)
    assert (optim.beta1, optim.beta2, optim.eps, train.autocast_dtype) == (0.9, 0.999, 1e-8, "bf16")
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


def test_llavas_adapters_are_the_published_ones() -> None:
    lora, xtuner = recipe_of("llava/finetune_lora").model, recipe_of("llava/finetune_xtuner").model
    parts = (lora.llm, xtuner.llm, xtuner.tower)
    assert [(p.lora.rank, p.lora.alpha, p.lora.dropout) for p in parts] == [
        (128, 256, 0.05),
        (512, 256, 0.05),
        (64, 16, 0.05),
    ]
    assert {p.lora.targets for p in parts} == {"linear"}
    assert (lora.connector.lr_scale * recipe_of("llava/finetune_lora").optim.lr) == pytest.approx(2e-5)
    assert (lora.llm.quantization, xtuner.llm.quantization) == (None, "int4")
