"""Samples to batches: images, padding, and the loaders of training and validation."""

from __future__ import annotations

import bisect
import itertools
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from lavis.core.types import IGNORE_INDEX, Batch, Sample, predicting
from lavis.data.image import UNREADABLE, EvalImage, upright_size
from lavis.data.sampler import Row, StepPlan
from lavis.data.table import PreparedTable

logger = logging.getLogger(__name__)
_JUDGED = 64
"""Samples of each table that are looked at for what all begin with."""
_WORTH = 8
"""Fewer tokens than this are read in each sample anew."""


class Pixels(TypedDict, total=False):
    """Pictures of a batch: `pixel_values` float32 [T, 3, S, S] or `features` float32 [T, Q, D], and which of the T
    tiles are whose (see Batch).
    """

    pixel_values: torch.Tensor
    features: torch.Tensor
    tiles: tuple[int, ...]


class ImageSource(Protocol):
    """Where batches get their images from."""

    def load(self, paths: Sequence[str], seed: int, tiles: Sequence[int] | None = None) -> tuple[Pixels, int]:
        """The images at `paths` (at least one) in order, and how many of them could not be read.

        tiles: for each image how many the samples have placeholders for; None: as many as it has.
        Anything random depends on `seed` and the path alone.
        """


class ImageFolder:
    """Reads image files and puts them through `processor`.

    A file that cannot be read, or has been changed so that its tiles are others, becomes an image of the mean colour
    (zeros after normalisation); each is logged once.
    """

    def __init__(self, processor: EvalImage) -> None:
        self.processor = processor
        self._logged: set[str] = set()

    def load(self, paths: Sequence[str], seed: int, tiles: Sequence[int] | None = None) -> tuple[Pixels, int]:
        """See ImageSource.

        Random crops depend on `seed` and the file's name, so that they are the same on every machine.
        """
        wanted: Sequence[int | None] = tiles or [None] * len(paths)
        images = [self._read(path, seed, count) for path, count in zip(paths, wanted, strict=True)]
        size = self.processor.image_size
        shown = [
            torch.zeros(count or 1, 3, size, size) if image is None else image
            for image, count in zip(images, wanted, strict=True)
        ]
        pixels: Pixels = {"pixel_values": torch.cat(shown), "tiles": tuple(map(len, shown))}
        return pixels, sum(image is None for image in images)

    def num_tiles(self, path: str) -> int:
        """Tiles of an image by its header; 1 for one that cannot be read."""
        try:
            return self.processor.num_tiles(upright_size(path)) if self.processor.needs_size else 1
        except UNREADABLE:
            return 1

    def _read(self, path: str, seed: int, count: int | None) -> torch.Tensor | None:
        generator = None
        if not self.processor.deterministic:
            generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(Path(path).name.encode())]))
        try:
            with Image.open(path) as image:
                tiles = self.processor.tiles(image, generator)
            if count is not None and len(tiles) != count:
                raise ValueError(f"it has {len(tiles)} tiles, not {count} as when the data was prepared")
            return tiles
        except UNREADABLE as error:
            if path not in self._logged:
                self._logged.add(path)
                logger.warning("image %s can't be read (%s); a blank one takes its place", path, error)
            return None


class NoImages:
    """For a process that needs ids and labels alone: opens nothing."""

    def load(self, paths: Sequence[str], seed: int, tiles: Sequence[int] | None = None) -> tuple[Pixels, int]:
        """See ImageSource; no pixels."""
        return {}, 0


def collate(
    samples: Sequence[Sequence[Sample]],
    images: Pixels,
    pad_id: int,
    pack_length: int | None,
    bad_images: int = 0,
    beginning: tuple[int, ...] = (),
) -> Batch:
    """Rows of samples to a Batch, padded on the right to `pack_length`, or without one to the longest row.

    images: `pixel_values` or `features` of all rows in reading order; empty when there is none. beginning: what all
    samples of the data begin with; the batch names it if all of its own do.
    Positions restart at 0 with each piece of each sample of a row. With `pack_length` so does the padding, which then
    is a run of its own that no sample attends to; without, it goes on counting.
    """
    lengths = [sum(map(len, row)) for row in samples]
    width = pack_length or max(lengths)
    shape = (len(samples), width)
    input_ids = torch.full(shape, pad_id)
    labels = torch.full(shape, IGNORE_INDEX)
    position_ids = torch.zeros(shape, dtype=torch.long)
    pieces: list[tuple[int, ...]] = []
    placeholders: list[int] = []
    for i, (row, length) in enumerate(zip(samples, lengths, strict=True)):
        input_ids[i, :length] = torch.tensor([t for s in row for t in s.input_ids])
        labels[i, :length] = torch.tensor([t for s in row for t in s.labels])
        # Where positions begin again at 0 another sample begins: attention finds the borders by that alone, so a packed
        # row needs no mask beside it, and padding that went on counting would belong to the last sample.
        pieces.append(tuple(n for s in row for n in s.runs))
        runs = list(pieces[-1])
        if pack_length:
            runs.append(width - length)
        else:
            runs[-1] += width - length
        position_ids[i] = torch.cat([torch.arange(n) for n in runs])
        begins = itertools.accumulate(map(len, row), initial=i * width)
        spans = [(begin + span.start, span.length) for begin, s in zip(begins, row, strict=False) for span in s.media]
        placeholders += [at for start, length in spans for at in range(start, start + length)]
    where = predicting(labels)
    return Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        supervised_tokens=len(where),
        num_samples=sum(map(len, samples)),
        lengths=tuple(lengths),
        bad_images=bad_images,
        **images,
    ).told(
        runs=tuple(pieces),
        beginning=beginning if all(_begins(s, beginning) for row in samples for s in row) else (),
        predicting=where,
        placeholders=torch.tensor(placeholders, dtype=torch.long),
    )


