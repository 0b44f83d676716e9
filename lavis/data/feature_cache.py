"""Vectors of images, computed once by the frozen image encoder and kept in a memory-mapped file."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from lavis.core.dist import World
from lavis.core.errors import DataError
from lavis.core.paths import cache_root
from lavis.data.loader import ImageFolder, Pixels

log = logging.getLogger(__name__)


class ImageEncoder(Protocol):
    """A model that turns tiles into vectors which its training does not change."""

    training: bool

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[T, 3, S, S] -> [T, Q, D]."""

    def encoder_tensors(self) -> dict[str, torch.Tensor]:
        """What `encode_images` uses, by name."""

    def train(self, mode: bool = True) -> object:
        """As nn.Module's."""


class CachedFeatures:
    """An image source that gives `features` [T, Q, D] float32 instead of pixels.

    tiles: path of an image to how many rows of the file are its own, in the file's order.
    bad: images that could not be read when it was made.
    """

    def __init__(self, file: Path, tiles: Mapping[str, int], bad: int) -> None:
        self.file, self.bad = file, bad
        ends = np.cumsum(list(tiles.values())).tolist()
        self.rows = {path: range(end - n, end) for (path, n), end in zip(tiles.items(), ends, strict=True)}

    def load(self, paths: Sequence[str], seed: int, tiles: Sequence[int] | None = None) -> tuple[Pixels, int]:
        """Features of `paths` in order, and 0 bad images (they are counted in `bad`).

        Raises DataError where an image has other tiles than when the data was prepared.
        """
        rows = [self.rows[path] for path in paths]
        for path, own, count in zip(paths, rows, tiles or map(len, rows), strict=False):
            if len(own) != count:
                raise DataError(
                    f"{path} has {len(own)} tiles now, but had {count} when the data was prepared: put the image back,"
                    " or delete cache/prepared so that the data is prepared again."
                )
        table = np.load(self.file, mmap_mode="r")
        features = torch.from_numpy(table[[i for own in rows for i in own]])
        return {"features": features, "tiles": tuple(map(len, rows))}, 0


def cache_features(
    model: ImageEncoder, paths: Sequence[str], images: ImageFolder, processor: str, world: World, batch_size: int = 64
) -> CachedFeatures:
    """The vectors of every tile of every image in `paths` by `model`'s frozen encoder, from cache/features if they are
    there already.

    `images` reads them, with the settings that `processor` describes. The cache's name is a hash of the encoder's
    weights, of these settings and of every file's path, size and time of change, so that a changed image or encoder is
    encoded again.
    """
    unique = sorted(set(paths))
    folder = cache_root() / "features"
    file = folder / f"{_fingerprint(model, unique, processor)}.npy"
    with world.local_main_first():
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _encode(model, unique, images, file, world.device, batch_size)
    made = json.loads(file.with_suffix(".json").read_text())
    return CachedFeatures(file, dict(zip(unique, made["tiles"], strict=True)), made["bad"])


def _encode(
    model: ImageEncoder, paths: list[str], images: ImageFolder, file: Path, device: torch.device, batch_size: int
) -> None:
    started = time.perf_counter()
    temp = file.with_suffix(f".{os.getpid()}.tmp")
    tiles = [images.num_tiles(path) for path in paths]
    table = None
    training = model.training
    model.train(False)
    bad = row = 0
    for chunk, counts in _batches(paths, tiles, batch_size):
        loaded, missing = images.load(chunk, 0, counts)
        bad += missing
        features = model.encode_images(loaded["pixel_values"].to(device)).float().cpu().numpy()
        if table is None:  # the first ones tell the shape
            shape = (sum(tiles), *features.shape[1:])
            table = np.lib.format.open_memmap(temp, mode="w+", dtype=np.float32, shape=shape)
        table[row : row + len(features)] = features
        row += len(features)
    if table is None:
        np.save(temp.open("wb"), np.zeros((0, 0, 0), np.float32))
    else:
        table.flush()
    file.with_suffix(".json").write_text(json.dumps({"images": len(paths), "bad": bad, "tiles": tiles}))
    temp.replace(file)  # at the end, and whole: a run that was killed leaves nothing that looks finished
    model.train(training)
    log.info("encoded %d images in %.1f s (%d could not be read)", len(paths), time.perf_counter() - started, bad)


def _batches(paths: Sequence[str], tiles: Sequence[int], most: int) -> Iterator[tuple[list[str], list[int]]]:
    """Images with their tiles, at most `most` tiles at a time unless one image has more."""
    chunk: list[str] = []
    counts: list[int] = []
    for path, count in zip(paths, tiles, strict=True):
        if chunk and sum(counts) + count > most:
            yield chunk, counts
            chunk, counts = [], []
        chunk.append(path)
        counts.append(count)
    if chunk:
        yield chunk, counts


def _fingerprint(model: ImageEncoder, paths: list[str], processor: str) -> str:
    # The weights themselves count, not the name of their file: a file of the same name may hold others.
    digest = hashlib.sha256(b"2")  # raised when the same images would give another file
    for name, tensor in sorted(model.encoder_tensors().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    digest.update(processor.encode())
    for path in paths:
        info = os.stat(path) if os.path.exists(path) else None
        digest.update(json.dumps([path, info and info.st_size, info and info.st_mtime_ns]).encode())
    return digest.hexdigest()[:24]
