import pytest
import torch
from torch import nn

from lavis.config.sections import OptimConfig
from lavis.core.errors import CheckpointError, ConfigError
from lavis.parallel.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors, set_learning_rate
from tests.models.conftest import small_model


def test_no_decay_on_vectors_and_layerwise_rates_from_the_top_of_the_vit():
    model = small_model(freeze_vit=False)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3, layer_decay=0.5))
    set_learning_rate(optimizer, 1.0)
    found = {p: (g["weight_decay"], g["lr"]) for g in optimizer.param_groups for p in g["params"]}
    vit = model.visual_encoder.model
    assert found[model.connector.llm_proj.weight] == (0.3, 1.0) and found[model.connector.llm_proj.bias] == (0.0, 1.0)
    assert found[vit.blocks[1].mlp.fc1.weight] == (0.3, 0.5)
    assert found[vit.blocks[0].mlp.fc1.weight] == (0.3, 0.25)
    assert found[vit.patch_embed.proj.weight] == (0.3, 0.125)


def test_state_survives_by_name():
    torch.manual_seed(0)
    models = [nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (build_optimizer(m, OptimConfig()) for m in models)
    x = torch.randn(5, 3)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    step(models[0], first)
    models[1].load_state_dict(models[0].state_dict())
    load_optimizer_tensors(second, models[1], optimizer_tensors(first, models[0]))
    for model, optimizer in zip(models, (first, second), strict=True):
        step(model, optimizer)
    assert torch.equal(models[0].weight, models[1].weight)
    with pytest.raises(CheckpointError, match="state of other"):
        load_optimizer_tensors(
            build_optimizer(nn.Bilinear(2, 2, 2, bias=False), OptimConfig()),
            nn.Bilinear(2, 2, 2, bias=False),
            {"exp_avg.other": x},
        )


def test_nothing_to_train_is_an_error():
    with pytest.raises(ConfigError, match="frozen"):
        build_optimizer(small_model(freeze_proj=True), OptimConfig())
