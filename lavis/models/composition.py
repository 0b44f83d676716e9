"""Models put together from parts, whose tensors go by the names they had before there were parts.

visual_encoder.<name in Tower.model>      a tower's
<name in the connector>                   a connector's
llm_model.<name>                          the LLM's
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

TOWER, CONNECTOR = "visual_encoder.model.", "connector."


class Composition(nn.Module):
    """`named_parameters`, `state_dict` and `load_state_dict` speak of public names, also inside another module."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_rename_state)
        self.register_load_state_dict_pre_hook(_rename_loaded)
        self.register_load_state_dict_post_hook(_rename_missing)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As nn.Module's, by public names."""
        for name, p in super().named_parameters("", recurse, remove_duplicate):
            yield (f"{prefix}.{public_name(name)}" if prefix else public_name(name)), p

    def own_name(self, name: str) -> str:
        """Path of the tensor that is publicly called `name`."""
        head, _, rest = name.partition(".")
        if head == "visual_encoder":
            return f"{TOWER}{rest}"
        mine = head in self._modules or head in self._parameters
        return name if mine or "connector" not in self._modules else CONNECTOR + name


def public_name(name: str) -> str:
    """Public name of the tensor at the path `name` of a composition."""
    if name.startswith(TOWER):
        return "visual_encoder." + name.removeprefix(TOWER)
    return name.removeprefix(CONNECTOR)


def _rename_state(module: Composition, state: dict[str, Any], prefix: str, _: Any) -> None:
    _rename(state, prefix, public_name)


def _rename_loaded(module: Composition, state: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename(state, prefix, module.own_name)


def _rename(state: dict[str, Any], prefix: str, renamed: Callable[[str], str]) -> None:
    """In place, in the order that is there, since `state` may be another module's too."""
    items = list(state.items())
    state.clear()
    for name, value in items:
        inside = name.startswith(prefix)
        state[prefix + renamed(name.removeprefix(prefix)) if inside else name] = value


def _rename_missing(module: Composition, keys: Any) -> None:
    for names in (keys.missing_keys, keys.unexpected_keys):
        names[:] = [public_name(name) for name in names]
