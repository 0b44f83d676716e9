"""Tiles equal those of transformers' processors, pixel by pixel, for pictures of every shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from lavis.data.image import CLIP_MEAN, EvalImage
from lavis.data.tiles import Tiling, anyres, anyres_grids, tiles

SIDE = 14
SIZES = [(14, 14), (40, 14), (13, 90), (100, 61), (61, 100), (28, 29), (300, 20), (5, 5), (64, 48), (1, 7)]


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize("max_tiles", [1, 4, 6, 12])
def test_the_grid_is_internvls_for_every_size(max_tiles: int) -> None:
    for width in range(1, 120, 7):
        for height in range(1, 120, 5):
            columns, rows = get_optimal_tiled_canvas((height, width), (SIDE, SIDE), 1, max_tiles)
            cut = tiles((width, height), SIDE, max_tiles)[0]
            assert cut.canvas == cut.scaled == (SIDE * columns, SIDE * rows), (width, height)
            assert len(cut.boxes) == columns * rows <= max_tiles


@pytest.mark.parametrize("max_tiles", [1, 6])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_equal_got_ocr2s(size: tuple[int, int], max_tiles: int) -> None:
    stock = GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=max_tiles)
    expected = stock(noise(size), return_tensors="pt")["pixel_values"]
    processor = EvalImage(SIDE, tiling="tiles", max_tiles=max_tiles)
    found = processor.tiles(noise(size))
    assert len(found) == processor.num_tiles(size)
    torch.testing.assert_close(found, expected.reshape(found.shape).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("max_tiles", [1, 4, 6])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_equal_llava_nexts(size: tuple[int, int], max_tiles: int) -> None:
    stock = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[[SIDE * rows, SIDE * columns] for columns, rows in anyres_grids(max_tiles)],
    )
    expected = stock(noise(size), return_tensors="pt")["pixel_values"][0]
    processor = EvalImage(SIDE, tiling="anyres", max_tiles=max_tiles)
    found = processor.tiles(noise(size))
    assert len(found) == processor.num_tiles(size)
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-5)


def test_boxes_cover_the_canvas_once_in_reading_order() -> None:
    for size in SIZES:
        for view in (*tiles(size, SIDE, 6), *anyres(size, SIDE, 6)):
            covered = np.zeros(view.canvas[::-1], int)
            for left, top, right, bottom in view.boxes:
                covered[top:bottom, left:right] += 1
            assert (covered == 1).all()
            assert list(view.boxes) == sorted(view.boxes, key=lambda box: (box[1], box[0]))


def test_the_whole_picture_is_first_with_anyres_and_last_with_tiles() -> None:
    whole = EvalImage(SIDE)(noise((90, 30)))
    assert torch.equal(EvalImage(SIDE, tiling="anyres").tiles(noise((90, 30)))[0], whole)
    assert torch.equal(EvalImage(SIDE, tiling="tiles").tiles(noise((90, 30)))[-1], whole)
    assert Tiling("none", SIDE, 6).count((1000, 10)) == 1


@pytest.mark.parametrize("size", [(20, 8), (8, 20), (9, 9), (21, 8)])
def test_pad_is_llavas(size: tuple[int, int]) -> None:
    """LLaVA's expand2square: the picture in the middle of a square of the mean colour, then resized."""
    width, height = size
    side, image = max(size), noise(size)
    square = Image.new("RGB", (side, side), tuple(int(x * 255) for x in CLIP_MEAN))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    assert torch.equal(EvalImage(16, resize="pad")(image), EvalImage(16)(square))
