"""Weight files into modules: every tensor is loaded, ignored by name on purpose, or the reason of an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lavis.common.errors import CheckpointError
from lavis.common.paths import resolve
from lavis.models.configs import VisionConfig

TOWER_PREFIXES = ("visual_encoder.", "ln_vision.", "query_tokens", "Qformer.")
"""Names of what makes an image's query vectors."""
_NOT_TOWER = r"(llm_model|llm_proj|llm_projection|t5_model|t5_proj|opt_model|opt_proj|itm_head|vision_proj|text_proj)\.|temp$|text_embeddings\."
_TEXT_BRANCH = r"Qformer\.(cls|bert\.cls|bert\.embeddings\.(word|position)_embeddings|bert\.embeddings\.position_ids)|Qformer\..*layer\.\d+\.(intermediate|output)\."
_QFORMER_RENAMES = (
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "Qformer.layernorm."),
    (r"^Qformer\.bert\.encoder\.", "Qformer.encoder."),
    (r"\.(attention|crossattention)\.self\.", r".\1.attention."),
)


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of a .pth/.pt/.bin pickle read without running anything in it.

    A pickle's `{"model": {...}}` wrapping is taken off. Raises CheckpointError naming the file.
    """
    file = resolve(path)
    if not file.is_file():
        raise CheckpointError(f"weight file {str(path)!r} does not exist (looked for {file}). Put it there or mend the recipe.")
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as f:
                return {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 - safe_open is no mapping
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError, OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{file} can't be read (truncated, or no weight file): {error}") from error
    except Exception as error:  # torch raises pickle.UnpicklingError, a plain Exception, for what it refuses to run
        raise CheckpointError(f"{file} holds more than tensors, which was not loaded: {str(error).splitlines()[0]}") from error
    content = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise CheckpointError(f"{file} holds no dict of tensors: is it a weight file?")
    return content


def write_tensors(tensors: Mapping[str, torch.Tensor], file: Path, dtype: torch.dtype) -> Path:
    """Write `tensors` to the safetensors `file`, floating ones as `dtype`; the file appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temp = file.with_suffix(".tmp")
    ready = {k: (v.to(dtype) if v.is_floating_point() else v).cpu().contiguous() for k, v in tensors.items()}
    save_file(ready, temp, metadata={"format": "pt"})
    temp.replace(file)
    return file


def load_tensors(
    module: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    *,
    file: str | Path,
    wanted: Callable[[str], bool],
    ignored: Callable[[str], bool],
) -> None:
    """Copy `tensors` into `module`, in place.

    `wanted(name)` says which of the module's own tensors must come from the file; `ignored(name)` which of the file's others are
    left out on purpose. Raises CheckpointError listing what is missing, unexpected or of another shape; nothing is copied then.
    """
    own = {k: v for k, v in module.state_dict().items() if wanted(k)}
    missing = sorted(own.keys() - tensors.keys())
    unexpected = sorted(k for k in tensors.keys() - own.keys() if not ignored(k))
    wrong = [
        f"{k}: {list(tensors[k].shape)} in the file, {list(own[k].shape)} in the model"
        for k in sorted(own.keys() & tensors.keys())
        if tensors[k].shape != own[k].shape
    ]
    problems = [
        f"{what}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(f"{file} does not fit the model; tensors " + "; tensors ".join(problems) + ".")
    with torch.no_grad():
        for name, target in own.items():
            target.copy_(tensors[name])


def load_configured(model: nn.Module, config: VisionConfig) -> None:
    """Load the weight files that `config` names. Raises CheckpointError for a missing or wrong one."""
    if config.load_pretrained and config.pretrained:
        load_tower(model, config.pretrained, config.vit_pretrained)
    elif config.load_pretrained and config.vit_pretrained:
        own = {k for k in model.state_dict() if k.startswith("visual_encoder.")}
        tensors = _vit_tensors(model, config.vit_pretrained)
        load_tensors(model, tensors, file=config.vit_pretrained, wanted=lambda k: k in own, ignored=lambda k: False)
    if config.load_finetuned and config.finetuned:
        load_finetuned(model, config.finetuned)


def load_tower(model: nn.Module, pretrained: str, vit_pretrained: str | None = None) -> None:
    """Load the vision tower and Q-Former from `pretrained`: this program's names, or the original BLIP-2 file's.

    `vit_pretrained` gives the ViT when `pretrained` has none. The text branch and other models' heads are ignored by name,
    unless the model has them.
    """
    tensors = {_qformer_name(k): v for k, v in read_tensors(pretrained).items()}
    if vit_pretrained:
        tensors |= _vit_tensors(model, vit_pretrained)
    own = model.state_dict().keys()

    def ignored(name: str) -> bool:
        return re.match(_NOT_TOWER, name) is not None or (name not in own and re.match(_TEXT_BRANCH, name) is not None)

    load_tensors(model, tensors, file=pretrained, wanted=lambda k: k.startswith(TOWER_PREFIXES), ignored=ignored)


def load_finetuned(model: nn.Module, finetuned: str) -> None:
    """Load what a run trained (its trainable.safetensors, or a projection's model.pth) over `model`.

    The file may hold any part of the model; it must hold every trainable tensor, and nothing the model lacks.
    """
    tensors = read_tensors(finetuned)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    load_tensors(
        model, tensors, file=finetuned, wanted=lambda k: k in trainable or k in tensors, ignored=lambda k: False
    )


def _qformer_name(name: str) -> str:
    for pattern, replacement in _QFORMER_RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _vit_tensors(model: nn.Module, vit_pretrained: str) -> dict[str, torch.Tensor]:
    # The file has one block more than BLIP-2 uses, and a head and final norm that it does not use.
    own = model.state_dict().keys()
    renamed = {f"visual_encoder.{k}": v for k, v in read_tensors(vit_pretrained).items()}
    return {k: v for k, v in renamed.items() if k in own}
