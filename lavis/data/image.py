"""Image processors: a PIL image to a normalised float tensor.

No processor flips images: a question about left and right would become wrong. PIL and numpy do the work, as importing
torchvision would cost every worker a second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps

from lavis.config.schema import ProcessorConfig
from lavis.core.errors import ConfigError, DataError
from lavis.core.registries import PROCESSORS

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded: a small file can unfold to gigabytes."""

Box = tuple[int, int, int, int]


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


@PROCESSORS.register("image_plain")
@PROCESSORS.register("blip_image_eval")
@PROCESSORS.register("blip2_image_eval")
@dataclass(frozen=True)
class EvalImage:
    """Bicubic resize to a square of `image_size` pixels, then (x - mean) / std per channel."""

    image_size: int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    deterministic: ClassVar[bool] = True

    @classmethod
    def from_config(cls, config: ProcessorConfig) -> EvalImage:
        """The processor that a recipe's section describes."""
        return cls(config.image_size, tuple(config.mean or CLIP_MEAN), tuple(config.std or CLIP_STD))

    def __call__(self, image: Image.Image, generator: np.random.Generator | None = None) -> torch.Tensor:
        """float32 [3, image_size, image_size]. Raises DataError or PIL's OSError for an image that can't be decoded."""
        return self._to_tensor(to_rgb(image), None)

    def _to_tensor(self, image: Image.Image, box: Box | None) -> torch.Tensor:
        size = (self.image_size, self.image_size)
        if image.size != size or box is not None:
            image = image.resize(size, Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(image, dtype=np.float32) / 255
        pixels = (pixels - np.float32(self.mean)) / np.float32(self.std)
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
        base = EvalImage.from_config(config)
        return cls(base.image_size, base.mean, base.std, config.min_scale, config.max_scale)

    def __call__(self, image: Image.Image, generator: np.random.Generator | None = None) -> torch.Tensor:
        """float32 [3, image_size, image_size]; the crop is drawn from `generator`."""
        image = to_rgb(image)
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
