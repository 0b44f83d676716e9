"""Combinations that can't work are refused before anything is loaded."""

import pytest

from lavis.config.recipe import load_recipe
from lavis.core.errors import ConfigError

RECIPE = "instruction_tuning/train"
PROCESSOR = "datasets.llava_instruction.vis_processor"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["run.cache_features=true", "model.freeze_qformer=false"], "model.connector.train_qformer=full"),
        (["run.cache_features=true", "model.unfreeze_pos_embed=true"], "model.tower.train_positions=true"),
        (["run.cache_features=true", "model.get_lora=true", "model.lora_parts=[vit]"], "model.tower.train=lora"),
        (["run.cache_features=true", f"{PROCESSOR}.train.name=blip2_image_train"], "crops at random"),
        (["run.packing=true", "run.pack_length=128"], "shorter than the longest sample"),
        ([f"{PROCESSOR}.eval.image_size=448"], f"{PROCESSOR}.eval.image_size is 448 but model.tower.image_size is 224"),
        (["model.image_size=225", f"{PROCESSOR}.train.image_size=225"], "not a multiple of the patch size 14"),
        (["model.freeze_proj=true"], "nothing would be trained"),
        (["model.freeze_llm=false", "model.get_lora=true"], "choose one of the two"),
        (["model.get_lora=true", "model.lora_parts=[]"], "needs a part to adapt"),
        (["model.vit.num_heads=5"], "can't be split over 5 heads"),
        (["model.qformer.hidden_size=100"], "model.connector.qformer: hidden_size 100"),
        (["train.autocast_on_cpu=true", "train.autocast_dtype=fp16"], "does not work on the CPU"),
        (["run.train_dataset_ratios={lava_instruction: 1}"], "names lava_instruction"),
        (["run.valid_splits=[val]"], "no dataset has annotations for the split 'val' (known: train)"),
        (["run.train_splits=[]"], "run.train_splits is empty"),
        (["optim.min_lr=1"], "the rate would grow"),
        (
            ["train.micro_batch_tokens=many"],
            "train.micro_batch_tokens is 'many': give a number of tokens, auto or null",
        ),
        (["train.micro_batch_tokens=true"], "train.micro_batch_tokens is True: give a number of tokens, auto or null"),
        (["train.micro_batch_tokens=100"], "train.micro_batch_tokens 100 is less than a row of 256 tokens"),
        (["train.micro_batch_tokens=512", "parallel.strategy=zero"], "does not go with parallel.strategy zero"),
        (["optim.name=lionn"], "unknown optimiser 'lionn'. Did you mean 'lion'"),
        (
            ["optim.name=lion", "parallel.strategy=zero", "parallel.deepspeed.zero_optimization.stage=2"],
            "optim.name lion does not go with ZeRO-2",
        ),
    ],
)
def test_an_impossible_combination_is_refused(options: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(RECIPE, options)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        ["run.cache_features=true"],
        ["run.cache_features=true", "model.get_lora=true"],
        ["run.packing=true", "run.pack_length=256"],
        ["model.freeze_proj=true", "run.evaluate=true", "run.test_splits=[train]"],
        ["model.freeze_proj=true", "model.get_lora=true"],
        ["train.autocast_on_cpu=true"],
        ["optim.name=muon", "parallel.strategy=pipeline"],
        ["run.train_dataset_ratios={llava_instruction: 2}"],
    ],
)
def test_a_possible_combination_is_accepted(options: list[str]) -> None:
    load_recipe(RECIPE, options)


def test_all_impossible_combinations_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match="2 problems"):
        load_recipe(RECIPE, ["model.freeze_proj=true", "run.packing=true", "run.pack_length=128"])
