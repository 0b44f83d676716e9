"""Image processors: geometry, normalisation, orientation, transparency, determinism."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from lavis.config.schema import ProcessorConfig
from lavis.core.errors import ConfigError, DataError
from lavis.core.registries import PROCESSORS
from lavis.data import image as module
from lavis.data.image import CLIP_MEAN, CLIP_STD, EvalImage, TrainImage, image_processor, to_rgb


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["blip2_image_train", "blip2_image_eval", "blip_image_eval", "image_plain"])
def test_registered_processors_make_normalised_squares(name: str) -> None:
    processor = PROCESSORS.get(name).from_config(
        ProcessorConfig(name=name, image_size=16, mean=[0.5] * 3, std=[0.5] * 3)
    )
    pixels = processor(noise(40, 20), np.random.default_rng(0))
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert -1 <= pixels.min() < pixels.max() <= 1
    assert processor.deterministic == (name != "blip2_image_train")


def test_right_sized_images_are_only_normalised() -> None:
    image = noise(8, 8)
    expected = (
        torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255 - torch.tensor(CLIP_MEAN)[:, None, None]
    ) / torch.tensor(CLIP_STD)[:, None, None]
    assert torch.allclose(EvalImage(8)(image), expected, atol=1e-5)


def test_resize_equals_torchvision() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    reference = transforms.Compose(
        [
            transforms.Resize((24, 24), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    image = noise(60, 37)
    assert torch.allclose(EvalImage(24)(image), reference(image), atol=1e-5)


def test_crops_follow_the_generator_keep_their_scale_and_never_flip() -> None:
    processor = TrainImage(16, min_scale=0.5)
    image = noise(40, 30)
    first, again, other = (processor(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 6, dtype=np.uint8)[None, :, None], (30, 1, 3)))
    for seed in range(30):
        left, top, right, bottom = processor._crop(40, 30, np.random.default_rng(seed))
        assert 0 <= left < right <= 40 and 0 <= top < bottom <= 30
        assert (right - left) * (bottom - top) >= 0.45 * 40 * 30
        row = processor(ramp, np.random.default_rng(seed))[0, 8]
        assert row[0] < row[-1]


def test_orientation_transparency_and_modes() -> None:
    image = Image.new("RGB", (4, 2), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    assert to_rgb(Image.open(file)).size == (2, 4)
    assert to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("L", (1, 1), 7)).getpixel((0, 0)) == (7, 7, 7)


def test_huge_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", 100)
    with pytest.raises(DataError, match="11 x 10 pixels"):
        EvalImage(4)(Image.new("RGB", (11, 10)))


@pytest.mark.parametrize(
    ("config", "message"),
    [(ProcessorConfig(name="base_instruction"), "not for images"), (ProcessorConfig(mean=[0.5]), "mean has 1 values")],
)
def test_a_section_that_can_not_work_is_refused(config: ProcessorConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        image_processor(config)
