"""timm's ViTs by name, and how large they are."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import timm
import torch

from lavis.core.errors import ConfigError


class Dimensions(NamedTuple):
    """Sizes of a ViT, and the mean and deviation of RGB it was trained with; `prefix`: class token and registers,
    `patches`: vectors of a picture without them.
    """

    width: int
    depth: int
    image_size: int
    patches: int
    prefix: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@functools.lru_cache(maxsize=32)
def dimensions(model: str, image_size: int | None) -> Dimensions:
    """Sizes of timm's `model` for pictures of `image_size` (None: its own). Raises ConfigError if it is no such ViT."""
    with torch.device("meta"):
        vit = create(model, image_size)
    height, width = vit.patch_embed.grid_size
    size = vit.patch_embed.img_size[0]
    patches, trained = height * width, vit.pretrained_cfg
    return Dimensions(
        vit.embed_dim, len(vit.blocks), size, patches, vit.num_prefix_tokens, trained["mean"], trained["std"]
    )


def create(model: str, image_size: int | None, **settings: Any) -> Any:
    """timm's `model`, without a head. Raises ConfigError if there is no ViT of that name and size."""
    size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        vit = timm.create_model(model, num_classes=0, **size, **settings)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"model.tower: timm cannot make {model!r} at {image_size} pixels: {error}") from error
    if not all(hasattr(vit, part) for part in ("blocks", "patch_embed", "num_prefix_tokens", "forward_intermediates")):
        raise ConfigError(
            f"model.tower: {model!r} of timm is no ViT (a {type(vit).__name__}): choose a vit_*, eva* or beit*."
        )
    return vit
