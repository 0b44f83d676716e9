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


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_state_survives_by_name(name, fused):
    torch.manual_seed(0)
    models = [nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (build_optimizer(m, OptimConfig(name=name), fused=fused) for m in models)
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
    assert torch.equal(models[0].weight, models[1].weight) and torch.equal(models[0].bias, models[1].bias)
    with pytest.raises(CheckpointError, match="state of other"):
        load_optimizer_tensors(
            build_optimizer(nn.Bilinear(2, 2, 2, bias=False), OptimConfig()),
            nn.Bilinear(2, 2, 2, bias=False),
            {"exp_avg.other": x},
        )


def test_nothing_to_train_is_an_error():
    with pytest.raises(ConfigError, match="frozen"):
        build_optimizer(small_model(freeze_proj=True), OptimConfig())


def test_a_fused_adamw_goes_on_from_one_that_is_not():
    """Checkpoints are the same, so a run may change its device."""
    models = [nn.Linear(3, 2) for _ in range(2)]
    kinds = [build_optimizer(m, OptimConfig(), fused=fused) for m, fused in zip(models, (False, True), strict=True)]
    for model, optimizer in zip(models, kinds, strict=True):
        model(torch.ones(5, 3)).sum().backward()
        optimizer.step()
    tensors = [optimizer_tensors(optimizer, model) for optimizer, model in zip(kinds, models, strict=True)]
    shapes = [{name: (t.shape, t.dtype) for name, t in own.items()} for own in tensors]
    assert shapes[0] == shapes[1] and set(shapes[0]) == {
        f"{slot}.{name}" for slot in ("step", "exp_avg", "exp_avg_sq") for name in ("weight", "bias")
    }


def test_lion_follows_the_sign_of_its_momentum():
    """Algorithm 2 of Chen et al. 2023, number by number."""
    model = nn.Linear(2, 1, bias=False).double()
    optim = OptimConfig(name="lion", lr=0.01, beta1=0.9, beta2=0.99, weight_decay=0.1)
    optimizer = build_optimizer(model, optim)
    set_learning_rate(optimizer, 0.01)
    weights, momenta = model.weight[0].tolist(), [0.0, 0.0]
    for gradient in ([0.3, -2.0], [-5.0, 1.0], [0.01, 0.02]):
        model.weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        for i, g in enumerate(gradient):
            c = 0.9 * momenta[i] + 0.1 * g
            weights[i] -= 0.01 * ((c > 0) - (c < 0) + 0.1 * weights[i])
            momenta[i] = 0.99 * momenta[i] + 0.01 * g
        assert model.weight[0].tolist() == pytest.approx(weights, rel=1e-12)


def test_muon_takes_matrices_and_leaves_tables_and_vectors_to_adamw():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optim = OptimConfig(name="muon", lr=0.1, weight_decay=0.2)
    optimizer = build_optimizer(model, optim)
    set_learning_rate(optimizer, 0.1)
    model(torch.arange(7)).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    for cls, names in ((torch.optim.AdamW, ("0.weight", "1.bias")), (torch.optim.Muon, ("1.weight",))):
        for name in names:
            p = nn.Parameter(start[name].clone())
            p.grad = gradients[name]
            more = {"adjust_lr_fn": "match_rms_adamw", "eps": optim.eps} if cls is torch.optim.Muon else {}
            cls([p], lr=0.1, weight_decay=0.2 if p.ndim > 1 else 0.0, **more).step()
            assert torch.equal(p, model.get_parameter(name)), name
    slots = {key.partition(".")[::2] for key in optimizer_tensors(optimizer, model)}
    assert slots == {("momentum_buffer", "1.weight")} | {
        (slot, name) for slot in ("step", "exp_avg", "exp_avg_sq") for name in ("0.weight", "1.bias")
    }


def test_8_bit_moments_need_bitsandbytes(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        build_optimizer(nn.Linear(2, 2), OptimConfig(name="adamw_8bit"))
