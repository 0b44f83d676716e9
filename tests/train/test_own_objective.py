"""An objective of a user's own, with named parts and two calls of the scorer, is the same under every strategy."""

import pytest

from tests.train.test_equivalence import LAYOUTS, MIXED
from tests.train.world import train, train_lines

pytestmark = pytest.mark.usefixtures("deepspeed_operators")
HALVES = """
from dataclasses import dataclass

from lavis.config.schema import opt
from lavis.config.sections import ObjectiveConfig
from lavis.core.output import LossOutput
from lavis.core.registries import OBJECTIVES
from lavis.objectives.sft import NextToken


@dataclass
class HalvesConfig(ObjectiveConfig):
    second_weight: float = opt(1.0, "how much the second half counts")


@OBJECTIVES.register("halves", config=HalvesConfig)
class Halves(NextToken):
    '''The second half of the supervised positions counts more, and half of it is a reward for being sure.'''

    parts = ("first", "second", "sure")
    weight: float

    @classmethod
    def from_config(cls, config):
        objective = cls()
        objective.weight = config.second_weight
        return objective

    def loss(self, scorer, hidden, batch):
        targets = batch.labels[:, 1:]
        supervised = targets != -100
        hidden, targets = hidden[:, :-1][supervised], targets[supervised]
        middle = len(targets) // 3 * 2
        first = scorer.cross_entropy(hidden[:middle], targets[:middle])
        second = scorer.cross_entropy(hidden[middle:], targets[middle:])
        sure = scorer.logprobs(hidden, targets).exp().sum()
        parts = {"first": first.detach(), "second": second.detach(), "sure": sure.detach()}
        return LossOutput(first + self.weight * second - sure, self.units(batch), parts)

    def before_step(self, batches, actors):
        return list(reversed(batches))
"""
OWN = ("imports=[halves.py]", "objective={name: halves, second_weight: 2}")


def run(cache, folder, ranks, options):
    folder.mkdir(exist_ok=True)
    (folder / "halves.py").write_text(HALVES)
    run = {"valid_splits": ["val"], "max_new_tokens": 2}
    return train(cache, folder, *OWN, *options, ranks=ranks, run=run)


@pytest.fixture(scope="module")
def single(cache, tmp_path_factory):
    return run(cache, tmp_path_factory.mktemp("own"), 1, ["train.micro_batch_size=1", "train.accumulation=8", *MIXED])


@pytest.mark.parametrize(
    "layout",
    [
        "data-parallel with accumulation",
        pytest.param("ZeRO-2", marks=pytest.mark.slow),
        "ZeRO-3",
        "pipeline of 2",
    ],
)
def test_it_is_the_same_under_every_strategy(cache, tmp_path, single, layout):
    ranks, options = LAYOUTS[layout]
    # which positions are the last third depends on the micro-batch, which therefore is one row everywhere
    options = [o for o in options if not o.startswith(("train.micro_batch_size", "train.accumulation"))]
    accumulation = 8 if layout.startswith("pipeline") else 8 // ranks
    options += ["train.micro_batch_size=1", f"train.accumulation={accumulation}", *MIXED]
    lines = train_lines(run(cache, tmp_path, ranks, options))
    for want, got in zip(train_lines(single), lines, strict=True):
        for name in ("loss", "first", "second", "sure", "grad_norm"):
            assert got[name] == pytest.approx(want[name], rel=1e-4), (name, want, got)
