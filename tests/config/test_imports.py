"""Python of the user's own, named in a recipe: found, executed once, kept with the run."""

import importlib.metadata
import logging
import pickle
import sys
from pathlib import Path

import pytest

from lavis.cli import main
from lavis.config.recipe import load_recipe, load_saved
from lavis.core import plugins
from lavis.core.errors import ConfigError
from lavis.core.logging import warn_once
from lavis.core.registries import LR_SCHEDULES
from lavis.core.registry import Registry

PARTS = """\
from lavis.core.registries import LR_SCHEDULES


@LR_SCHEDULES.register("{name}")
class Halved:
    pass
"""


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with a recipe that imports schedules of its own; what is imported is forgotten afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(LR_SCHEDULES, "_entries", dict(LR_SCHEDULES._entries))
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "my_parts.py").write_text(PARTS.format(name="halved"))
    (folder / "own.yaml").write_text(
        "base: shapes/align\nimports: [my_parts.py]\nrun: {lr_sched: halved, cache_features: false}\n"
    )
    yield folder
    for name in [name for name in sys.modules if name.startswith("lavis_imports_")]:
        del sys.modules[name]


def forget(registry: Registry[object], name: str) -> None:
    """As in another process."""
    registry._entries.pop(name, None)
    sys.modules.pop("lavis_imports_my_parts", None)


def test_a_file_beside_the_recipe_registers_names_before_they_are_read(parts: Path) -> None:
    recipe = load_recipe(parts / "own.yaml")
    assert load_recipe(parts / "own.yaml").optim.schedule == "halved"  # again: nothing is registered twice
    assert recipe.to_dict()["imports"] == ["my_parts.py"] and recipe.place("imports") == f"{parts / 'own.yaml'}:2"
    assert isinstance(pickle.loads(pickle.dumps(LR_SCHEDULES.get("halved")())), LR_SCHEDULES.get("halved"))


def test_a_base_and_the_working_directory_bring_imports_too(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (parts / "here").mkdir()
    (parts / "here" / "more.py").write_text(PARTS.format(name="thirds"))
    (parts / "derived.yaml").write_text("base: own\nimports: more.py\n")
    monkeypatch.chdir(parts / "here")
    recipe = load_recipe(parts / "derived.yaml", ["optim.schedule=thirds"])
    assert [item.name for item in recipe.imports] == ["my_parts.py", "more.py"]


def test_a_run_keeps_a_copy_that_opens_it_later(parts: Path, tmp_path: Path) -> None:
    recipe, run = load_recipe(parts / "own.yaml"), tmp_path / "run"
    (run / "checkpoints" / "step-3").mkdir(parents=True)
    recipe.save(run)
    config = run / "checkpoints" / "step-3" / "config.yaml"
    config.write_text(recipe.to_yaml())
    (parts / "my_parts.py").unlink()
    forget(LR_SCHEDULES, "halved")
    again = load_saved(config)
    assert again.to_dict() == recipe.to_dict() and "halved" in LR_SCHEDULES
    assert again.kept_on_resume() == recipe.kept_on_resume()


def test_a_run_from_elsewhere_executes_nothing_unless_it_is_trusted(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_recipe(parts / "own.yaml").save(tmp_path)
    (tmp_path / "imports" / "my_parts.py").write_text("raise SystemExit('executed')")
    forget(LR_SCHEDULES, "halved")
    with pytest.raises(ConfigError, match="has not been run on this machine before.*LAVIS_RUN_IMPORTS=1"):
        load_saved(tmp_path / "config.yaml")
    monkeypatch.setenv("LAVIS_RUN_IMPORTS", "1")
    with pytest.raises(ConfigError, match="SystemExit: executed"):
        load_saved(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("imports", "text", "said"),
    [
        ("[no.py]", "", "imports ({own}:2): no file 'no.py'; looked for {folder}/no.py"),
        ("[no_such_module]", "", "imports ({own}:2): no module 'no_such_module': install it, or give a file"),
        ("[3]", "", "imports ({own}:2): 3 is neither a file ending in .py nor a module"),
        ("[bad.py]", "x = 1\ny = x / 0\n", "{folder}/bad.py:2: ZeroDivisionError: division by zero"),
        ("[bad.py]", "x = 1\ndef f(:\n", "{folder}/bad.py:2: SyntaxError"),
        ("[bad.py]", "import no_such_module\n", "{folder}/bad.py:1: ModuleNotFoundError"),
        (
            "[bad.py]",
            PARTS.format(name="constant_lr"),
            "{folder}/bad.py:4: RegistryError: learning-rate schedule 'constant_lr' is registered already",
        ),
    ],
)
def test_what_cannot_be_imported_is_named_with_its_line(parts: Path, imports: str, text: str, said: str) -> None:
    own = parts / "own.yaml"
    own.write_text(own.read_text().replace("[my_parts.py]", imports))
    (parts / "bad.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(own)
    assert said.format(own=own, folder=parts) in str(caught.value)


def test_a_copied_recipe_imports_the_same_file(parts: Path, tmp_path: Path) -> None:
    assert main(["configs", "copy", str(parts / "own.yaml"), str(tmp_path / "copy.yaml")]) == 0
    assert [item.path for item in load_recipe(tmp_path / "copy.yaml").imports] == [parts / "my_parts.py"]


def test_two_files_of_one_name_are_told_apart(parts: Path) -> None:
    load_recipe(parts / "own.yaml")
    (parts / "my_parts.py").rename(parts / "old.py")
    (parts / "other").mkdir()
    (parts / "other" / "my_parts.py").write_text(PARTS.format(name="thirds"))
    with pytest.raises(ConfigError, match="give .*other/my_parts.py another name, or restart"):
        load_recipe("shapes/align", [f"imports=[{parts / 'other' / 'my_parts.py'}]"])


def test_installed_packages_are_imported_and_a_broken_one_is_left_out(
    parts: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(parts)
    (parts / "installed_parts.py").write_text(PARTS.format(name="quartered"))
    points = [
        importlib.metadata.EntryPoint("good", "installed_parts", plugins.GROUP),
        importlib.metadata.EntryPoint("bad", "no_such_parts", plugins.GROUP),
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: [p for p in points if p.group == group])
    plugins.load_plugins.cache_clear()
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "lavis"):
        assert load_recipe("shapes/align", ["optim.schedule=quartered"]).optim.schedule == "quartered"
    assert "plug-in no_such_parts of the package bad is left out: ModuleNotFoundError" in caplog.text
