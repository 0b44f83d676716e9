"""What is decided from the plan of a run."""

from dataclasses import replace

import pytest
import torch

from lavis.config.recipe import load_recipe
from lavis.core.dist import World
from lavis.data.texts import Texts
from lavis.parallel.plan import Machine
from lavis.parallel.strategy import DataParallel, Ranks
from lavis.train.planning import settle_micro_batches, settle_recomputation
from tests.train.world import write_recipe


def settled(tmp_path, device, **changes):
    recipe = load_recipe(write_recipe(tmp_path, changes))
    world = World(0, 0, 1, torch.device(device))
    found = settle_recomputation(recipe, Texts.of(recipe), DataParallel, Ranks(world, world))
    assert replace(found, model=recipe.model) == recipe  # nothing else has changed
    return found.model.recomputes


@pytest.mark.parametrize(("gigabytes", "needed"), [(0.8, True), (16, False)])
def test_activations_are_recomputed_where_a_gpu_has_no_room(cache, tmp_path, monkeypatch, gigabytes, needed):
    monkeypatch.setenv("LAVIS_CACHE", str(cache))
    card = Machine("cuda", gigabytes * 2**30, None)
    monkeypatch.setattr(Machine, "this", classmethod(lambda cls, device: card))
    assert settled(tmp_path, "cuda") is needed
    assert settled(tmp_path, "cuda", llm_grad_checkpoint=True) is True
    assert settled(tmp_path, "cpu") is False


@pytest.mark.parametrize(("gigabytes", "expected"), [(0.8, None), (0.84, 2048), (64, 8192)])
def test_a_micro_batch_has_as_many_tokens_as_a_gpu_has_room_for(cache, tmp_path, monkeypatch, gigabytes, expected):
    monkeypatch.setenv("LAVIS_CACHE", str(cache))
    card = Machine("cuda", gigabytes * 2**30, None)
    monkeypatch.setattr(Machine, "this", classmethod(lambda cls, device: card))
    recipe = load_recipe(write_recipe(tmp_path))

    def budget(recipe, device):
        world = World(0, 0, 1, torch.device(device))
        found = settle_micro_batches(recipe, Texts.of(recipe), DataParallel, Ranks(world, world))
        return found.train.micro_batch_tokens

    assert budget(recipe, "cuda") == expected and budget(recipe, "cpu") is None
    chosen = load_recipe(tmp_path / "recipe.yaml", ["train.micro_batch_tokens=512"])
    assert budget(chosen, "cuda") == 512
