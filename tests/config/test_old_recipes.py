"""The recipes as they were shipped before sections and bases: they mean what today's of the same name mean."""

from pathlib import Path
from typing import Any

import pytest

from lavis.config.recipe import Recipe, load_recipe, recipe_from_dict
from lavis.runs.folder import recipe_differences

OLD = Path(__file__).parent / "old_recipes"
NAMES = sorted(path.relative_to(OLD).with_suffix("").as_posix() for path in OLD.rglob("*.yaml"))


def meaning(recipe: Recipe) -> dict[str, Any]:
    """All values; of the entries of data what they mean, since their names and parts can be left out now."""
    values = recipe.flat()
    for section, entries in recipe.data.sections().items():
        values[f"data.{section}"] = [entry.meaning(section) for entry in entries]
    if recipe.run.evaluate:
        values.pop("data.train")  # is not read
    return values


@pytest.mark.parametrize("name", NAMES)
def test_an_old_recipe_and_todays_resolve_to_the_same_values(name: str) -> None:
    old, new = meaning(load_recipe(OLD / f"{name}.yaml")), meaning(load_recipe(name))
    assert {key: (old.get(key), new.get(key)) for key in old.keys() | new.keys() if old.get(key) != new.get(key)} == {}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "shapes/evaluate_tower"])
def test_a_run_of_an_old_recipe_is_resumed_with_todays(name: str, tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(load_recipe(OLD / f"{name}.yaml").to_yaml(), encoding="utf-8")
    assert recipe_differences(load_recipe(name), saved) == []


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_of_an_old_recipe_reads_back_equal(name: str) -> None:
    recipe = load_recipe(OLD / f"{name}.yaml")
    assert recipe_from_dict(recipe.to_dict()).to_dict() == recipe.to_dict()
