"""Image processors: a PIL image to normalised float tensors, one for each of its tiles.

No processor flips images: a question about left and right would become wrong. PIL and numpy do the work, as importing
torchvision would cost every worker a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps

from lavis.config.schema import ProcessorConfig
from lavis.core.errors import ConfigError, DataError
from lavis.core.registries import PROCESSORS
from lavis.data.tiles import Box, Size, Tiling, View

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded: a small file can unfold to gigabytes."""

UNREADABLE = (OSError, ValueError, SyntaxError, DataError, Image.DecompressionBombError)
"""What opening a damaged, missing or huge image can raise."""
_TURNED = (5, 6, 7, 8)
"""EXIF orientations in which width and height are exchanged."""


def image_processor(config: ProcessorConfig) -> EvalImage:
    """The image processor that a recipe's section describes.

    Raises ConfigError if it names one of texts, or mean and std aren't of RGB.
    """
    processor = PROCESSORS.get(config.name)
    if not issubclass(processor, EvalImage):
        raise ConfigError(
            f"the processor {config.name!r} is not for images: name another one in vis_processor, such as"
            " blip2_image_eval."
        )
    for key in ("mean", "std"):
        values = getattr(config, key)
        if values is not None and len(values) != 3:
            raise ConfigError(f"vis_processor.{key} has {len(values)} values: give three, of red, green and blue.")
    return processor.from_config(config)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image upright (EXIF orientation applied) in RGB, transparency over white. Raises DataError if it is huge."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"the image has {width} x {height} pixels, more than {MAX_PIXELS:,}. Make it smaller.")
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def upright_size(path: str | Path) -> Size:
    """Size of the picture in a file after its EXIF orientation, by the header alone.

    Raises DataError or what PIL raises for a file that cannot be read.
    """
    with Image.open(path) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DataError(f"the image has {width} x {height} pixels, more than {MAX_PIXELS:,}. Make it smaller.")
        return (height, width) if image.getexif().get(0x0112) in _TURNED else (width, height)


def size_of(path: str | Path) -> Size | None:
    """`upright_size`, or None for a file that cannot be read."""
    try:
        return upright_size(path)
    except UNREADABLE:
        return None


@PROCESSORS.register("image_plain")
@PROCESSORS.register("blip_image_eval")
@PROCESSORS.register("blip2_image_eval")
@dataclass(frozen=True)
class EvalImage:
    """Bicubic resize to squares of `image_size` pixels, then (x - mean) / std per channel.

    resize: `square` stretches the picture; `pad` makes it a square first, with the mean colour, as LLaVA does.
    tiling, max_tiles: see Tiling.
    """

    image_size: int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resize: str = "square"
    tiling: str = "none"
    max_tiles: int = 6
    deterministic: ClassVar[bool] = True

    @classmethod
    def from_config(cls, config: ProcessorConfig) -> EvalImage:
        """The processor that a recipe's section describes."""
        return cls(**_settings(config))

    @cached_property
    def _tiling(self) -> Tiling:
        return Tiling(self.tiling, self.image_size, self.max_tiles)

    @property
    def needs_size(self) -> bool:
        """Whether the number of tiles depends on the picture's size."""
        return self.tiling != "none"

    def num_tiles(self, size: Size) -> int:
        """Tiles of an upright picture of `size`."""
        return self._tiling.count(size)

    def tiling_key(self) -> tuple[object, ...]:
        """All that num_tiles depends on."""
        return (self.tiling, self.image_size, self.max_tiles) if self.needs_size else ()

    def __call__(self, image: Image.Image, generator: np.random.Generator | None = None) -> torch.Tensor:
        """The whole picture as one tile, float32 [3, image_size, image_size].

        Raises DataError or PIL's OSError for an image that cannot be decoded.
        """
        return self._to_tensor(self._squared(to_rgb(image)), None)

    def tiles(self, image: Image.Image, generator: np.random.Generator | None = None) -> torch.Tensor:
        """All tiles of a picture, float32 [num_tiles, 3, image_size, image_size]. Raises as a call does."""
        if not self.needs_size:
            return self(image, generator)[None]
        image = to_rgb(image)
        views = self._tiling.views(image.size)
        return torch.stack([self._normalised(tile) for view in views for tile in _cut(image, view)])

    def _squared(self, image: Image.Image) -> Image.Image:
        """With `pad`, the picture in the middle of a square of the mean colour."""
        width, height = image.size
        if self.resize != "pad" or width == height:
            return image
        side = max(width, height)
        square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in self.mean))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        return square

    def _to_tensor(self, image: Image.Image, box: Box | None) -> torch.Tensor:
        size = (self.image_size, self.image_size)
        if image.size != size or box is not None:
            image = image.resize(size, Image.Resampling.BICUBIC, box=box)
        return self._normalised(image)

    def _normalised(self, image: Image.Image) -> torch.Tensor:
        pixels = np.asarray(image, dtype=np.float32) / 255
        pixels = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


@PROCESSORS.register("blip2_image_train")
@dataclass(frozen=True)
class TrainImage(EvalImage):
    """A random crop of `min_scale` to `max_scale` of the area, aspect ratio 3/4 to 4/3, resized to the square."""

    min_scale: float = 0.5
    max_scale: float = 1.0
    deterministic: ClassVar[bool] = False

    @classmethod
    def from_config(cls, config: ProcessorConfig) -> TrainImage:
        """The processor that a recipe's section describes."""
        return cls(**_settings(config), min_scale=config.min_scale, max_scale=config.max_scale)

    def __call__(self, image: Image.Image, generator: np.random.Generator | None = None) -> torch.Tensor:
        """float32 [3, image_size, image_size]; the crop is drawn from `generator`."""
        image = self._squared(to_rgb(image))
        return self._to_tensor(image, self._crop(*image.size, generator or np.random.default_rng()))

    def _crop(self, width: int, height: int, generator: np.random.Generator) -> Box:
        """As torchvision's RandomResizedCrop: ten tries, then the whole image."""
        for _ in range(10):
            area = width * height * generator.uniform(self.min_scale, self.max_scale)
            ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
                return left, top, left + w, top + h
        return 0, 0, width, height


def _settings(config: ProcessorConfig) -> dict[str, Any]:
    """What every image processor takes from a section."""
    return {
        "image_size": config.image_size,
        "mean": tuple(config.mean or CLIP_MEAN),
        "std": tuple(config.std or CLIP_STD),
        "resize": config.resize,
        "tiling": config.tiling,
        "max_tiles": config.max_tiles,
    }


def _cut(image: Image.Image, view: View) -> Iterator[Image.Image]:
    scaled = image if image.size == view.scaled else image.resize(view.scaled, Image.Resampling.BICUBIC)
    if view.scaled != view.canvas:
        canvas = Image.new("RGB", view.canvas)
        canvas.paste(scaled, view.offset)
        scaled = canvas
    return (scaled.crop(box) for box in view.boxes)