def _begins(sample: Sample, beginning: tuple[int, ...]) -> bool:
    n = len(beginning)
    return len(sample.runs) == 1 and len(sample) > n and sample.input_ids[:n] == beginning


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def common_beginning(tables: Sequence[PreparedTable]) -> tuple[int, ...]:
    """The ids that samples of all `tables` begin with, before any picture, judged by the first ones of each; empty if
    they are too few to be worth anything.
    """
    seen = [table.sample(i) for table in tables for i in range(min(len(table), _JUDGED))]
    found: tuple[int, ...] = seen[0].input_ids if seen else ()
    for sample in seen:
        until = min([len(sample) - 1, *(span.start for span in sample.media)])
        found = found[: min(until, _common(found, sample.input_ids))] if len(sample.runs) == 1 else ()
    return found if len(found) >= _WORTH else ()


class TrainLoader:
    """The batches of `rank` in the order of `plan`, the same for any number of workers.

    tables: the datasets whose lengths the plan was made of, in that order. pin: put batches where a GPU can
    copy them from by itself.
    """

    def __init__(
        self,
        tables: list[PreparedTable],
        plan: StepPlan,
        images: ImageSource,
        pad_id: int,
        rank: int,
        num_workers: int,
        seed: int,
        *,
        pin: bool = False,
    ) -> None:
        self._plan = plan
        self._order = _StepOrder(plan, rank, seed)
        self._loader = DataLoader(
            _MicroBatches(tables, images, pad_id, plan.pack_length, common_beginning(tables)),
            batch_size=None,
            sampler=self._order,
            collate_fn=_as_is,
            num_workers=num_workers,
            pin_memory=pin,
            persistent_workers=num_workers > 0,
            prefetch_factor=2 if num_workers else None,
        )

    def steps(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """From `start_step` of the epoch on, the micro-batches of each optimiser step."""
        self._order.begin(epoch, start_step)
        batches = iter(self._loader)
        for step in range(start_step, self._plan.steps_per_epoch):
            yield list(itertools.islice(batches, self._order.parts(epoch, step)))


class _Task(NamedTuple):
    rows: list[Row]
    seed: int


class _StepOrder(Sampler[_Task]):
    """What workers load, from a given step on."""

    def __init__(self, plan: StepPlan, rank: int, seed: int) -> None:
        self._plan, self._rank, self._seed = plan, rank, seed
        self.begin(0, 0)

    def begin(self, epoch: int, step: int) -> None:
        self._epoch, self._step = epoch, step

    def parts(self, epoch: int, step: int) -> int:
        """Micro-batches of a step."""
        plan = self._plan
        return len(plan.micro_batches(epoch, step, self._rank)) if plan.tokens else plan.accum

    def __iter__(self) -> Iterator[_Task]:
        for step in range(self._step, self._plan.steps_per_epoch):
            # of the step, not of the worker: crops are the same for any number of workers and after a resume
            seed = int(np.random.SeedSequence([self._seed, self._epoch, step]).generate_state(1)[0])
            yield from (_Task(rows, seed) for rows in self._plan.micro_batches(self._epoch, step, self._rank))


class _MicroBatches(Dataset[Batch]):
    """Tasks to batches. All it holds is memory-mapped or small, so workers cost little memory."""

    def __init__(
        self,
        tables: list[PreparedTable],
        images: ImageSource,
        pad_id: int,
        pack_length: int | None,
        beginning: tuple[int, ...],
    ) -> None:
        self._tables, self._images, self._pad_id, self._pack_length = tables, images, pad_id, pack_length
        self._beginning = beginning
        self._ends = list(itertools.accumulate(map(len, tables)))

    def __getitem__(self, task: _Task) -> Batch:
        samples = [[self._sample(i) for i in row] for row in task.rows]
        return load_batch(samples, self._images, self._pad_id, self._pack_length, task.seed, self._beginning)

    def _sample(self, index: int) -> Sample:
        table = bisect.bisect_right(self._ends, index)
        return self._tables[table].sample(index - (self._ends[table - 1] if table else 0))


def eval_batches(
    table: PreparedTable,
    images: ImageSource,
    pad_id: int,
    batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[Batch]:
    """Every sample of the table once over all ranks, in padded batches of like length.

    All ranks take an equal number of batches, as sharded models need: a rank without samples in the last round gets one
    sample
    without labels (`num_samples` 0).
    """
    order = np.argsort(table.lengths, kind="stable")
    for start in range(0, len(order), batch_size * world_size):
        mine = order[start : start + batch_size * world_size][rank::world_size].tolist()
        samples = [table.sample(i) for i in mine or [int(order[0])]]
        if not mine:
            samples = [replace(s, labels=(IGNORE_INDEX,) * len(s)) for s in samples]
        batch = load_batch([[s] for s in samples], images, pad_id)
        yield batch if mine else replace(batch, num_samples=0)


def load_batch(
    samples: Sequence[Sequence[Sample]],
    images: ImageSource,
    pad_id: int,
    pack_length: int | None = None,
    seed: int = 0,
    beginning: tuple[int, ...] = (),
) -> Batch:
    """`collate` with the images that the samples name, from `images`."""
    spans = [span for row in samples for sample in row for span in sample.media]
    if not spans:
        return collate(samples, {}, pad_id, pack_length, beginning=beginning)
    pixels, bad = images.load([span.ref.path for span in spans], seed, [span.tiles for span in spans])
    return collate(samples, pixels, pad_id, pack_length, bad, beginning)


def _as_is(batch: Any) -> Any:
    return batch
