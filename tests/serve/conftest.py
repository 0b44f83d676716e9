"""The shapes model that is included, its engine, and pictures of the shapes world drawn for a test."""

from __future__ import annotations

import io
import time

import pytest
from PIL import Image

from lavis.data.shapes.scene import render, sample_scene
from lavis.generation.engine import Engine
from lavis.generation.pictures import read_picture
from lavis.serve.load import load_chat


@pytest.fixture(scope="session")
def chat():
    return load_chat(model_type="shapes")


@pytest.fixture
def engine(chat):
    engine = Engine(chat)
    yield engine
    engine.close()


def png(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def scene_png(seed: int) -> bytes:
    """A PNG file of the shapes world."""
    return png(render(sample_scene(f"chat/{seed}")))


@pytest.fixture(scope="session")
def pictures():
    return [read_picture(scene_png(seed), f"{seed}.png") for seed in range(8)]


def is_idle(engine: Engine, seconds: float = 10) -> bool:
    """Whether nothing is answered or waits, within `seconds`."""
    until = time.monotonic() + seconds
    while engine.load != (0, 0) and time.monotonic() < until:
        time.sleep(0.05)
    return engine.load == (0, 0)
