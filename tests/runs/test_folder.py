"""What may change when a run is resumed: each field of the schema says so itself."""

from pathlib import Path

import pytest

from lavis.config.recipe import load_recipe
from lavis.runs.folder import _unfinished_of, recipe_differences

RECIPE = "shapes/align"


@pytest.mark.parametrize(
    ("options", "differences"),
    [
        ([], []),
        (["optim.lr=1"], ["optim.lr"]),
        (["model.tower.image_size=32", "run.seed=1"], ["model.tower.image_size", "run.seed"]),
        (["train.epochs=3", "log.every=1", "run.output_dir=elsewhere", "model.llm_grad_checkpoint=true"], []),
        (["eval.prompts=[{prompt: What?}]", "parallel.deepspeed.steps_per_print=1"], []),
    ],
)
def test_keys_that_matter_for_going_on(tmp_path: Path, options: list[str], differences: list[str]) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(load_recipe(RECIPE).to_yaml(), encoding="utf-8")
    assert recipe_differences(load_recipe(RECIPE, options), saved) == differences


def test_a_run_that_cannot_be_read_is_not_resumed_by_itself(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, [f"run.output_dir={tmp_path}", "run.resume=auto"])
    (tmp_path / "a" / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "a" / "config.yaml").write_text(recipe.to_yaml().replace("name: sft", "name: of_a_plug_in"))
    assert not _unfinished_of(recipe, tmp_path / "a")
    (tmp_path / "a" / "config.yaml").write_text(recipe.to_yaml())
    assert _unfinished_of(recipe, tmp_path / "a")
