"""One generic registry. Names map to objects; names whose module is heavy are declared lazily and imported at first
use.

    MODELS = Registry("model", lazy={"minigpt4qwen": "lavis.models.minigpt4qwen"})

    @MODELS.register("minigpt4qwen")
    class MiniGPT4Qwen(nn.Module): ...

    MODELS.get("minigpt4qwen")   # imports the module, whose decorator registers the class
    MODELS.list("minigpt4*")     # imports nothing

A name can have a dataclass of settings beside it, which is known before the heavy module is imported:

    TOWERS = Registry("vision tower", lazy={"clip": "lavis.models.towers.clip"},
                      configs={"clip": "lavis.models.part_configs:ClipConfig"})

    @TOWERS.register("my_conv", config=MyConvConfig)
    class MyConv(Tower): ...

    TOWERS.config("clip")        # imports lavis.models.part_configs alone
"""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from lavis.core.errors import RegistryError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Names of one kind of thing (`kind` is used in messages).

    `lazy` maps a name to the module that registers it, `configs` to `module:Dataclass` of its settings.
    """

    def __init__(
        self,
        kind: str,
        lazy: Mapping[str, str] | None = None,
        configs: Mapping[str, str] | None = None,
    ) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._lazy: dict[str, str] = dict(lazy or {})
        self._lazy_configs: dict[str, str] = dict(configs or {})
        self._configs: dict[str, type] = {}

    def register(self, name: str, config: type | None = None) -> Callable[[T], T]:
        """Decorator that registers what it decorates as `name`, with the dataclass of its settings.

        Raises RegistryError if another object has the name.
        """

        def decorate(entry: T) -> T:
            module = getattr(entry, "__module__", None)
            declared = self._lazy.get(name, module)
            taken = self._entries.get(name)
            if taken is not None or declared != module:
                owner = getattr(taken, "__module__", None) or declared
                raise RegistryError(f"{self.kind} {name!r} is registered already (by {owner}): choose another name.")
            self._entries[name] = entry
            if config is not None:
                self._configs[name] = config
            return entry

        return decorate

    def get(self, name: str) -> T:
        """The object registered as `name`; its module is imported if need be.

        Raises RegistryError naming the nearest names.
        """
        if name not in self._entries and name in self._lazy:
            importlib.import_module(self._lazy[name])
        if name not in self._entries:
            raise self._unknown(name)
        return self._entries[name]

    def config(self, name: str, default: type | None = None) -> type:
        """The dataclass of settings of `name`, without importing its module if `configs` says where it is.

        Raises RegistryError for an unknown name, and for one that has none where there is no `default`.
        """
        if name not in self:
            raise self._unknown(name)
        if name not in self._configs and name in self._lazy_configs:
            module, _, attribute = self._lazy_configs[name].partition(":")
            self._configs[name] = getattr(importlib.import_module(module), attribute)
        config = self._configs.get(name, default)
        if config is None:
            raise RegistryError(f"{self.kind} {name!r} was registered without a dataclass of settings (config=...).")
        return config

    def _unknown(self, name: str) -> RegistryError:
        known = self.list()
        hint = did_you_mean(name, known)
        return RegistryError(f"unknown {self.kind} {name!r}.{hint} Known: {', '.join(known) or 'none'}.")

    def list(self, pattern: str = "*") -> list[str]:
        """Sorted names that match the shell `pattern`; nothing is imported."""
        return sorted(fnmatch.filter({*self._entries, *self._lazy}, pattern))

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._lazy
