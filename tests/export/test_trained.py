"""The original's model.pth and peft's adapter folder."""

import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lavis.config.init import Init
from lavis.core.errors import CheckpointError
from lavis.export.trained import export_peft, export_pth, open_run, original_tensors
from lavis.models.vlm import Vlm
from lavis.weights.qwen1_format import with_qwen2_names
from tests.export.exports import distance, random_run


def test_a_projection_s_file_is_the_original_s(tmp_path):
    trained = open_run(random_run(tmp_path))
    file = export_pth(trained, tmp_path / "out")
    content = torch.load(file, weights_only=True)
    assert file == tmp_path / "out/model.pth" and content.keys() == {"model"}
    assert content["model"].keys() == {"llm_proj.weight", "llm_proj.bias"}
    assert torch.equal(content["model"]["llm_proj.weight"], trained.checkpoint.tensors()["llm_proj.weight"])
    assert export_pth(trained, tmp_path / "other.pth") == tmp_path / "other.pth"


def test_other_parts_go_under_the_original_s_names_and_come_back(tmp_path):
    trained = open_run(random_run(tmp_path, freeze_vit=False, freeze_qformer=False, freeze_queries=False))
    file = export_pth(trained, tmp_path)
    names = torch.load(file, weights_only=True)["model"].keys()
    attention = r"(attention|crossattention)\.(self\.(query|key|value)|output\.(dense|LayerNorm))"
    layer = rf"encoder\.layer\.\d\.({attention}|intermediate_query\.dense|output_query\.(dense|LayerNorm))"
    parts = rf"Qformer\.bert\.({layer}|embeddings\.LayerNorm)|ln_vision|llm_proj"
    known = rf"({parts})\.(weight|bias)|query_tokens|visual_encoder\..*"
    assert not [name for name in names if not re.fullmatch(known, name)] and len(names) > 90
    assert "Qformer.bert.encoder.layer.1.attention.self.query.weight" in names
    again = Vlm.from_config(trained.model, init=[Init(str(file))]).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in trained.checkpoint.tensors().items())


def test_a_trained_first_generation_llm_gets_its_own_names():
    tensors = {
        f"llm_model.model.layers.{i}.self_attn.{p}_proj.{kind}": torch.randn(4, 2)
        for i in (0, 1)
        for p in "qkv"
        for kind in ("weight", "bias")
    }
    tensors |= {
        "llm_model.model.layers.0.mlp.gate_proj.weight": torch.randn(3, 2),
        "llm_model.lm_head.weight": torch.randn(5, 2),
        "llm_proj.bias": torch.randn(2),
    }
    original = original_tensors(tensors, first_generation=True)
    assert {"llm_model.transformer.h.0.mlp.w2.weight", "llm_model.lm_head.weight", "llm_proj.bias"} < original.keys()
    assert original["llm_model.transformer.h.1.attn.c_attn.weight"].shape == (12, 2)
    again = with_qwen2_names(original, "llm_model.")
    assert again.keys() == tensors.keys() and all(torch.equal(again[k], tensors[k]) for k in tensors)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_peft_opens_the_adapters(tmp_path, family):
    trained = open_run(random_run(tmp_path, family, get_lora=True, lora_r=3, lora_alpha=5))
    files = {file.name for file in export_peft(trained, tmp_path / "peft")}
    assert {"adapter_config.json", "adapter_model.safetensors", "projection.safetensors"} <= files
    tensors = trained.checkpoint.tensors()
    ours = Vlm.from_config(trained.model).eval()
    ours.load_state_dict(tensors, strict=False)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    ids = torch.randint(3, 500, (2, 9))
    with torch.no_grad():
        plain = base(ids).logits
        theirs = PeftModel.from_pretrained(base, tmp_path / "peft")
        assert (
            distance(theirs(ids).logits, ours.llm_model(ids).logits)
            < 1e-6
            < distance(plain, ours.llm_model(ids).logits)
        )
    assert len(load_file(tmp_path / "peft/adapter_model.safetensors")) == sum("lora" in name for name in tensors) == 28
    projection = load_file(tmp_path / "peft/projection.safetensors")
    assert projection.keys() == {"llm_proj.weight", "llm_proj.bias"}
    assert torch.equal(projection["llm_proj.weight"], tensors["llm_proj.weight"])


def test_adapters_have_no_place_in_model_pth(tmp_path):
    with pytest.raises(CheckpointError, match="export peft"):
        export_pth(open_run(random_run(tmp_path, get_lora=True)), tmp_path)
