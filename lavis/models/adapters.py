"""LoRA adapters: where they go, and what becomes of them afterwards."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lavis.core.errors import ConfigError
from lavis.models.parts import LoraSettings

_ATTENTION = re.compile(r"(^|\.)\w*(attn|attention)\w*\.")
"""Names of layers inside an attention module, in transformers and timm alike."""


def add_lora(module: nn.Module, settings: LoraSettings, whole_name: Callable[[str], str] = str) -> None:
    """Put trainable LoRA adapters (peft) in fp32 on the layers of `module` that `settings` names; all else is frozen.

    Their first values follow from torch's seed and the names that `whole_name` says they have in the whole model: the
    same however the model is cut into stages. Raises ConfigError if no layer is named.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft computes with fractions too
        lora_dropout=settings.dropout,
        target_modules=lora_targets(module, settings.targets),
        bias="none",
    )
    inject_adapter_in_model(config, module)
    for p in module.parameters():
        if p.requires_grad:
            p.data = p.data.float()  # what is trained is fp32, whatever the type of the frozen weights
    for name, p in module.named_parameters():
        if ".lora_A." in name and not p.is_meta:
            seed = torch.initial_seed() ^ zlib.crc32(whole_name(name).encode())
            values = torch.empty(p.shape)  # as peft begins: A at random, B zero
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))
            p.data.copy_(values)


def lora_targets(module: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Names of the Linear layers of `module` that get adapters: `linear` is all but the output head, `attention` those
    inside attention modules, a list the endings of names. Raises ConfigError if there is none.
    """
    head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
    layers = [name for name, m in module.named_modules() if isinstance(m, nn.Linear) and m is not head]
    if targets == "attention":
        chosen = [name for name in layers if _ATTENTION.search(name)]
    elif targets == "linear":
        chosen = layers
    else:
        endings = tuple(f".{ending}" for ending in ([targets] if isinstance(targets, str) else targets))
        chosen = [name for name in layers if f".{name}".endswith(endings)]
    if not chosen:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in layers})) or "none"
        raise ConfigError(f"lora.targets {targets!r} names no layer of {type(module).__name__}. Layers: {known}.")
    return chosen


def merge_lora(model: nn.Module) -> None:
    """Add the LoRA adapters of `model` to the weights they belong to, and take them out."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in layers:
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
