"""Shipped recipes and defaults, the `configs` command, and how the commands fail."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lavis
from lavis.cli import COMMANDS, main
from lavis.config.doc import recipes_markdown
from lavis.config.recipe import (
    load_dataset_config,
    load_model_config,
    load_preprocess_config,
    load_recipe,
    shipped_recipes,
)
from lavis.core.paths import CONFIGS_ROOT, PROJECTS_ROOT

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "instruction_tuning/train"


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid_and_says_what_it_is_for(name: str) -> None:
    load_recipe(name)
    assert shipped_recipes()[name].read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize(("arch", "model_type"), [(arch, kind) for arch, kinds in lavis.model_zoo for kind in kinds])
def test_every_model_default_is_valid(arch: str, model_type: str) -> None:
    config = load_model_config(arch, model_type)
    assert config.preset == f"{arch}/{model_type}"
    load_preprocess_config(arch, model_type)


@pytest.mark.parametrize("path", sorted((CONFIGS_ROOT / "datasets").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_dataset_default_is_valid(path: Path) -> None:
    load_dataset_config(path.stem)


def test_shipped_files_name_no_absolute_path() -> None:
    files = [*CONFIGS_ROOT.rglob("*.yaml"), *PROJECTS_ROOT.rglob("*.yaml")]
    assert [f for f in files if re.search(r"[:\[,]\s*['\"]?/\w", f.read_text(encoding="utf-8"))] == []


def test_a_misspelt_key_ends_train_with_the_nearest_name_and_no_traceback() -> None:
    done = run_script("train.py", "--cfg-path", RECIPE, "--options", "run.batch_size_trian=4")
    assert done.returncode == 2
    assert "run.batch_size_trian (--options): unknown key. Did you mean 'batch_size_train'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help_comes_within_a_second(script: str) -> None:
    start = time.perf_counter()
    done = run_script(script, "--help")
    assert (done.returncode, "--cfg-path" in done.stdout) == (0, True)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["configs", "list"]])
def test_light_commands_import_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from lavis.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules"
    )
    assert run_script("-c", code, *arguments).returncode == 0


def test_import_lavis_is_light_and_its_names_resolve() -> None:
    assert run_script("-c", "import sys, lavis; assert not {'torch', 'omegaconf'} & set(sys.modules)").returncode == 0
    assert "minigpt4qwen" in str(lavis.model_zoo) and "qwen14b_chat" in str(lavis.model_zoo)
    assert "llava_instruction" in str(lavis.dataset_zoo)
    assert callable(lavis.load_model_and_preprocess) and lavis.registries.MODELS
    with pytest.raises(AttributeError):
        lavis.no_such_name


def test_an_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "error: unknown command 'trian'. Did you mean 'train'?" in capsys.readouterr().err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert [name for name in COMMANDS if name not in out] == []


def test_interrupting_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lavis.config.recipe.shipped_recipes", interrupted)
    assert main(["configs", "list"]) == 130


def test_list_prints_names_with_their_first_comment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "list", "instruction_tuning/*"]) == 0
    name, text = capsys.readouterr().out.splitlines()[0].split(maxsplit=1)
    assert (name, text.startswith("MiniGPT4Qwen: teach")) == (RECIPE, True)


def test_copy_refuses_to_overwrite_without_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "sub" / "mine.yaml"
    assert main(["configs", "copy", RECIPE, str(target)]) == 0
    target.write_text("changed")
    assert main(["configs", "copy", RECIPE, str(target)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["configs", "copy", RECIPE, str(target), "--force"]) == 0
    assert target.read_text(encoding="utf-8") == shipped_recipes()[RECIPE].read_text(encoding="utf-8")


def test_show_prints_origins_and_can_be_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "show", RECIPE, "--options", "run.seed=5"]) == 0
    shown = capsys.readouterr().out
    assert "  seed: 5  # from --options" in shown
    assert "  epochs: 10  # from lavis/projects/instruction_tuning/train.yaml" in shown
    saved = tmp_path / "shown.yaml"
    saved.write_text(shown)
    assert load_recipe(saved).to_dict() == load_recipe(RECIPE, ["run.seed=5"]).to_dict()


def test_check_reports_each_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("model: {arch: minigpt4qwen}\ndatasets: {instruction: {formt: auto}}\n")
    assert main(["configs", "check", RECIPE, str(wrong)]) == 2
    out = capsys.readouterr().out
    assert f"{RECIPE}: valid" in out and "Did you mean 'format'" in out


def test_the_reference_of_recipe_keys_is_up_to_date() -> None:
    committed = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert committed == recipes_markdown(), "run `lavis configs doc`"
