"""Older spellings: where they are found, and what messages call them."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import pytest

from lavis.config import compat
from lavis.config.compat import Wrong, run
from lavis.config.recipe import load_recipe, recipe_from_dict
from lavis.config.schema import opt
from lavis.config.typed import Problem, defaults, read_dataclass
from lavis.core.errors import ConfigError, RegistryError
from lavis.core.logging import info_once
from lavis.core.registry import Registry

RECIPE = """\
model:
  preset: minigpt4qwen/qwen7b_chat
datasets:
  minigpt4_instruction:
run:
  random_seed: 7
  shuffle: 3
  output_dir: out/${run.random_seed}
"""


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of a time when run.seed was called run.random_seed, and run.shuffle set eval.num_prompts."""

    def rules(values: Mapping[str, Any]) -> Iterator[Any]:
        shuffle = values["run"].get("shuffle")
        if isinstance(shuffle, str):
            yield Wrong("run.shuffle", f"{shuffle!r} is no number")
        elif shuffle is not None:
            yield "eval.num_prompts", shuffle, ("run.shuffle",)

    monkeypatch.setattr(run, "RENAMES", {"run.random_seed": "run.seed"})
    monkeypatch.setitem(compat.RENAMES, "run.random_seed", "run.seed")
    monkeypatch.setattr(run, "CONSUMED", ("run.shuffle",))
    monkeypatch.setattr(run, "rules", rules)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_older_names_are_read_in_every_layer_and_in_references(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["run.random_seed=9"])
    assert (recipe.run.seed, recipe.eval.num_prompts, recipe.run.output_dir) == (9, 3, "out/9")
    assert (recipe.origins["run.seed"], recipe.origins["eval.num_prompts"]) == ("--options", str(recipe_file))


def test_a_saved_config_is_translated_too_and_without_a_word(
    recipe_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = load_recipe(recipe_file).to_dict()
    saved["run"]["random_seed"] = saved["run"].pop("seed")
    info_once.cache_clear()
    caplog.clear()
    with caplog.at_level(logging.INFO, "lavis"):
        assert recipe_from_dict(saved).run.seed == 7
    assert not caplog.records


def test_they_are_mentioned_once(recipe_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    info_once.cache_clear()
    with caplog.at_level(logging.INFO, "lavis"):
        load_recipe(recipe_file)
        load_recipe(recipe_file)
    (record,) = caplog.records
    assert record.getMessage() == (
        "these keys have newer names: run.shuffle -> eval.num_prompts, run.random_seed -> run.seed."
    )


def test_messages_call_a_key_as_it_is_written_and_name_todays(recipe_file: Path) -> None:
    recipe_file.write_text(RECIPE.replace("random_seed: 7", "random_seed: many").replace("shuffle: 3", "shuffle: -1"))
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe_file)
    assert f"run.random_seed ({recipe_file}:6): 'many' has the wrong type: expected whole number." in str(caught.value)
    assert "(run.random_seed is called run.seed now.)" in str(caught.value)
    assert f"run.shuffle ({recipe_file}:7): -1 is below the smallest allowed value, 0." in str(caught.value)


def test_older_names_are_proposed_too(recipe_file: Path) -> None:
    with pytest.raises(ConfigError, match="run.random_sed .*unknown key. Did you mean 'random_seed'"):
        load_recipe(recipe_file, ["run.random_sed=3"])
    with pytest.raises(ConfigError, match="model.shuffle .*unknown key. It belongs elsewhere: run.shuffle"):
        load_recipe(recipe_file, ["model.shuffle=3"])


def test_what_means_nothing_is_refused_with_its_line(recipe_file: Path) -> None:
    recipe_file.write_text(RECIPE.replace("shuffle: 3", "shuffle: wildly"))
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe_file)
    assert str(caught.value) == f"run.shuffle ({recipe_file}:7): 'wildly' is no number."


PARTS: Registry[Any] = Registry("part")


@dataclass
class Part:
    name: str = opt("plain", "name")
    width: int = opt(1, "width")

    @classmethod
    def choose(cls, values: Mapping[str, Any]) -> type["Part"]:
        return PARTS.config(str(values.get("name") or "plain"))


@dataclass
class Wide(Part):
    depth: int = opt(2, "depth")


