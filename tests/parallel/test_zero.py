"""What is ours of ZeRO."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lavis.config.recipe import load_recipe
from lavis.config.sections import ParallelConfig
from lavis.parallel.zero import engine_config
from lavis.parallel.zero_engine import Linear


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_keeps_its_input_only_where_it_is_trained(trained, bias):
    torch.manual_seed(0)
    x, weight, grad = (
        torch.randn(2, 3, 4, requires_grad=True),
        torch.randn(5, 4, requires_grad=trained),
        torch.randn(2, 3, 5),
    )
    b = torch.randn(5, requires_grad=trained) if bias else None
    wanted = [t for t in (x, weight, b) if t is not None and t.requires_grad]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        out = Linear.apply(x, weight, b)
    assert (x.shape in kept) == trained
    expected = F.linear(x, weight, b)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad(out, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_no_more_is_set_aside_for_gradients_than_is_trained():
    def bucket(elements, **zero):
        parallel = ParallelConfig(deepspeed={"zero_optimization": {"stage": 2, **zero}})
        recipe = replace(load_recipe("shapes/align"), parallel=parallel)
        return engine_config(recipe, None, 1, trained=elements)["zero_optimization"]["reduce_bucket_size"]

    assert bucket(1000) == 1000
    assert bucket(10**9) == 500_000_000
    assert bucket(1000, reduce_bucket_size=300) == 300
