import math
from itertools import pairwise

import pytest

from lavis.config.sections import OptimConfig, TrainConfig
from lavis.core.errors import ConfigError
from lavis.core.registries import LR_SCHEDULES
from lavis.train.schedules import horizon, learning_rate


def rates(name, epochs, steps_per_epoch=10, **optim):
    config = OptimConfig(schedule=name, lr=1.0, min_lr=0.1, **optim)
    span = horizon(config, TrainConfig(epochs=epochs), steps_per_epoch)
    return [learning_rate(config, span, s) for s in range(span.total_steps)]


@pytest.mark.parametrize("name", LR_SCHEDULES.list())
def test_warm_up_starts_at_its_own_rate_and_lasts_beyond_an_epoch(name):
    warm = rates(name, epochs=3, warmup_steps=15, warmup_lr=0.4)
    assert warm[0] == 0.4
    assert warm[14] == pytest.approx(0.4 + 0.6 * 14 / 15)
    assert all(a < b for a, b in pairwise(warm[:15]))
    assert rates(name, epochs=2, warmup_steps=5, warmup_lr=-1)[0] == 1.0


def test_cosine_per_step_ends_at_the_lowest_rate():
    r = rates("linear_warmup_cosine_lr_step-wise", epochs=3, warmup_steps=4)
    assert r[4] == 1.0 and r[-1] == pytest.approx(0.1)
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 10 / 25))
    assert r[14] == pytest.approx(middle)


def test_cosine_per_epoch_is_constant_within_one():
    r = rates("linear_warmup_cosine_lr", epochs=4)
    assert [len(set(r[i : i + 10])) for i in (0, 10, 20, 30)] == [1, 1, 1, 1]
    assert r[0] == 1.0 and r[20] == pytest.approx(0.55)


def test_step_decay_has_a_floor_and_constant_is_constant():
    assert rates("linear_warmup_step_lr", epochs=4, lr_decay_rate=0.5)[::10] == [1.0, 0.5, 0.25, 0.125]
    assert rates("linear_warmup_step_lr", epochs=3, lr_decay_rate=0.01)[-1] == 0.1
    assert set(rates("constant_lr", epochs=2)) == {1.0}


def test_max_steps_and_ratio_set_the_horizon():
    assert horizon(OptimConfig(), TrainConfig(epochs=5, max_steps=12), 10).total_steps == 12
    assert horizon(OptimConfig(warmup_ratio=0.1), TrainConfig(epochs=5), 10).warmup_steps == 5
    with pytest.raises(ConfigError, match="warm-up takes 50 steps"):
        horizon(OptimConfig(warmup_steps=50), TrainConfig(epochs=5), 10)