@dataclass
class Whole:
    part: Optional[Part] = opt(None, "a part")


PARTS.register("plain", config=Part)(object())
PARTS.register("wide", config=Wide)(object())


def test_a_section_has_the_keys_of_the_part_it_names() -> None:
    problems: list[Problem] = []
    assert read_dataclass(Whole, {"part": {"name": "wide", "depth": 3}}, "", problems).part == Wide("wide", 1, 3)
    assert read_dataclass(Whole, {"part": None}, "", problems).part is None
    assert not problems
    read_dataclass(Whole, {"part": {"name": "plain", "depth": 3}}, "model", problems)
    assert [p.key for p in problems] == ["model.part.depth"]
    assert defaults(Whole, {"part": {"name": "wide"}})["part"] == {"name": "plain", "width": 1, "depth": 2}


def test_an_unknown_part_suggests_near_names() -> None:
    problems: list[Problem] = []
    read_dataclass(Whole, {"part": {"name": "wid"}}, "model", problems)
    assert [p.key for p in problems] == ["model.part.name"]
    assert problems[0].message.startswith("unknown part 'wid'. Did you mean 'wide'")
    with pytest.raises(RegistryError):
        Part.choose({"name": "wid"})


def test_a_key_under_both_names_is_refused_in_a_file_and_the_last_one_counts_among_options(recipe_file: Path) -> None:
    options = ["run.random_seed=1", "run.seed=2"]
    assert load_recipe(recipe_file, options).run.seed == 2
    assert load_recipe(recipe_file, options[::-1]).run.seed == 1
    recipe_file.write_text(RECIPE + "  seed: 3\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe_file)
    said = f"run.random_seed ({recipe_file}:6): is the older name of run.seed, which stands here too: keep one of them."
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["run.task=language_modeling"], ("sft", "data_parallel")),
        (["run.runner=deepspeed_runner", "run.task=deepspeed_image_text_pretrain"], ("sft", "zero")),
        (["parallel.strategy=zero", "run.runner=pipeline_runner"], ("sft", "pipeline")),
        (["run.runner=pipeline_runner", "parallel.strategy=zero"], ("sft", "zero")),
    ],
)
def test_tasks_and_runners_are_objectives_and_strategies(options: list[str], found: tuple[str, str]) -> None:
    recipe = load_recipe("shapes/align", options)
    assert (recipe.objective.name, recipe.parallel.strategy) == found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["run.task=image_text_pretrian"], "run.task (--options): unknown task 'image_text_pretrian'. Did you mean"),
        (["run.runner=deepspeed"], "unknown runner 'deepspeed'. Did you mean 'deepspeed_runner'"),
        (["run.runner=tokenizer_runner"], "tokenizer_runner is for byte_level_bpe, and for nothing else"),
        (["objective.name=stf"], "objective.name (--options): unknown objective 'stf'. Did you mean 'sft'"),
    ],
)
def test_unknown_tasks_and_runners_are_refused(options: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("shapes/align", options)
    assert said in str(caught.value)


def test_the_originals_ways_to_name_a_checkpoint() -> None:
    assert load_recipe("shapes/align", ["run.resume_ckpt_path=x/step-3"]).run.resume == "x/step-3"
    folder = ["run.resume_ckpt_load_dir=x", "run.resume_ckpt_tag=step-3"]
    assert load_recipe("shapes/align", folder).run.resume == "x/step-3"
    assert load_recipe("shapes/align", ["run.resume_ckpt_load_dir=x"]).run.resume == "x"


def test_references_to_older_names_go_on(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "base: shapes/align\nrun:\n  accum_grad_iters: 3\n  output_dir: out/${run.task}/${run.init_lr}\n"
        "  deepspeed_config: {gradient_accumulation_steps: '${run.accum_grad_iters}'}\n"
    )
    recipe = load_recipe(path)
    assert recipe.run.output_dir == "out/sft/0.003"
    assert recipe.parallel.deepspeed == {"gradient_accumulation_steps": 3}


def test_rules_speak_of_todays_keys_and_name_the_recipes() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("shapes/align", ["run.min_lr=1"])
    assert str(caught.value) == (
        "optim.min_lr 1 is above optim.lr 0.003: the rate would grow. (run.min_lr is called optim.min_lr now.)"
    )
