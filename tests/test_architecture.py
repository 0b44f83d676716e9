"""The shape of the package: which way imports go, where architectures may be named, how long things get."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

from lavis.core.registries import CONNECTORS, MODEL_CONFIGS, MODELS, TOWERS

ROOT = Path(__file__).resolve().parents[1] / "lavis"
ORDER = (
    *("core", "config", "weights", "tokens", "data", "models", "generation", "objectives", "eval", "parallel"),
    *("runs", "train", "export", "serve", "cli"),
)
"""Packages from low to high: each imports from those before it alone."""
MODULES = sorted(path for path in ROOT.rglob("*.py") if "assets" not in path.parts)


def package_of(path: Path) -> str:
    """The package a module is in; empty for those at the top, which may import everything."""
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else ""


def imported(path: Path, *, types: bool = True) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything from this program that a module imports, in functions too; `types`: and what it
    needs for annotations alone.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checked = [n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
    annotations = {id(inner) for node in checked for inner in ast.walk(node)} if not types else set()
    for node in (node for node in ast.walk(tree) if id(node) not in annotations):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("lavis."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lavis":
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def test_imports_go_downward():
    upward = []
    for path in MODULES:
        own = package_of(path)
        for line, name in imported(path):
            other = name.split(".")[1]
            if own in ORDER and other in ORDER and ORDER.index(other) > ORDER.index(own):
                upward.append(f"{path.relative_to(ROOT.parent)}:{line} imports {name}")
    assert not upward, "\n".join(upward)


def test_no_two_modules_import_each_other_in_a_circle():
    names = {".".join(p.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): p for p in MODULES}
    edges: dict[str, set[str]] = {}
    for name, path in names.items():
        found = {n if n in names else n.rpartition(".")[0] for _, n in imported(path, types=False)}
        edges[name] = {n for n in found & names.keys() if n != name and not name.startswith(f"{n}.")}
    assert not (circles := list(_circles(edges))), circles


def _circles(edges: dict[str, set[str]]) -> Iterator[list[str]]:
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> Iterator[list[str]]:
        if name in path:
            yield [*path[path.index(name) :], name]
        elif name not in done:
            for other in sorted(edges[name]):
                yield from visit(other, [*path, name])
            done.add(name)

    for name in sorted(edges):
        yield from visit(name, [])


def test_modules_and_functions_are_short():
    lengths, functions = {}, []
    for path in MODULES:
        source = path.read_text(encoding="utf-8")
        lengths[str(path.relative_to(ROOT.parent))] = source.count("\n")
        nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
        functions += [(node.end_lineno or node.lineno) - node.lineno + 1 for node in nodes]
    assert not (long := {name: n for name, n in lengths.items() if n > 400}), long
    assert statistics.median(functions) <= 10 and max(functions) <= 60


def test_architectures_are_named_in_their_own_modules_alone():
    """What is special to a part is asked of its section or class: no one else compares names or classes of parts."""
    own = ("models", "config/compat", "core/registries.py", "core/registry.py", "export", "tokens", "data/dialects")
    names = {*TOWERS.list(), *CONNECTORS.list(), *MODELS.list(), *MODEL_CONFIGS.list()}
    classes = {get(name).__name__ for get, name in _part_classes()}
    found = []
    for path in MODULES:
        where = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            compared = isinstance(node, ast.Compare) and {
                n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
            }
            checked = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"
            kinds = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} if checked else set()
            if not where.startswith(own) and ((compared or set()) & names or kinds & classes):
                found.append(f"{where}:{node.lineno}")
    assert not found, found


def _part_classes() -> Iterator[tuple[Callable[[str], type], str]]:
    for registry in (TOWERS, CONNECTORS, MODELS):
        yield from ((registry.get, name) for name in registry.list())
    for registry in (TOWERS, CONNECTORS):
        yield from ((registry.config, name) for name in registry.list())
    yield from ((MODEL_CONFIGS.get, name) for name in MODEL_CONFIGS.list())
