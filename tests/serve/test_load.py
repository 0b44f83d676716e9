"""Where a model's parts go, and what is said when none is named."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lavis.cli import main
from lavis.config.recipe import load_model_config, load_recipe
from lavis.core.errors import ChatError, CheckpointError, ConfigError
from lavis.core.registries import CONNECTORS, EXPORTERS, TOWERS
from lavis.export.base import exporter_for
from lavis.export.trained import export_peft, open_run
from lavis.generation.engine import Engine
from lavis.models.configs import VlmConfig
from lavis.models.llm import free_memory, load_llm, spread
from lavis.models.vlm import Vlm, image_parts_bytes
from lavis.runs.checkpoint import TrainState, save_checkpoint
from lavis.serve.load import load_chat
from lavis.serve.session import ChatSession
from lavis.weights.tensors import write_tensors
from tests.export.exports import random_run

VIT = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "init_std", "pos_init_std")


def test_nothing_named_is_told():
    with pytest.raises(ChatError, match="--model-type shapes"):
        load_chat()
    with pytest.raises(CheckpointError, match=r"no checkpoint .*none\.pth"):
        load_chat(checkpoint="none.pth")
    with pytest.raises(CheckpointError, match=r"qwen14b_chat needs files[\s\S]*eva_vit_g.pth[\s\S]*Qwen-14B-Chat"):
        load_chat(model_type="qwen14b_chat", checkpoint="shapes/aligned/projection.safetensors")
    with pytest.raises(ConfigError, match="Did you mean"):
        load_chat(model_type="qwen7b")


def test_adapters_from_the_run_and_from_its_peft_folder(tmp_path, pictures):
    run = random_run(tmp_path, get_lora=True, lora_r=4)
    export_peft(open_run(run), tmp_path / "peft")
    section = open_run(run).recipe.model
    options = [
        f"llm_model={section.llm.weights}",
        f"pretrained={section.connector.weights}",
        "vit_pretrained=null",
        "image_size=32",
        "num_query_token=5",
    ]
    options += [
        f"vit={ {key: getattr(section.tower, key) for key in VIT} }".replace("'", ""),
        f"qformer={vars(section.connector.qformer)}".replace("'", ""),
    ]
    of_run, of_peft = (
        load_chat(run=run),
        load_chat(checkpoint=tmp_path / "peft", model_type="qwen7b_chat", options=options),
    )
    assert not any(".lora_" in name for name in of_run.model.state_dict())
    for name, tensor in of_run.model.state_dict().items():
        assert torch.equal(tensor, of_peft.model.state_dict()[name]), name


def test_the_llm_is_kept_on_the_cpu_or_spread(chat):
    for device_map in ("cpu", "auto"):
        placed = load_chat(model_type="shapes", llm_device_map=device_map)
        assert placed.model.config.llm.device_map == device_map
        moved = placed.model.to(torch.float64)  # stands for another device: the LLM does not follow
        assert moved.connector.query_tokens.dtype == torch.float64 and moved.llm_model.dtype == torch.float32


def test_room_is_kept_for_the_tower_on_the_first_gpu(monkeypatch):
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {0: 24 << 30, 1: 24 << 30, "cpu": 64 << 30})
    config = load_model_config("minigpt4qwen", "qwen7b_chat")
    reserved = image_parts_bytes(config)
    assert free_memory(reserved) == {0: (24 << 30) - reserved, 1: 24 << 30, "cpu": 64 << 30}
    assert free_memory(reserved, 1)[1] == (24 << 30) - reserved and free_memory(30 << 30)[0] == 0
    with torch.device("meta"):
        parts = (
            TOWERS.get("eva_clip_g").from_config(config.tower),
            CONNECTORS.get("qformer_linear").from_config(config.connector, config.tower.width(), 1),
        )
    whole = sum(p.numel() for part in parts for p in part.parameters())
    assert 2 * whole < reserved - (1 << 30) < 3 * whole  # the ViT's billion in fp16, the Q-Former in fp32


def test_layers_are_spread_evenly(monkeypatch):
    """Over two GPUs of which one could hold nearly all: neither is filled up, as keys and values want room too."""
    maps = []
    monkeypatch.setattr("accelerate.dispatch_model", lambda llm, device_map: maps.append(device_map))
    llm = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=12,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    )
    size = sum(p.nbytes for p in llm.parameters())
    spread(llm, {0: int(0.95 * size), 1: int(0.95 * size), "cpu": 10 * size})
    layers = [device for name, device in maps[0].items() if ".layers." in name]
    assert len(layers) == 12 and "cpu" not in maps[0].values()
    assert abs(layers.count(0) - layers.count(1)) <= 3, layers


def test_the_llm_s_type_is_what_is_asked_for(chat, tmp_path):
    chat.model.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved/config.json").read_text()
    (tmp_path / "saved/config.json").write_text(text.replace('"train": "frozen"', '"train": "full"'))
    assert load_chat(checkpoint=tmp_path / "saved", dtype="bf16").llm.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="leave --options out"):
        load_chat(checkpoint=tmp_path / "saved", options=["image_size=32"])


def test_a_text_only_run(chat, engine, tmp_path):
    """What shapes/llm_b trains: an LLM made from its dimensions."""
    recipe = load_recipe("shapes/llm_b", ["model.tokenizer=shapes/llm_b"])
    tensors = {name: p.detach().float() for name, p in Vlm(VlmConfig(), chat.llm).named_parameters()}
    save_checkpoint(tmp_path / "run/checkpoints", TrainState(1, 1), tensors, {}, recipe.to_yaml())
    text = load_chat(run=tmp_path / "run")
    assert not text.sees
    other = Engine(text)
    assert "".join(ChatSession(other).ask("hello")) == "".join(ChatSession(engine).ask("hello"))
    with pytest.raises(ChatError, match="text only"):
        ChatSession(other).attach(object())
    other.close()


def test_the_processor_has_the_image_size_of_the_model(tmp_path, pictures):
    """Options change the size of what the tower takes, and so of what is made of a picture."""
    run = random_run(tmp_path)
    file = open_run(run).checkpoint.path / "trainable.safetensors"
    section = open_run(run).recipe.model
    options = [f"llm.weights={section.llm.weights}", "tower.weights=null", "connector.weights=null"]
    options += ["image_size=56", "tower.train=full", "connector.train_qformer=full", "connector.train_queries=true"]
    options += ["num_query_token=5", "vit={embed_dim: 40, depth: 1, num_heads: 4}"]
    options += ["qformer={hidden_size: 36, num_hidden_layers: 1, num_attention_heads: 3, intermediate_size: 40}"]
    with pytest.raises(CheckpointError, match="missing: Qformer"):
        load_chat(checkpoint=file, model_type="qwen7b_chat", options=options)
    whole = build_random(options)
    write_tensors(
        {k: v for k, v in whole.state_dict().items() if "llm_model" not in k},
        tmp_path / "all.safetensors",
        torch.float32,
    )
    chat = load_chat(checkpoint=tmp_path / "all.safetensors", model_type="qwen7b_chat", options=options)
    assert chat.processor.image_size == 56 and chat.pixels(pictures[0]).shape == (1, 3, 56, 56)
    engine = Engine(chat)
    session = ChatSession(engine, chat.defaults.with_values({"max_new_tokens": 3}))
    assert isinstance("".join(session.ask("What is this?", [pictures[0]])), str)
    engine.close()


def build_random(options):
    return Vlm.from_config(load_model_config("minigpt4qwen", "qwen7b_chat", options))


def test_a_text_run_with_adapters_and_its_exports(tmp_path):
    """Chat, `export hf` and `export peft` of an LLM alone."""
    recipe = load_recipe(text_recipe(tmp_path))
    torch.manual_seed(0)
    model = Vlm.from_config(recipe.model)
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.data.normal_(std=0.2)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    save_checkpoint(tmp_path / "run/checkpoints", TrainState(1, 1), trained, {}, recipe.to_yaml())
    of_run = load_chat(run=tmp_path / "run")
    assert not any(".lora_" in name for name in of_run.model.state_dict()) and not of_run.sees
    assert main(["export", "hf", str(tmp_path / "run"), str(tmp_path / "hf"), "--dtype", "fp32"]) == 0
    assert main(["export", "peft", str(tmp_path / "run"), str(tmp_path / "peft")]) == 0
    assert not (tmp_path / "peft/projection.safetensors").exists()
    ids = torch.randint(3, 500, (1, 9))
    expected = model.eval().llm_model(ids).logits
    for llm in (
        of_run.llm,
        load_chat(checkpoint=tmp_path / "hf").llm,
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf"),
        PeftModel.from_pretrained(load_llm("shapes/llm_b"), tmp_path / "peft"),
    ):
        torch.testing.assert_close(llm(ids).logits, expected, rtol=1e-4, atol=1e-4)
    of_type = load_chat(
        checkpoint=tmp_path / "peft", model_type="causal_lm/default", options=["llm.weights=shapes/llm_b"]
    )
    torch.testing.assert_close(of_type.llm(ids).logits, expected, rtol=1e-4, atol=1e-4)


def text_recipe(folder):
    path = folder / "text.yaml"
    path.write_text(
        "model: {llm: {weights: shapes/llm_b, train: lora, lora: {rank: 2, targets: attention}}, max_length: 384}\n"
        "datasets: {shapes_text: {}}\nrun: {task: language_modeling}\n"
    )
    return path


def test_what_a_model_can_not_be_exported_as_is_said(tmp_path, chat):
    recipe = load_recipe("shapes/align", ["model.connector.name=qformer_linear"])
    config = recipe.model
    assert exporter_for("hf", config).problem(config) is None
    text = load_recipe(text_recipe(tmp_path)).model
    assert "this model has none" in EXPORTERS.get("blip2")().problem(text)
    assert type(exporter_for("hf", text)).__name__ == "TextLlmExporter"
    with pytest.raises(CheckpointError, match="can't be exported as gguf"):
        exporter_for("gguf", text)
