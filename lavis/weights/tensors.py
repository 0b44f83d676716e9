"""Weight files into modules: every tensor is loaded, ignored by name on purpose, or the reason of an error."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

from lavis.core.errors import CheckpointError
from lavis.core.paths import resolve
from lavis.models.configs import VisionConfig
from lavis.weights.qwen1_format import with_qwen2_names

log = logging.getLogger(__name__)

TOWER_PREFIXES = ("visual_encoder.", "ln_vision.", "query_tokens", "Qformer.")
"""Names of what makes an image's query vectors."""
_NOT_TOWER = (
    r"(llm_model|llm_proj|llm_projection|t5_model|t5_proj|opt_model|opt_proj|itm_head|vision_proj|text_proj)\."
    r"|temp$|text_embeddings\."
)
_TEXT_BRANCH = (
    r"Qformer\.(cls|bert\.cls|bert\.embeddings\.(word|position)_embeddings|bert\.embeddings\.position_ids)"
    r"|Qformer\..*layer\.\d+\.(intermediate|output)\."
)
_VIT_REST = r"visual_encoder\.(norm|fc_norm|head)\."
_POS_EMBED = "visual_encoder.pos_embed"
_QFORMER_RENAMES = (
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "Qformer.layernorm."),
    (r"^Qformer\.bert\.encoder\.", "Qformer.encoder."),
    (r"\.(attention|crossattention)\.self\.", r".\1.attention."),
)


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a weight file, by name. Whatever is missing or unexpected is an error instead."""

    file: str
    loaded: tuple[str, ...]
    ignored: tuple[str, ...]
    resized: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.file}: {len(self.loaded)} tensors loaded ({_grouped(self.loaded)})"
        text += f", {len(self.ignored)} left out on purpose ({_grouped(self.ignored)})" if self.ignored else ""
        return text + (f", resized: {', '.join(self.resized)}" if self.resized else "")


def _grouped(names: Iterable[str]) -> str:
    """Tensor names by their first part, with counts: "Qformer 214, ln_vision 2"."""
    return ", ".join(f"{part} {n}" for part, n in Counter(name.split(".")[0] for name in names).items())


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of a .pth/.pt/.bin pickle read without running anything in it.

    They are mapped from the file: a page takes memory once it is read. A pickle's `{"model": {...}}` wrapping is taken
    off. Raises CheckpointError naming the file.
    """
    file = resolve(path)
    if not file.is_file():
        raise CheckpointError(
            f"weight file {str(path)!r} does not exist (looked for {file}). Put it there or mend the recipe."
        )
    with reading(file):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as f:
                return {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 - safe_open is no mapping
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    content = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise CheckpointError(f"{file} holds no dict of tensors: is it a weight file?")
    return content


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Whatever goes wrong inside while `file` is read becomes a CheckpointError that names it."""
    try:
        yield
    except (SafetensorError, RuntimeError, OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{file} can't be read (truncated, or no weight file): {error}") from error
    except Exception as error:  # torch raises pickle.UnpicklingError, a plain Exception, for what it refuses to run
        raise CheckpointError(
            f"{file} holds more than tensors, which was not loaded: {str(error).splitlines()[0]}"
        ) from error


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
) -> LoadReport:
    """Copy `tensors` into `module`, in place; parameters on the meta device become real ones.

    `wanted(name)` says which of the module's own tensors must come from the file; `ignored(name)` which of the file's
    others are
    left out on purpose. A position embedding of another image size is resized. Raises CheckpointError listing what is
    missing,
    unexpected or of another shape; nothing is copied then.
    """
    tensors, resized = _with_resized_positions(module, tensors)
    own = {k: v for k, v in module.state_dict().items() if wanted(k)}
    check_fit(file, {k: v.shape for k, v in own.items()}, {k: v.shape for k, v in tensors.items()}, ignored)
    real = {k: tensors[k].to(target.dtype) for k, target in own.items() if target.is_meta}
    module.load_state_dict(real, strict=False, assign=True)
    with torch.no_grad():
        for name in own.keys() - real.keys():
            own[name].copy_(tensors[name])
    report = LoadReport(str(file), tuple(sorted(own)), tuple(sorted(tensors.keys() - own.keys())), resized)
    log.info("%s", report)
    return report


def check_fit(
    file: str | Path, own: Mapping[str, torch.Size], found: Mapping[str, torch.Size], ignored: Callable[[str], bool]
) -> None:
    """Raise CheckpointError listing what `file` lacks, has too much (unless `ignored`) or in another shape; `own` and
    `found`: name to shape.
    """
    missing = sorted(own.keys() - found.keys())
    unexpected = sorted(k for k in found.keys() - own.keys() if not ignored(k))
    wrong = [
        f"{k}: {list(found[k])} in the file, {list(own[k])} in the model"
        for k in sorted(own.keys() & found.keys())
        if found[k] != own[k]
    ]
    problems = [
        f"{what}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(f"{file} does not fit the model; tensors " + "; tensors ".join(problems) + ".")


def _with_resized_positions(
    module: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> tuple[Mapping[str, torch.Tensor], tuple[str, ...]]:
    """`tensors` with the ViT's position embedding [1, 1 + g*g, D] resized to the module's grid (bicubic, the class
    position as it is).
    """
    own, given = module.state_dict().get(_POS_EMBED), tensors.get(_POS_EMBED)
    if own is None or given is None or own.shape == given.shape or own.shape[-1] != given.shape[-1]:
        return tensors, ()
    side = round((own.shape[1] - 1) ** 0.5)
    return {**tensors, _POS_EMBED: resample_abs_pos_embed(given, [side, side], antialias=False)}, (_POS_EMBED,)


def load_configured(model: nn.Module, config: VisionConfig, add_adapters: Callable[[], None] | None = None) -> None:
    """Load the weight files that `config` names; after that nothing is on the meta device. Raises CheckpointError for a
    missing or wrong one.

    `add_adapters` puts LoRA adapters on the loaded parts, before what was trained is loaded over them.
    """
    if config.load_pretrained and config.vit_pretrained:
        load_vit(model, config.vit_pretrained)
    if config.load_pretrained and config.pretrained:
        load_tower(model, config.pretrained, with_vit=not config.vit_pretrained)
    # the one thing that is in no file: always zero
    vit: Any = model.visual_encoder
    for attention in (block.attn for block in vit.blocks):
        attention.k_bias = torch.zeros_like(attention.k_bias, device=attention.qkv.weight.device)
    if add_adapters is not None:
        add_adapters()
    if config.load_finetuned and config.finetuned:
        load_finetuned(model, config.finetuned)


def load_vit(model: nn.Module, vit_pretrained: str) -> LoadReport:
    """Load the ViT from a file of its own (eva_vit_g.pth), bare names.

    Blocks beyond the model's, the last norm and the head are left out.
    """
    tensors = {f"visual_encoder.{k}": v for k, v in read_tensors(vit_pretrained).items()}
    vit: Any = model.visual_encoder

    def ignored(name: str) -> bool:
        block = re.match(r"visual_encoder\.blocks\.(\d+)\.", name)
        return int(block[1]) >= len(vit.blocks) if block else re.match(_VIT_REST, name) is not None

    return load_tensors(
        model, tensors, file=vit_pretrained, wanted=lambda k: k.startswith("visual_encoder."), ignored=ignored
    )


def load_tower(model: nn.Module, pretrained: str, *, with_vit: bool = True) -> LoadReport:
    """Load the Q-Former, and the ViT unless `with_vit` is false, from `pretrained`: this program's names, or the
    original BLIP-2 file's.

    The text branch and other models' heads are ignored by name, unless the model has them.
    """
    tensors = {_qformer_name(k): v for k, v in read_tensors(pretrained).items()}
    prefixes = TOWER_PREFIXES if with_vit else TOWER_PREFIXES[1:]
    own = model.state_dict().keys()

    def ignored(name: str) -> bool:
        elsewhere = re.match(_NOT_TOWER, name) or (not with_vit and name.startswith("visual_encoder."))
        return bool(elsewhere or (name not in own and re.match(_TEXT_BRANCH, name)))

    return load_tensors(model, tensors, file=pretrained, wanted=lambda k: k.startswith(prefixes), ignored=ignored)


def load_finetuned(model: nn.Module, finetuned: str) -> LoadReport:
    """Load what a run trained (trainable.safetensors, a projection's model.pth, the original's full dict) over `model`.

    The file may hold any part of the model; it must hold every trainable tensor, and nothing the model lacks.
    """
    own = model.state_dict().keys()
    tensors = {
        _qformer_name(k): v for k, v in with_qwen2_names(read_tensors(finetuned), "llm_model.", keep=own).items()
    }
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    return load_tensors(
        model,
        tensors,
        file=finetuned,
        wanted=lambda k: k in trainable or k in tensors,
        ignored=lambda k: k not in own and re.match(_TEXT_BRANCH, k) is not None,
    )


def _qformer_name(name: str) -> str:
    for pattern, replacement in _QFORMER_RENAMES:
        name = re.sub(pattern, replacement, name)
    return name
