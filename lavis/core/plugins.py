"""Python of the user's own that registers parts: files and modules that a recipe names, and installed packages.

A recipe's `imports:` are executed because the user names them. A copy of each file goes into the run's folder; since
such a folder can come from anybody, its copy is executed only if the same text has been imported on this machine
through a recipe before, or if the user says so.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from lavis.core.errors import ConfigError
from lavis.core.logging import warn_once
from lavis.core.paths import PACKAGE_ROOT

GROUP = "lavis.plugins"
"""Entry-point group of installed packages; each names a module, which registers what it has."""
COPIES = "imports"
"""Key of a recipe, and the folder in that of a run with the files that its recipe imports."""
TRUST = "LAVIS_RUN_IMPORTS"
"""Environment variable; 1 executes the Python files of whatever run is opened."""
_PREFIX = "lavis_imports_"
_PACKAGE = str(PACKAGE_ROOT) + os.sep
_EXECUTED: dict[str, bytes] = {}
"""Module name to the text it was made of, which may have changed on disk since."""


@dataclass(frozen=True)
class Import:
    """One of a recipe's `imports`, as `name` is given at `place`: a file, or a module where `path` is None."""

    name: str
    path: Path | None
    place: str

    def load(self) -> None:
        """Execute it, once. Raises ConfigError if it cannot be imported."""
        if self.path is None:
            _import_module(self.name, f"{COPIES} ({self.place})")
        else:
            _execute(self.path, f"{COPIES} ({self.place})")
            _remember(self.path)


@functools.cache
def load_plugins() -> None:
    """Import what installed packages name in the entry-point group `lavis.plugins`. One that fails is warned of."""
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:  # noqa: BLE001  (whatever it does wrong, the rest of the program works)
            owner = point.dist.name if point.dist else point.name
            warn_once(f"plug-in {point.value} of the package {owner} is left out: {type(error).__name__}: {error}")


def find_import(name: str, folders: Sequence[Path], place: str) -> Import:
    """What `name` means: a file, by itself or in the first of `folders` that has it, or a module.

    Raises ConfigError for a file that is nowhere.
    """
    if not name.endswith(".py"):
        return Import(name, None, place)
    given = Path(name).expanduser()
    tried = [folder / given for folder in folders]
    for path in tried:
        if path.is_file():
            return Import(name, path.resolve(), place)
    raise ConfigError(
        f"{COPIES} ({place}): no file {name!r}; looked for {' and '.join(dict.fromkeys(map(str, tried)))}."
    )


def find_saved_import(name: str, config: Path) -> Import:
    """As `find_import`, for the saved recipe `config` of a run or checkpoint: a file is the run's copy.

    Raises ConfigError if there is none, and if it is not known on this machine (see the module).
    """
    if not name.endswith(".py"):
        return Import(name, None, str(config))
    folders = [folder / COPIES for folder in list(config.absolute().parents)[:3]]
    copy = find_import(Path(name).name, folders, str(config)).path
    assert copy is not None
    if not (_remembered(copy) or os.environ.get(TRUST) == "1"):
        raise ConfigError(
            f"{copy} is Python that belongs to the run, and has not been run on this machine before. Read it; "
            f"if you trust it, set {TRUST}=1 to run it."
        )
    return Import(name, copy, str(config))


def copy_imports(imports: Sequence[Import], folder: Path) -> None:
    """Put the files among `imports` into the run's `folder`, for those who open the run later."""
    for path in (item.path for item in imports if item.path is not None):
        target = folder / COPIES / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.resolve() != path:
            target.write_bytes(path.read_bytes())


def _import_module(name: str, place: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(f"{missing}."):
            raise ConfigError(f"{place}: no module {name!r}: install it, or give a file ending in .py.") from error
        raise ConfigError(_failure(error, name, place)) from error
    except (Exception, SystemExit) as error:
        raise ConfigError(_failure(error, name, place)) from error


def _execute(path: Path, place: str) -> None:
    """Execute the file as a module whose name is the same in every process, so that its classes can be pickled."""
    name, text = _PREFIX + path.stem, path.read_bytes()
    known = sys.modules.get(name)
    if known is not None:
        if _EXECUTED.get(name) != text:
            raise ConfigError(f"{place}: {known.__file__} is imported already: give {path} another name, or restart.")
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name], _EXECUTED[name] = module, text
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(_failure(error, str(path), place)) from error


def _failure(error: BaseException, name: str, place: str) -> str:
    """What went wrong, at the innermost line that is not of this package or of Python's own import machinery."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen importlib")]
    own = [frame for frame in frames if not frame.filename.startswith((_PACKAGE, importlib.__file__))]
    line = own[-1] if own else None
    at = f"{line.filename}:{line.lineno}: " if line else ""
    if isinstance(error, SyntaxError):
        at = f"{error.filename}:{error.lineno}: "
    return f"{place}: {name} cannot be imported: {at}{type(error).__name__}: {error}"


def _memory(path: Path) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return root / "lavis" / COPIES / hashlib.sha256(path.read_bytes()).hexdigest()


def _remember(path: Path) -> None:
    memory = _memory(path)
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.touch()
    except OSError:  # a home that cannot be written: the run's copy then needs LAVIS_RUN_IMPORTS
        return


def _remembered(path: Path) -> bool:
    return _memory(path).exists()
