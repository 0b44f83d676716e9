"""The arithmetic of a step by formula against what the operators of a real step add up to."""

from dataclasses import replace

import pytest
import torch

from lavis.core.dist import World
from lavis.objectives.learner import Learner
from lavis.objectives.sft import NextToken
from lavis.parallel.flops import UNITS, Arithmetic
from lavis.parallel.footprint import CostMode
from lavis.parallel.strategy import Ranks
from tests.models.conftest import batch_of, small_model

ALONE = World(0, 0, 1, torch.device("cpu"))


def counted(model, batch):
    """FLOPs of the operators of forward and backward."""
    with CostMode() as costs:
        Learner(model, NextToken(), ALONE)(batch).loss_sum.backward()
    return costs.flops


def asked(model, batch):
    arithmetic = Arithmetic.of(model, Ranks(ALONE, ALONE))
    units = arithmetic.units(batch)
    return sum(arithmetic.asked[unit] * units[unit] for unit in UNITS)


@pytest.mark.parametrize("changes", [{}, {"get_lora": True}, {"freeze_qformer": False}, {"freeze_vit": False}])
def test_the_formula_is_near_what_operators_count(changes):
    batch = batch_of([60, 60], [2, 2])
    model = small_model(**changes)
    assert asked(model, batch) == pytest.approx(counted(model, batch), rel=0.15)


def test_what_is_cached_costs_nothing():
    model, batch = small_model(), batch_of([60, 60], [2, 2])
    features = replace(batch, pixel_values=None, features=model.encode_images(batch.pixel_values))
    assert asked(model, features) < 0.9 * asked(model, batch)


def test_shares_are_of_the_peak_and_recomputation_is_told_apart():
    model = small_model()
    arithmetic = replace(Arithmetic.of(model, Ranks(ALONE, ALONE)), peak=100.0)
    assert arithmetic.peak and set(arithmetic.shares(dict.fromkeys(UNITS, 1.0), 2.0)) == {"mfu"}
    costs = dict.fromkeys(UNITS, 0.0) | {"tokens": 30.0}
    one = replace(arithmetic, asked=costs, again=costs | {"tokens": 10.0})
    assert one.shares(dict.fromkeys(UNITS, 2.0), 4.0) == pytest.approx({"mfu": 0.15, "mfu_recomputed": 0.05})
    assert replace(one, peak=None).shares(dict.fromkeys(UNITS, 2.0), 4.0) == {}


def test_peaks_of_gpus_are_those_of_the_plans(monkeypatch):
    from lavis.parallel.flops import _peak

    for name, expected in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-40GB", 312e12), ("Tesla T4", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert _peak(torch.device("cuda"), 2) == (expected and 2 * expected)
