"""Batches: padding, positions, images, and an order that does not depend on the number of workers."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from lavis.config.schema import DataEntry
from lavis.core.types import IGNORE_INDEX, Batch, MediaRef, MediaSpan, Sample
from lavis.data.image import EvalImage, TrainImage
from lavis.data.loader import ImageFolder, TrainLoader, collate, eval_batches
from lavis.data.prepare import prepare
from lavis.data.sampler import StepPlan
from lavis.data.sources import FileSource
from lavis.data.table import PreparedTable
from lavis.tokens.template import ChatTemplate
from tests.data.data_toys import media

A = Sample((1, 2, 3), (IGNORE_INDEX, 2, 3), (MediaSpan(MediaRef("a"), 0, 1),))
B = Sample((4, 5), (IGNORE_INDEX, 5))


def test_collate_pads_on_the_right() -> None:
    pixels = torch.zeros(1, 3, 2, 2)
    batch = collate([[A], [B]], {"pixel_values": pixels}, pad_id=9, pack_length=None, bad_images=1)
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch.labels.tolist() == [[-100, 2, 3], [-100, 5, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch.pixel_values is pixels and batch.features is None
    assert (batch.supervised_tokens, batch.num_samples, batch.num_pad, batch.bad_images) == (3, 2, 1, 1)
    assert {t.dtype for t in (batch.input_ids, batch.labels, batch.position_ids)} == {torch.int64}


def test_collate_packs_with_the_padding_as_a_run_of_its_own() -> None:
    batch = collate([[A, B], [A]], {}, pad_id=9, pack_length=7)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 9, 9], [1, 2, 3, 9, 9, 9, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 0, 1, 2, 3]]
    assert (batch.supervised_tokens, batch.num_samples, batch.num_pad) == (5, 3, 6)


@pytest.mark.parametrize("pack", [None, 7])
def test_positions_that_are_learned_and_filled_are_known(pack: int | None) -> None:
    batch = collate([[A, B] if pack else [A], [A]], {}, pad_id=9, pack_length=pack)
    assert batch.predicting is not None and batch.placeholders is not None
    vectors, targets = batch.supervised(torch.arange(batch.labels.numel()).view(*batch.labels.shape, 1))
    wanted = batch.labels[:, 1:] != IGNORE_INDEX
    assert targets.tolist() == batch.labels[:, 1:][wanted].tolist() == ([2, 3, 5, 2, 3] if pack else [2, 3, 2, 3])
    assert vectors.squeeze(1).tolist() == batch.predicting.tolist() == ([0, 1, 3, 7, 8] if pack else [0, 1, 3, 4])
    assert batch.placeholders.tolist() == [0, batch.labels.shape[1]]


def test_bad_images_become_blank_counted_and_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (9, 9), "red").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    paths = [str(tmp_path / name) for name in ("bad.png", "good.png", "missing.png")]
    images = ImageFolder(EvalImage(4))
    for _ in range(2):
        pixels, bad = images.load(paths, 0)
        assert bad == 2
        assert [bool(p.any()) for p in pixels["pixel_values"]] == [False, True, False]
    assert len(caplog.records) == 2


@pytest.fixture
def table(cache: Path, tokenizer: PreTrainedTokenizerFast) -> PreparedTable:
    """40 rows; three quarters have an image, of which one file is missing."""
    rng = np.random.default_rng(0)
    (cache / "pictures").mkdir()
    rows: list[dict[str, Any]] = []
    for i in range(40):
        row = {"id": str(i), "instruction": "Hi " * int(rng.integers(1, 20)), "output": f"no {i}"}
        if i % 4:
            row["image"] = f"{i}.png"
            Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(cache / "pictures" / f"{i}.png")
        rows.append(row)
    (cache / "pictures" / "1.png").unlink()
    (cache / "rows.json").write_text(json.dumps(rows))
    template = ChatTemplate(tokenizer, media(2), max_length=200)
    entry = DataEntry(name="mine", path="rows.json", images="pictures")
    return prepare(FileSource(entry, "data.train.0", "train"), template)


def loader(
    table: PreparedTable,
    workers: int,
    *,
    batch_size: int = 2,
    accum: int = 2,
    world: int = 2,
    rank: int = 0,
    pack: int | None = None,
) -> TrainLoader:
    lengths = np.concatenate([table.lengths, table.lengths])
    plan = StepPlan(
        lengths,
        batch_size=batch_size,
        accum=accum,
        world_size=world,
        seed=3,
        length_grouping=True,
        pack_length=pack,
        dataset_sizes=[len(table)] * 2,
        ratios=None,
    )
    return TrainLoader([table, table], plan, ImageFolder(TrainImage(8)), 0, rank, workers, seed=3)


def assert_same(one: list[list[Batch]], other: list[list[Batch]]) -> None:
    assert len(one) == len(other) and all(len(a) == len(b) for a, b in zip(one, other, strict=True))
    for a, b in ((a, b) for step, step_b in zip(one, other, strict=True) for a, b in zip(step, step_b, strict=True)):
        for name in ("input_ids", "labels", "position_ids", "pixel_values"):
            x, y = getattr(a, name), getattr(b, name)
            assert x is y is None or torch.equal(x, y), name
        assert (a.supervised_tokens, a.num_samples, a.bad_images) == (b.supervised_tokens, b.num_samples, b.bad_images)


@pytest.mark.parametrize("pack", [None, 250])
def test_order_and_crops_do_not_depend_on_workers(table: PreparedTable, pack: int | None) -> None:
    alone, helped = loader(table, 0, pack=pack), loader(table, 2, pack=pack)
    for epoch in (0, 1):
        assert_same(list(alone.steps(epoch)), list(helped.steps(epoch)))


def test_starting_late_gives_the_tail_also_after_breaking_off(table: PreparedTable) -> None:
    helped = loader(table, 2)
    next(iter(helped.steps(0)))
    assert_same(list(helped.steps(0, start_step=4)), list(loader(table, 0).steps(0))[4:])
    assert all(len(step) == 2 for step in helped.steps(0, 2))


def test_a_step_has_the_same_images_however_it_splits(table: PreparedTable) -> None:
    def step_pixels(**split: int) -> list[float]:
        ranks = [loader(table, 0, **split, rank=rank) for rank in range(split["world"])]
        batches = [b for r in ranks for b in list(r.steps(1))[3]]
        return sorted(float(p.sum()) for b in batches if b.pixel_values is not None for p in b.pixel_values)

    assert step_pixels(batch_size=8, accum=1, world=1) == pytest.approx(step_pixels(batch_size=1, accum=4, world=2))


def test_crops_change_with_step_and_epoch(table: PreparedTable) -> None:
    images = ImageFolder(TrainImage(8))
    path = table.sample(2).images
    first, again, other = (images.load(path, seed)[0]["pixel_values"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_sees_every_sample_once_in_equal_numbers_of_batches(
    table: PreparedTable, tokenizer: PreTrainedTokenizerFast, world: int
) -> None:
    template = ChatTemplate(tokenizer, media(2), max_length=200)
    images = ImageFolder(EvalImage(8))
    ranks = [list(eval_batches(table, images, template.pad_token_id, 13, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [b for batches in ranks for b in batches]
    assert sum(b.num_samples for b in batches) == 40
    assert sum(b.supervised_tokens for b in batches) == table.supervised_tokens.sum()
    assert sum(len(b.pixel_values) for b in batches if b.pixel_values is not None and b.num_samples) == 30
    empty = [b for b in batches if not b.num_samples]
    assert all((b.labels == IGNORE_INDEX).all() for b in empty)
    assert len(empty) == (2 if world == 3 else 0)


def test_what_is_told_of_positions_is_not_taken_for_other_ones(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = collate([[Sample((5, 6, 7, 8), (IGNORE_INDEX, 6, 7, 8))]], {}, 0, None)
    hidden = torch.arange(4.0)[None, :, None]
    assert batch.supervised(hidden)[1].tolist() == [6, 7, 8] and batch.known is batch
    assert pickle.loads(pickle.dumps(batch)).known.predicting is not None  # as a worker sends it
    changed = replace(batch, labels=torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 8]]))
    vectors, ids = changed.supervised(hidden)
    assert ids.tolist() == [8] and vectors.flatten().tolist() == [2] and changed.known.runs == ()
    assert changed.to("cpu").supervised(hidden)[1].tolist() == [8]
