"""First-generation Qwen folders read as Qwen2."""

import json
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2ForCausalLM

from lavis.core.errors import CheckpointError, ConfigError, DataError
from lavis.models.llm import check_context, generate, load_llm
from lavis.models.vlm import Vlm
from lavis.weights.qwen1 import open_qwen1
from lavis.weights.shards import Shards
from tests.models.conftest import IMAGE_ID, batch_of, model_config, start_from, tower_settings
from tests.models.qwen1_reference import (
    CONFIG,
    FOURTEEN_B,
    SEVEN_B,
    layout,
    logits,
    random_weights,
    write_folder,
    write_vocabulary,
)


@pytest.fixture(scope="module")
def weights():
    return random_weights()


def relative(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize(("form", "shards"), [("safetensors", 3), ("safetensors", 1), ("bin", 2), ("bin", 1)])
def test_logits_equal_a_plain_implementation(tmp_path, weights, form, shards):
    model = load_llm(str(write_folder(tmp_path, weights, form=form, shards=shards)))
    ids = torch.randint(0, CONFIG["vocab_size"], (CONFIG["seq_length"],), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert relative(model(ids[None]).logits[0], logits(weights, ids)) < 1e-5
    assert not model.training and model.generation_config.top_p == 0.8


def test_every_tensor_matters_to_that_comparison(weights):
    ids = torch.randint(0, CONFIG["vocab_size"], (CONFIG["seq_length"],))
    wanted = logits(weights, ids)
    for name in weights:
        changed = weights | {name: weights[name].roll(1, 0)}
        assert relative(logits(changed, ids), wanted) > 1e-3, name


def test_weights_get_the_type_asked_for_and_memory_of_their_own(tmp_path, weights):
    folder = write_folder(tmp_path, {k: v.bfloat16() for k, v in weights.items()})
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = load_llm(str(folder), dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        k_bias = weights["transformer.h.1.attn.c_attn.bias"][48:96].bfloat16().to(dtype)
        assert torch.equal(model.model.layers[1].self_attn.k_proj.bias, k_bias)
        storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert len(storages) == len(list(model.parameters()))
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    assert load_llm(str(folder), "auto").dtype == torch.bfloat16
    assert load_llm(str(folder), device_map="auto").lm_head.weight.device.type in ("cpu", "cuda")


def test_a_tied_head_is_the_embedding(tmp_path, weights):
    config = CONFIG | {"tie_word_embeddings": True}
    embedding = weights["transformer.wte.weight"]
    for head in ({}, {"lm_head.weight": embedding.clone()}):
        rest = {k: v for k, v in weights.items() if k != "lm_head.weight"}
        folder = write_folder(tmp_path / str(len(head)), rest | head, config)
        model = load_llm(str(folder))
        assert model.lm_head.weight is model.model.embed_tokens.weight and torch.equal(model.lm_head.weight, embedding)


def test_saved_tables_are_ignored_and_nothing_else_is(tmp_path, weights):
    tables = {
        "transformer.rotary_emb.inv_freq": torch.ones(6),
        "transformer.h.2.attn.rotary_emb.inv_freq": torch.ones(6),
    }
    load_llm(str(write_folder(tmp_path / "a", weights | tables)))
    wrong = {k: v for k, v in weights.items() if k not in ("transformer.h.1.mlp.w2.weight", "lm_head.weight")}
    wrong |= {"transformer.h.3.ln_1.weight": torch.ones(48), "transformer.h.0.attn.c_attn.weight": torch.ones(144, 40)}
    with pytest.raises(CheckpointError) as error:
        load_llm(str(write_folder(tmp_path / "b", wrong)))
    for part in (
        "missing: lm_head.weight, transformer.h.1.mlp.w2.weight",
        "unexpected: transformer.h.3.ln_1.weight",
        "transformer.h.0.attn.c_attn.weight: [144, 40] in the file, [144, 48] in the model",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"bits": 4, "quant_method": "gptq"}}, "quantised Qwen weights, which can't be read"),
        ({"no_bias": False}, "no_bias False instead of True"),
        ({"rotary_pct": 0.25}, "rotary_pct 0.25 instead of 1.0"),
        ({"kv_channels": 16}, "kv_channels x num_attention_heads unlike hidden_size"),
        ({"hidden_size": "48"}, "is not the configuration of a Qwen-7B or Qwen-14B"),
        ({"seq_length": None}, "is not the configuration of a Qwen-7B or Qwen-14B"),
    ],
)
def test_other_configurations_are_refused(tmp_path, weights, change, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_llm(str(write_folder(tmp_path, weights, CONFIG | change)))


def test_a_configuration_without_a_key_names_it(tmp_path, weights):
    config = {k: v for k, v in CONFIG.items() if k != "rotary_emb_base"}
    with pytest.raises(CheckpointError, match="has no 'rotary_emb_base'"):
        load_llm(str(write_folder(tmp_path, weights, config)))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_missing_and_truncated_shards_are_named_with_what_they_hold(tmp_path, weights, form):
    folder = write_folder(tmp_path, weights, form=form, shards=2)
    shard = sorted(folder.glob(f"*-00002-*.{form}"))[0]
    content = shard.read_bytes()
    for damage in (
        lambda: shard.write_bytes(content[: len(content) // 2]),
        lambda: shard.write_bytes(b""),
        shard.unlink,
    ):
        damage()
        with pytest.raises(CheckpointError) as error:
            load_llm(str(folder))
        assert shard.name in str(error.value) and "it holds transformer.h.1.attn.c_attn.bias" in str(error.value)


def test_an_index_that_does_not_tell_the_truth_is_refused(tmp_path, weights):
    folder = write_folder(tmp_path, weights)
    index = folder / "model.safetensors.index.json"
    files = json.loads(index.read_text())
    files["weight_map"]["lm_head.weight"] = "model-00003-of-00003.safetensors"
    index.write_text(json.dumps(files))
    with pytest.raises(CheckpointError, match=r"00003-of-00003.safetensors lacks lm_head.weight, which the index"):
        load_llm(str(folder))
    for content in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"lm_head.weight": 3}}'):
        index.write_text(content)
        with pytest.raises(CheckpointError, match=re.escape(str(index))):
            load_llm(str(folder))


def test_a_folder_without_weights_or_with_a_broken_config_is_told(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match="holds no weights: none of model.safetensors"):
        load_llm(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json can't be read"):
        load_llm(str(tmp_path))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def test_a_malicious_shard_is_refused_and_nothing_runs(tmp_path, weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_folder(tmp_path / "model", weights, form="bin", shards=2)
    shard = folder / "pytorch_model-00001-of-00002.bin"
    torch.save(torch.load(shard, weights_only=True) | {"extra": Evil()}, shard)
    with pytest.raises(CheckpointError, match=f"{shard.name} holds more than tensors"):
        load_llm(str(folder))
    shard.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=shard.name):
        load_llm(str(folder))
    assert not (tmp_path / "evil-was-here").exists()


@pytest.mark.parametrize(("config", "billions"), [(SEVEN_B, 7.721), (FOURTEEN_B, 14.167)])
def test_the_published_layouts_are_consumed_in_full(tmp_path, monkeypatch, config, billions):
    shapes = {name: torch.Size(shape) for name, shape in layout(config).items()}

    def opened(self, folder):
        self.shapes = shapes
        self.read = lambda name: torch.empty(shapes[name], device="meta")

    monkeypatch.setattr(Shards, "__init__", opened)
    (tmp_path / "config.json").write_text(json.dumps(config))
    qwen2, tensors = open_qwen1(tmp_path)
    own = {name: tensor[...].shape for name, tensor in tensors.items()}
    with torch.device("meta"):
        assert own == {name: tensor.shape for name, tensor in Qwen2ForCausalLM(qwen2).state_dict().items()}
    assert round(sum(shape.numel() for shape in own.values()) / 1e9, 3) == billions
    assert qwen2.max_position_embeddings == config["seq_length"]


MEMORY = """
import re, sys, torch
from pathlib import Path
from lavis.models.llm import load_llm
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
load_llm(sys.argv[1])
before = peak()
model = load_llm(sys.argv[2], getattr(torch, sys.argv[3]))
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("form", "dtype"), [("safetensors", "float32"), ("bin", "bfloat16")])
def test_loading_takes_little_more_memory_than_the_model(tmp_path, weights, form, dtype):
    config = CONFIG | {"hidden_size": 512, "kv_channels": 128, "intermediate_size": 4096, "num_hidden_layers": 24}
    large = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in layout(config).items()}
    folders = write_folder(tmp_path / "small", weights), write_folder(tmp_path / "large", large, config, form, shards=1)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, folders), dtype], capture_output=True, text=True, check=True
    )
    assert 0.9 < float(done.stdout) < 1.2


def test_contexts_beyond_seq_length_are_refused(tmp_path, weights):
    model = load_llm(str(write_folder(tmp_path, weights)))
    check_context(model, 64)
    with pytest.raises(ConfigError, match="model.max_length is 65, but the LLM reads at most 64"):
        check_context(model, 65)
    prompt = torch.randn(1, 60, 48)
    assert len(generate(model, prompt, [60], [512], 0, max_new_tokens=30, do_sample=False)[0]) == 4
    with pytest.raises(DataError, match="a prompt of 64 tokens leaves no room"):
        generate(model, torch.randn(1, 64, 48), [64], [511], 0)


def test_a_recipe_sees_through_it(tmp_path, weights):
    folder = write_folder(tmp_path, weights)
    end = len(write_vocabulary(folder)) + 2
    settings = tower_settings(llm_model=str(folder), vit_model="eva_clip_g", load_pretrained=False)
    model = Vlm.from_config(model_config(**settings, max_txt_len=64)).eval()
    assert model.image_token_id == end + 1
    batch = batch_of([20], [1])
    batch.input_ids[batch.input_ids == IMAGE_ID] = model.image_token_id
    assert len(model.generate(batch, [end], 0, max_new_tokens=5, do_sample=False)[0]) <= 5
    with pytest.raises(ConfigError, match="model.max_length is 65, but the LLM reads at most 64"):
        Vlm.from_config(model_config(**settings, max_txt_len=65))


def test_four_bit_weights_are_made_while_reading(tmp_path, weights):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    gate = load_llm(str(write_folder(tmp_path, weights)), quantization="int4").model.layers[1].mlp.gate_proj
    values = bitsandbytes.functional.dequantize_4bit(gate.weight.data, gate.weight.quant_state)
    assert gate.weight.dtype == torch.uint8 and relative(values, weights["transformer.h.1.mlp.w2.weight"]) < 0.2


def test_the_originals_full_dict_fills_the_language_model(tmp_path, weights):
    model = Vlm(model_config(**tower_settings()), load_llm(str(write_folder(tmp_path, random_weights(seed=1)))), 299)
    full = {f"llm_model.{name}": tensor for name, tensor in weights.items()}
    full |= {
        "llm_proj.weight": torch.randn(48, 40),
        "llm_proj.bias": torch.randn(48),
        "llm_model.transformer.rotary_emb.inv_freq": torch.ones(6),
    }
    torch.save({"model": full}, tmp_path / "model.pth")
    start_from(model, tmp_path / "model.pth")
    ids = torch.randint(0, CONFIG["vocab_size"], (20,))
    with torch.inference_mode():
        assert relative(model.llm_model(ids[None]).logits[0], logits(weights, ids)) < 1e-5
    assert torch.equal(model.connector.llm_proj.bias, full["llm_proj.bias"])


def test_another_language_model_keeps_names_that_look_alike(tmp_path):
    llm = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=48, n_layer=1, n_head=4))
    model = Vlm(model_config(**tower_settings()), llm, 299)
    name = "llm_model.transformer.h.0.attn.c_attn.weight"
    tensors = {name: torch.randn(48, 144), "llm_proj.weight": torch.randn(48, 40), "llm_proj.bias": torch.randn(48)}
    torch.save(tensors, tmp_path / "model.pth")
    start_from(model, tmp_path / "model.pth")
    assert torch.equal(model.state_dict()[name], tensors[name])
