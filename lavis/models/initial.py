"""Values that come from no weight file of a part: new ones, and what a recipe's `init` names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lavis.config.init import Init
from lavis.core.errors import CheckpointError
from lavis.core.paths import resolve
from lavis.models.pretrained import tensors_of
from lavis.weights.lavis_names import is_text_branch, own_names
from lavis.weights.qwen1_format import with_qwen2_names
from lavis.weights.tensors import LoadReport, check_fit
from lavis.weights.trained import read_trained

if TYPE_CHECKING:
    from lavis.models.towers.base import Tower

log = logging.getLogger(__name__)


Own = Mapping[str, torch.Tensor]


def initialise(module: nn.Module) -> None:
    """Give parameters that are still on the meta device the values that a new module has."""
    inner: Any
    for inner in module.modules():
        if any(p.is_meta for p in inner.parameters(recurse=False)):
            inner.to_empty(device="cpu", recurse=False)
            inner.reset_parameters()


def load_initial(
    own: Own,
    init: Init,
    tower: Tower | None,
    filled: Collection[str] = (),
    elsewhere: Callable[[str], bool] = lambda name: False,
) -> LoadReport:
    """Load what `init` names into the tensors `own` (public name to tensor), strictly within its parts: every tensor of
    them that the source holds must fit, and the source must hold every one that has no value from a file yet, that is,
    whose name is not in `filled`.

    New adapters start as they are, unless the source holds adapters of that part: then all of them. Without parts, all
    that the source holds something of. `elsewhere(name)`: another stage of the model has it. Raises CheckpointError for
    what is missing or does not fit.
    """
    tensors = _readable(own, init.source, tower)
    parts = set(init.parts) or {part_of(name) for name in tensors if name in own or elsewhere(name)}
    _check_held(init, parts, tensors)
    wanted = (name for name in tensors if not init.parts or part_of(name) in parts)
    chosen = {name: tensors[name] for name in wanted if not elsewhere(name)}
    adapted = {part_of(name) for name in chosen if ".lora_" in name}
    needed = {n: t for n, t in own.items() if n in chosen or _is_needed(n, parts, adapted, filled)}
    own_shapes, found = ({name: t.shape for name, t in group.items()} for group in (needed, chosen))
    check_fit(init.source, own_shapes, found, lambda name: name not in own and is_text_branch(name))
    with torch.no_grad():
        for name, tensor in needed.items():
            tensor.copy_(chosen[name])
    report = LoadReport(init.source, tuple(sorted(needed)), tuple(sorted(tensors.keys() - needed.keys())))
    log.info("%s", report)
    return report


def _check_held(init: Init, parts: set[str], tensors: Own) -> None:
    held = {part_of(name) for name in tensors}
    if absent := sorted(set(init.parts) - held) or ([] if parts else ["this model"]):
        raise CheckpointError(
            f"{init.source} holds nothing of the {' and the '.join(absent)}, only of:"
            f" {', '.join(sorted(held)) or 'nothing'}. Change `parts` of init."
        )


def part_of(name: str) -> str:
    """The part that the tensor of that public name belongs to."""
    return {"visual_encoder": "tower", "llm_model": "llm"}.get(name.partition(".")[0], "connector")


def _readable(own: Own, source: str, tower: Tower | None) -> Own:
    """The tensors of `source` under the names that the model has for them."""
    whole = tensors_of(Path(source).expanduser()) or tensors_of(resolve(source))
    tensors = own_names(whole or with_qwen2_names(read_trained(source), "llm_model.", keep=own.keys()))
    tensors = {_below_adapter(name, own): tensor for name, tensor in tensors.items()}
    return tensors if tower is None else tower.fit(tensors)


def _below_adapter(name: str, own: Own) -> str:
    """The name of a weight where the model has put an adapter on it."""
    owner, _, leaf = name.rpartition(".")
    inner = f"{owner}.base_layer.{leaf}"
    return inner if name not in own and inner in own else name


def _is_needed(name: str, parts: set[str], adapted: set[str], filled: Collection[str]) -> bool:
    part = part_of(name)
    if part not in parts:
        return False
    return part in adapted if ".lora_" in name else name.replace(".base_layer.", ".") not in filled
