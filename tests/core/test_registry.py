"""Registries: lazy imports, duplicates, near names."""

import pytest

from lavis.core.errors import RegistryError
from lavis.core.registry import Registry


def test_a_lazy_name_is_imported_at_first_use_only() -> None:
    registry: Registry[object] = Registry("thing", lazy={"a": "no.such.module"})
    assert registry.list() == ["a"] and "a" in registry
    with pytest.raises(ModuleNotFoundError):
        registry.get("a")


def test_a_duplicate_name_is_refused() -> None:
    registry: Registry[object] = Registry("thing")
    registry.register("a")(int)
    with pytest.raises(RegistryError, match="thing 'a' is registered already"):
        registry.register("a")(float)


def test_a_miss_suggests_the_nearest_names() -> None:
    registry: Registry[object] = Registry("thing")
    registry.register("minigpt4qwen")(int)
    with pytest.raises(RegistryError, match="unknown thing 'minigpt4qwn'. Did you mean 'minigpt4qwen'"):
        registry.get("minigpt4qwn")


def test_a_name_has_a_dataclass_of_settings_beside_it() -> None:
    registry: Registry[object] = Registry(
        "thing", lazy={"a": "no.such.module", "b": "no.such.module"}, configs={"a": "fractions:Fraction"}
    )
    registry.register("mine", config=dict)(int)
    assert (registry.config("a").__name__, registry.config("mine")) == ("Fraction", dict)
    with pytest.raises(RegistryError, match="unknown thing 'mime'. Did you mean 'mine'"):
        registry.config("mime")
    with pytest.raises(RegistryError, match="thing 'b' was registered without"):
        registry.config("b")
