"""Recipes that are based on others."""

from pathlib import Path

import pytest

from lavis.cli import main
from lavis.config.recipe import load_recipe
from lavis.core.errors import ConfigError

BASE = """\
model: {arch: minigpt4qwen, model_type: qwen7b_chat}
datasets:
  minigpt4_instruction:
  llava_instruction:
run:
  seed: 7
  trackers: [tensorboard, wandb]
  grad_norm_clip: 2.0
  output_dir: out/${run.seed}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_mappings_merge_lists_replace_and_null_overrides(folder: Path) -> None:
    own = write(folder, "own.yaml", "base: base\nrun:\n  seed: 8\n  trackers: [swanlab]\n  grad_norm_clip:\n")
    recipe = load_recipe(own)
    assert [entry.name for entry in recipe.data.train] == ["minigpt4_instruction", "llava_instruction"]
    assert (recipe.run.seed, recipe.run.output_dir) == (8, "out/8")
    assert (recipe.log.trackers, recipe.optim.max_grad_norm) == (["swanlab"], None)
    assert recipe.place("run.seed") == f"{own}:3"
    assert recipe.place("run.output_dir") == f"{folder / 'base.yaml'}:9"
    assert recipe.place("optim.min_lr") == "schema"


def test_several_levels_several_bases_and_one_of_them_twice(folder: Path) -> None:
    write(folder, "sub/a.yaml", "base: ../base.yaml\nrun: {seed: 1, max_epoch: 1}\n")
    write(folder, "sub/b.yaml", "base: [../base.yaml]\nrun: {max_epoch: 2}\n")
    recipe = load_recipe(write(folder, "own.yaml", "base: [sub/a, sub/b]\n"))
    assert (recipe.run.seed, recipe.train.epochs) == (1, 2)  # b's own base, which a is above of, is not laid over a


def test_a_shipped_recipe_is_a_base_by_its_name(folder: Path) -> None:
    own = write(folder, "own.yaml", "base: shapes/align\nrun: {seed: 3}\n")
    recipe = load_recipe(own, ["train.max_steps=5"])
    assert (recipe.run.seed, recipe.train.max_steps, recipe.optim.lr) == (3, 5, 3e-3)
    assert recipe.place("optim.lr").startswith("lavis/projects/shapes/align.yaml:")


def test_a_mapping_over_a_list_of_the_base_is_named_with_both_lines(folder: Path) -> None:
    own = write(folder, "own.yaml", "base: base\nrun:\n  trackers: {a: 1}\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(own)
    said = f"run.trackers ({own}:3) is a mapping, but a list is expected ({folder / 'base.yaml'}:7)"
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("bas", "base ({own}:1): no recipe 'bas', neither a file beside this one nor shipped."),
        ("shapes/alin", "Did you mean 'shapes/align'"),
        ("[base, 3]", "base ({own}:1): 3 is no recipe"),
        ("own", "in a circle: {own} -> {own}."),
        ("other", "in a circle: {own} -> {other} -> {own}."),
    ],
)
def test_a_wrong_base_is_named_with_its_line(folder: Path, base: str, said: str) -> None:
    other = write(folder, "other.yaml", "base: own.yaml\n")
    own = write(folder, "own.yaml", f"base: {base}\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(own)
    assert said.format(own=own, other=other) in str(caught.value)


def test_problems_are_at_the_line_of_the_base(folder: Path) -> None:
    write(folder, "base.yaml", BASE.replace("seed: 7", "sed: 7").replace("${run.seed}", "x"))
    own = write(folder, "own.yaml", "base: base\n")
    with pytest.raises(ConfigError, match=f"run.sed \\({folder / 'base.yaml'}:6\\): unknown key. Did you mean 'seed'"):
        load_recipe(own)


def test_a_copy_finds_its_bases_from_elsewhere(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = write(folder, "own.yaml", "# mine\nbase: [base, instruction_tuning/train] # two\nmodel: {llm_model: x}\n")
    target = folder / "far" / "copy.yaml"
    assert main(["configs", "copy", str(own), str(target)]) == 0
    assert load_recipe(target).to_dict() == load_recipe(own).to_dict()
    assert target.read_text().startswith(f'# mine\nbase: ["{folder / "base.yaml"}", instruction_tuning/train] # two\n')


def test_check_takes_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = str(folder / "base.yaml")
    assert main(["configs", "check", base, "--options", "run.seed=1"]) == 0
    assert main(["configs", "check", base, "--options", "run.seed=x"]) == 2
    assert "run.seed (--options): 'x' has the wrong type" in capsys.readouterr().out


def test_show_says_which_line_a_value_is_from(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = write(folder, "own.yaml", "base: base\nrun: {seed: 8}\n")
    assert main(["configs", "show", str(own), "--options", "optim.lr=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"  seed: 8  # from {own}:2" in lines
    assert f'  trackers: ["tensorboard", "wandb"]  # from {folder / "base.yaml"}:7' in lines
    assert "  lr: 1.0  # from --options" in lines and "  min_lr: 1e-06  # from schema" in lines
