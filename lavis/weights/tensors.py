"""Weight files into modules: every tensor is loaded, ignored by name on purpose, or the reason of an error."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lavis.core.errors import CheckpointError
from lavis.core.paths import resolve

log = logging.getLogger(__name__)


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
            f"weight file {str(path)!r} does not exist (looked for {file}). Put it there or fix the recipe."
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
    ignored: Callable[[str], bool] = lambda name: False,
    prefix: str = "",
    resized: Sequence[str] = (),
) -> LoadReport:
    """Copy `tensors` into `module`, in place; parameters on the meta device become real ones.

    `wanted(name)` says which of the module's own tensors must come from the file; `ignored(name)` which of the file's
    others are left out on purpose. prefix: begins the module's names in the file. Raises CheckpointError listing what
    is missing, unexpected or of another shape; nothing is copied then.
    """
    own = {prefix + k: v for k, v in module.state_dict().items() if wanted(prefix + k)}
    check_fit(file, {k: v.shape for k, v in own.items()}, {k: v.shape for k, v in tensors.items()}, ignored)
    real = {k: tensors[k].to(target.dtype) for k, target in own.items() if target.is_meta}
    module.load_state_dict({k.removeprefix(prefix): t for k, t in real.items()}, strict=False, assign=True)
    with torch.no_grad():
        for name in own.keys() - real.keys():
            own[name].copy_(tensors[name])
    report = LoadReport(str(file), tuple(sorted(own)), tuple(sorted(tensors.keys() - own.keys())), tuple(resized))
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
