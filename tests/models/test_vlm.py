"""The composition: names of its tensors, parts that are frozen, adapted or trained, text alone."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from lavis.core.errors import ConfigError
from lavis.models.adapters import lora_targets
from lavis.models.blip2_qformer import Blip2QFormer
from lavis.models.configs import VlmConfig
from lavis.models.parts import LlmConfig, LoraSettings
from lavis.models.vlm import Vlm
from tests.models.conftest import batch_of, loss_of, model_config, small_llm, small_model, tower_settings

NAMES = json.loads((Path(__file__).parents[1] / "fixtures/tensor_names.json").read_text())
"""Names and shapes of small models' tensors, and what was trained of them, as version 0.1 had them."""
STAGE1 = {"freeze_vit": False, "freeze_qformer": False, "freeze_queries": False, "embed_dim": 24}
MODELS = {
    "frozen": lambda: small_model(),
    "adapters": lambda: small_model(get_lora=True, lora_parts=["llm", "vit", "qformer"]),
    "text": lambda: Vlm(VlmConfig(llm=LlmConfig(train="full")), small_llm()),
    "first stage": lambda: Blip2QFormer(model_config("blip2_qformer", **tower_settings(**STAGE1)), 60, 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_tensors_go_by_the_names_they_always_had(name):
    model, expected = MODELS[name](), NAMES[name]
    state = model.state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == expected["state"]
    assert sorted(n for n, p in model.named_parameters() if p.requires_grad) == expected["trained"]
    assert [n for n, _ in model.named_parameters(prefix="whole")] == [f"whole.{n}" for n, _ in model.named_parameters()]
    own = dict(model.named_parameters())
    assert all(own[key].data_ptr() == state[key].data_ptr() for key in own)


@pytest.mark.parametrize("name", MODELS)
def test_a_state_is_loaded_by_these_names_also_inside_another_module(name):
    model = MODELS[name]()
    state = {key: torch.full_like(tensor, 0.5) for key, tensor in model.state_dict().items()}
    assert not any(model.load_state_dict(state))
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    around = nn.ModuleDict({"model": model, "other": nn.Linear(2, 2)})
    inside = around.state_dict()
    assert {key for key in inside if key.startswith("model.")} == {f"model.{key}" for key in state}
    assert not any(around.load_state_dict(inside))
    lacking = {key: tensor for key, tensor in state.items() if not key.endswith("mlp.fc1.bias")} | {
        "odd": torch.ones(1)
    }
    keys = model.load_state_dict(lacking, strict=False)
    assert set(keys.missing_keys) == state.keys() - lacking.keys() and keys.unexpected_keys == ["odd"]


def text_model(**section):
    torch.manual_seed(0)
    model = Vlm(VlmConfig(llm=LlmConfig(**section)), small_llm())
    model.add_adapters()
    return model.train()


def test_text_alone_is_trained_by_adapters():
    model = text_model(train="lora", lora=LoraSettings(rank=2, dropout=0.0, targets="attention"))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {n.split(".self_attn.")[1].split(".")[0] for n in trained} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not model.config.sees and model.tower_frozen and model.parts().keys() == {"llm"}
    batch = batch_of([15, 12], [0, 0])
    loss_of(model, batch).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".lora_B." in n)
    assert model.filler(batch) is batch


def test_hidden_states_are_those_behind_the_final_norm(model):
    batch = batch_of([15, 12], [1, 0])
    logits = model.llm_model(inputs_embeds=model.embed(batch), position_ids=batch.position_ids).logits
    torch.testing.assert_close(model.llm_model.lm_head(model.hidden(batch)), logits)


@pytest.mark.parametrize(
    ("targets", "count"),
    [("linear", 14), ("attention", 8), (["q_proj", "v_proj"], 4), ("mlp.up_proj", 2), (["layers.0.mlp.up_proj"], 1)],
)
def test_targets_of_adapters(targets, count):
    assert len(lora_targets(small_llm(), targets)) == count


def test_targets_that_name_nothing_are_told():
    with pytest.raises(ConfigError, match=r"'qproj' names no layer of Qwen2ForCausalLM. Layers: down_proj"):
        lora_targets(small_llm(), "qproj")


def test_attention_layers_of_the_tower_are_found():
    model = small_model()
    assert len(lora_targets(model.visual_encoder.model, "attention")) == 2 * 2  # qkv and proj
    assert all("attention" in name for name in lora_targets(model.connector.Qformer, "attention"))


@pytest.mark.parametrize(
    ("part", "output", "said"),
    [
        ("tower", torch.zeros(2, 9, 48), "model.tower eva_clip_g: it gives 9 x 48"),
        ("connector", torch.zeros(2, 3, 64), "model.connector qformer_linear: it gives 3 x 64"),
        ("connector", torch.zeros(2, 4, 60), "it gives 4 x 60 .* where 4 x 64 follow from span\\(\\) and width"),
    ],
)
def test_a_part_that_gives_other_vectors_than_its_section_says_is_refused(model, monkeypatch, part, output, said):
    """Such vectors would be put in the places of another picture without a word."""
    module, name = (model.visual_encoder, "encode") if part == "tower" else (model.connector, "project")
    monkeypatch.setattr(module, name, lambda *_: output)
    with pytest.raises(ConfigError, match=said):
        model.embed(batch_of([15, 12], [1, 1]))


@pytest.mark.parametrize("thawed", [False, True])
def test_a_filler_lets_every_trained_part_take_part_with_no_effect(thawed):
    model = small_model(freeze_vit=not thawed)
    batch = batch_of([15, 12], [0, 0])
    filled = model.filler(batch)
    loss = loss_of(model, filled)
    assert torch.equal(loss, loss_of(model, batch))
    loss.backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or (p.grad is not None and not p.grad.any()), name
    live = model.filler(batch, run_frozen=True)
    assert live.pixel_values is not None and model.filler(live) is live


def test_a_connector_that_recomputes_has_the_same_gradients_and_keeps_less():
    """Dropout in the Q-Former draws the same again."""
    found = {}
    for recompute in (False, True):
        model = small_model(freeze_qformer=False)
        for module in model.connector.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        model.config.connector.recompute = recompute
        kept = 0

        def pack(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(model, batch_of([15, 12], [1, 1]))
        loss.backward()
        found[recompute] = kept, loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    (most, loss, grads), (least, again, same) = found[False], found[True]
    assert torch.equal(loss, again) and least < most
    torch.testing.assert_close(same, grads, rtol=0, atol=0)


def test_queries_alone_can_be_trained():
    model = small_model(freeze_queries=False, freeze_proj=True)
    model.train()
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["query_tokens"]
    assert not model.connector.Qformer.training and not model.tower_frozen
    loss_of(model, batch_of([15], [1])).backward()
    assert model.connector.query_tokens.grad.any()


def test_rates_of_parts():
    from lavis.config.sections import OptimConfig
    from lavis.parallel.optim import build_optimizer

    model = small_model(freeze_vit=False, freeze_llm=False)
    model.config.llm.lr_scale, model.config.tower.lr_scale = 0.1, 0.5
    optimizer = build_optimizer(model, OptimConfig(layer_decay=0.5))
    scales = {p: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scales[model.llm_model.lm_head.weight] == 0.1 and scales[model.connector.llm_proj.weight] == 1.0
    assert [scales[block.mlp.fc1.weight] for block in model.visual_encoder.layers()] == [0.125, 0.25]


def test_an_llm_that_is_placed_keeps_the_order_of_parameters():
    model = small_model()
    before = [name for name, _ in model.named_parameters()]
    model.config.llm.device_map = "cpu"
    model.to(torch.float64)
    assert [name for name, _ in model.named_parameters()] == before
    assert model.llm_model.dtype == torch.float32 and model.connector.llm_proj.weight.dtype == torch.float64


def test_a_small_llm_of_another_width_fits_any_connector():
    llm = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2,
        )
    )  # fmt: skip
    assert Vlm(model_config(**tower_settings()), llm, 49).connector.llm_proj.out_features == 32
