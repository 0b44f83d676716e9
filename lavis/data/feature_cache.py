"""Query vectors of images, computed once by the frozen tower and kept in a memory-mapped file."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lavis.core.dist import World
from lavis.core.paths import cache_root
from lavis.data.loader import ImageSource

log = logging.getLogger(__name__)


class CachedFeatures:
    """An image source that gives `features` [N, Q, D] float32 instead of pixels.

    `bad`: images that could not be read when it was made.
    """

    def __init__(self, file: Path, paths: Sequence[str], bad: int) -> None:
        self.file, self.bad = file, bad
        self.rows = {path: i for i, path in enumerate(paths)}

    def load(self, paths: Sequence[str], seed: int) -> tuple[dict[str, torch.Tensor], int]:
        """Features of `paths` in order, and 0 bad images (they are counted in `bad`)."""
        table = np.load(self.file, mmap_mode="r")
        return {"features": torch.from_numpy(table[[self.rows[p] for p in paths]])}, 0


def cache_features(
    model: Any, paths: Sequence[str], images: ImageSource, processor: str, world: World, batch_size: int = 64
) -> CachedFeatures:
    """The query vectors of every image in `paths` by `model`'s frozen tower, from cache/features if they are there
    already.

    `images` reads them, with the settings that `processor` describes. The cache's name is a hash of the tower's
    weights, of these
    settings and of every file's path, size and time of change, so a changed image or tower is encoded anew.
    """
    unique = sorted(set(paths))
    folder = cache_root() / "features"
    file = folder / f"{_fingerprint(model, unique, processor)}.npy"
    with world.local_main_first():
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _encode(model, unique, images, file, world.device, batch_size)
    return CachedFeatures(file, unique, json.loads(file.with_suffix(".json").read_text())["bad"])


def _encode(
    model: Any, paths: list[str], images: ImageSource, file: Path, device: torch.device, batch_size: int
) -> None:
    started = time.perf_counter()
    tower = model.config.tower
    vectors = model.config.connector.encoded(tower.span(), tower.width())
    shape = (len(paths), *vectors)
    temp = file.with_suffix(f".{os.getpid()}.tmp")
    table = np.lib.format.open_memmap(temp, mode="w+", dtype=np.float32, shape=shape)
    training = model.training
    model.eval()
    bad = 0
    for start in range(0, len(paths), batch_size):
        chunk = paths[start : start + batch_size]
        loaded, missing = images.load(chunk, 0)
        bad += missing
        table[start : start + len(chunk)] = model.encode_images(loaded["pixel_values"].to(device)).float().cpu().numpy()
    table.flush()
    file.with_suffix(".json").write_text(json.dumps({"images": len(paths), "bad": bad}))
    temp.replace(file)
    model.train(training)
    log.info("encoded %d images in %.1f s (%d could not be read)", len(paths), time.perf_counter() - started, bad)


def _fingerprint(model: Any, paths: list[str], processor: str) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.encoder_tensors().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    digest.update(processor.encode())
    for path in paths:
        info = os.stat(path) if os.path.exists(path) else None
        digest.update(json.dumps([path, info and info.st_size, info and info.st_mtime_ns]).encode())
    return digest.hexdigest()[:24]
