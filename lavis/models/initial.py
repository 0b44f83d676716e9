"""Where the values of a Vlm come from: each part's weight file, then what a recipe's `init` names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lavis.core.errors import CheckpointError
from lavis.models.parts import Init
from lavis.weights.lavis_names import is_text_branch, own_names
from lavis.weights.qwen1_format import with_qwen2_names
from lavis.weights.tensors import LoadReport, load_tensors
from lavis.weights.trained import read_trained

if TYPE_CHECKING:
    from lavis.models.vlm import Vlm


def load_weights(model: Vlm, init: Sequence[Init] = ()) -> None:
    """Fill the tower and the connector from the files of their sections, put on the adapters, and load what `init`
    names over them. Afterwards nothing is on the meta device.

    Raises CheckpointError for a missing or wrong file.
    """
    filled = {name for part in (model.visual_encoder, model.connector) for name in _load_part(part)}
    if model.config.llm.weights:
        filled |= {name for name in model.state_dict() if name.startswith("llm_model.")}
    model.add_adapters()
    for item in init:
        filled |= set(load_initial(model, item, filled).loaded)


def _load_part(part: Any) -> tuple[str, ...]:
    if part is None:
        return ()
    report = part.load(part.config.weights) if part.config.weights else None
    part.complete()
    initialise(part)
    return report.loaded if report else ()


def initialise(module: nn.Module) -> None:
    """Give parameters that are still on the meta device the values that a new module has."""
    for inner in module.modules():
        if any(p.is_meta for p in inner.parameters(recurse=False)):
            inner.to_empty(device="cpu", recurse=False)
            inner.reset_parameters()


def load_initial(model: Vlm, init: Init, filled: set[str] | None = None) -> LoadReport:
    """Load what `init` names over `model`, strictly within its parts: every tensor of them that the source holds must
    fit, and the source must hold every one that has no value yet, that is, whose public name is not in `filled`.

    New adapters start as they are, unless the source holds adapters of that part: then all of them. Without parts, all
    that the source holds something of. Raises CheckpointError for what is missing or does not fit.
    """
    own = model.state_dict()
    tensors = _readable(model, init.source, own)
    parts = set(init.parts) or {model.part_of(name) for name in tensors if name in own}
    chosen = {name: t for name, t in tensors.items() if not init.parts or model.part_of(name) in parts}
    for part in sorted(parts):
        if not any(model.part_of(name) == part for name in chosen):
            held = ", ".join(sorted({model.part_of(name) for name in tensors})) or "nothing"
            raise CheckpointError(f"{init.source} holds nothing of the {part}, only of: {held}. Change init.parts.")
    adapted = {model.part_of(name) for name in chosen if ".lora_" in name}
    needed = {name for name in own if _is_needed(model.part_of(name), name, parts, adapted, filled or set())}
    return load_tensors(
        model,
        chosen,
        file=init.source,
        wanted=lambda name: name in chosen or name in needed,
        ignored=lambda name: name not in own and is_text_branch(name),
    )


def _readable(model: Vlm, source: str, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of `source` under the names that `model` has for them."""
    tensors = own_names(with_qwen2_names(read_trained(source), "llm_model.", keep=own.keys()))
    tensors = {_below_adapter(name, own): tensor for name, tensor in tensors.items()}
    return tensors if model.visual_encoder is None else model.visual_encoder.fit(tensors)


def _below_adapter(name: str, own: dict[str, torch.Tensor]) -> str:
    """The name of a weight where the model has put an adapter on it."""
    owner, _, leaf = name.rpartition(".")
    inner = f"{owner}.base_layer.{leaf}"
    return inner if name not in own and inner in own else name


def _is_needed(part: str, name: str, parts: set[str], adapted: set[str], filled: set[str]) -> bool:
    if part not in parts:
        return False
    return part in adapted if ".lora_" in name else name.replace(".base_layer.", ".") not in filled
