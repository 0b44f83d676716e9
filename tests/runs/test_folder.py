"""What may change when a run is resumed: each field of the schema says so itself."""

from pathlib import Path

import pytest

from lavis.config.recipe import load_recipe
from lavis.runs.folder import recipe_differences

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
