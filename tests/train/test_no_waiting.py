"""A step reads nothing of what lies on its device, so that a GPU is given its work ahead; and what is not finite still
ends the run.
"""

import traceback
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lavis.config.recipe import load_recipe
from lavis.core.dist import World
from lavis.core.errors import TrainingError
from lavis.core.types import IGNORE_INDEX, MediaRef, MediaSpan, Sample
from lavis.data.loader import collate
from lavis.objectives.blip2_stage1 import drawn
from lavis.objectives.learner import Learner
from lavis.objectives.sft import NextToken
from lavis.parallel.strategy import DataParallel, Ranks
from tests.models.conftest import IMAGE_ID, small_model

READS = (
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "multinomial"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"),
)
"""Operators whose result in Python, or whose result's shape, needs values of their inputs."""
MASKS = (torch.bool, torch.uint8)


class NoReading(TorchDispatchMode):
    """Fails where values of a tensor are read, or decide on a shape."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if "index" in name and isinstance(args[1], (list, tuple)) else ()
        if name in READS or any(isinstance(t, torch.Tensor) and t.dtype in MASKS for t in indices):
            raise AssertionError(f"{name} reads a tensor:\n{''.join(traceback.format_stack()[-8:])}")
        return func(*args, **(kwargs or {}))


def batches(seed):
    """Two micro-batches: pictures and text in padded rows, and text alone."""
    generator = torch.Generator().manual_seed(seed)

    def sample(length, pictures):
        ids = torch.randint(1, IMAGE_ID, (length,), generator=generator).tolist()
        spans = tuple(MediaSpan(MediaRef(""), 2 + 5 * i, 4) for i in range(pictures))
        for span in spans:
            ids[span.start : span.start + 4] = [IMAGE_ID] * 4
        labels = [IGNORE_INDEX] * (length - length // 3) + ids[length - length // 3 :]
        return Sample(tuple(ids), tuple(labels), spans)

    pixels = {"pixel_values": torch.randn(3, 3, 32, 32, generator=generator), "tiles": (1, 1, 1)}
    with_pictures = collate([[sample(20, 2)], [sample(31, 1)]], pixels, 0, None)
    return [with_pictures, collate([[sample(9, 0)], [sample(17, 0)]], {}, 0, None)]


@pytest.fixture
def strategy():
    """As on a GPU: steps are looked at only when a report is asked for, and AdamW is the fused one."""
    recipe = load_recipe("shapes/align")
    alone = World(0, 0, 1, torch.device("cpu"))
    learner = Learner(small_model(freeze_qformer=False, get_lora=True), NextToken(), alone).train()
    strategy = DataParallel(learner, recipe, Ranks(alone, alone), accumulation=2)
    strategy.waits = False
    for group in strategy.optimizer.param_groups:
        group["fused"] = True
    return strategy


def trained(strategy):
    return {name: tensor.clone() for name, tensor in strategy.trained_tensors().items()}


def test_nothing_is_read_between_reports(strategy):
    before, given = trained(strategy), [batches(i) for i in range(3)]
    with NoReading():
        results = [strategy.step(b, 1e-3, i + 1, report=False) for i, b in enumerate(given)]
    assert results == [None] * 3
    assert any(not torch.equal(before[name], tensor) for name, tensor in trained(strategy).items())


def test_a_report_is_that_of_a_step_that_was_waited_for(strategy):
    results = [strategy.step(batches(i), 1e-3, i + 1, report=i == 2) for i in range(3)]
    again = DataParallel(
        Learner(small_model(freeze_qformer=False, get_lora=True), NextToken(), strategy.world).train(),
        strategy.recipe, strategy.ranks, accumulation=2,
    )  # fmt: skip
    for group in again.optimizer.param_groups:
        group["fused"] = True
    each = [again.step(batches(i), 1e-3, i + 1) for i in range(3)]
    assert results == [None, None, each[2]] and None not in each


@pytest.mark.parametrize("read", [lambda t: t.item(), bool, lambda t: t[t > 0], lambda t: torch.tensor(t.tolist())])
def test_a_single_read_is_found(strategy, read):
    class Reads(NextToken):
        def loss(self, scorer, hidden, batch):
            read(hidden[0, 0, 0].detach())
            return super().loss(scorer, hidden, batch)

    strategy.learner.objective = Reads()
    with NoReading(), pytest.raises(AssertionError, match="reads a tensor"):
        strategy.step(batches(0), 1e-3, 1, report=False)


def test_the_first_step_that_is_not_finite_is_named_before_the_next_update(strategy):
    strategy.step(batches(0), 1e-3, 1, report=False)
    bad = batches(1)
    bad[0] = replace(bad[0], pixel_values=bad[0].pixel_values * torch.nan)
    strategy.step(bad, 1e-3, 2, report=False)
    strategy.step(batches(2), 1e-3, 3, report=False)
    with pytest.raises(TrainingError, match="step 2: the loss is nan"):
        strategy.step(batches(3), 1e-3, 4)


def test_where_steps_are_waited_for_nothing_is_updated_by_one_that_is_not_finite(strategy):
    strategy.waits = True
    before, bad = trained(strategy), batches(1)
    bad[0] = replace(bad[0], pixel_values=bad[0].pixel_values * torch.nan)
    with pytest.raises(TrainingError, match="step 1"):
        strategy.step(bad, 1e-3, 1, report=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in trained(strategy).items())


def test_hard_negatives_are_those_that_multinomial_draws():
    weights = torch.rand(5, 5).fill_diagonal_(0)
    torch.manual_seed(1)
    expected = torch.multinomial(weights, 1).squeeze(1)
    torch.manual_seed(1)
    with NoReading():
        found = drawn(weights)
    assert torch.equal(found, expected)
