"""A LLaVA equals transformers' LlavaForConditionalGeneration, and its folders are read, written and started from."""

import json
import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from lavis.config.init import Init
from lavis.core.errors import CheckpointError
from lavis.core.types import Batch
from lavis.models.adapters import merge_lora
from lavis.models.configs import VlmConfig
from lavis.models.connector_configs import LinearConfig, MlpConfig
from lavis.models.hf import llava
from lavis.models.part_configs import EvaConfig
from lavis.models.parts import LoraSettings
from lavis.models.vlm import Vlm
from lavis.weights.trained import trained_file

IMAGE, VOCABULARY, SIZE, SPAN = 98, 120, 56, 16
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": 14,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def stock_llava(**settings):
    """A small random LLaVA of transformers in which no tensor is trivial."""
    torch.manual_seed(0)
    given = {"vision_config": CLIP, "text_config": LLAMA, "image_token_index": IMAGE, "image_seq_length": SPAN}
    model = LlavaForConditionalGeneration(LlavaConfig(**given | settings)).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def hub_folder(model, folder):
    """`model` as llava-hf/llava-1.5-7b-hf lies on the hub: names of before transformers 5, no processor here."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    renamed = {re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name): t for name, t in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def batch(rows=2, length=40):
    """Rows with a picture at another place each; the first ten positions of a row are not supervised."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, IMAGE, (rows, length), generator=generator)
    for row in range(rows):
        ids[row, 4 + row : 4 + row + SPAN] = IMAGE
    labels = ids.masked_fill((ids == IMAGE) | (torch.arange(length) < 10), -100)
    pixels = torch.randn(rows, 3, SIZE, SIZE, generator=generator)
    return Batch(ids, labels, torch.arange(length).expand(rows, -1), pixel_values=pixels)


def logits(model, batch):
    return model.llm_model.get_output_embeddings()(model.hidden(batch))


def loss(logits, labels):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def trained(config, adapters=0):
    """`config` with a trained connector and, with `adapters`, LoRA of that rank on tower and LLM."""
    config = replace(config, connector=replace(config.connector, train="full"))
    if not adapters:
        return config
    lora = LoraSettings(rank=adapters, alpha=2 * adapters, dropout=0.0, targets=["q_proj", "v_proj"])
    tower, llm = (replace(part, train="lora", lora=lora) for part in (config.tower, config.llm))
    return replace(config, tower=tower, llm=llm)


def read(folder, config=None):
    """The Vlm in a LLaVA folder; `config` says what is trained of it."""
    if config is None:
        return Vlm.from_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    torch.manual_seed(0)
    model = Vlm.from_pretrained(folder)
    again = Vlm(config, model.llm_model, values["image_token_index"])
    again.load_state_dict(model.state_dict())
    again.add_adapters()
    return again


def test_features_logits_and_loss(tmp_path):
    stock = stock_llava()
    model, data = read(hub_folder(stock, tmp_path)), batch()
    with torch.no_grad():
        features = stock.get_image_features(data.pixel_values, return_dict=True).pooler_output
        same(model.connector(model.visual_encoder.encode(data.pixel_values)), torch.stack(features))
        out = stock(input_ids=data.input_ids, pixel_values=data.pixel_values, labels=data.labels)
        same(logits(model, data), out.logits)
        same(loss(logits(model, data), data.labels), out.loss)
    assert model.config.tokens_per_tile == SPAN and model.image_token_id == IMAGE


def test_gradients_of_connector_and_adapters(tmp_path):
    stock = stock_llava()
    folder = hub_folder(stock, tmp_path)
    config = trained(llava.own_config(json.loads((folder / "config.json").read_text()), str(folder)), adapters=4)
    model, data = read(folder, config), batch()
    stock.requires_grad_(False)
    stock.model.multi_modal_projector.requires_grad_(True)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    inject_adapter_in_model(lora, stock.model.language_model)
    inject_adapter_in_model(lora, stock.model.vision_tower)
    theirs = dict(stock.model.named_parameters())
    pairs = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            other = theirs[_stock_name(name)]
            torch.nn.init.normal_(p, std=0.05)
            other.data.copy_(p.data)
            pairs.append((name, p, other))
    loss(logits(model, data), data.labels).backward()
    stock(input_ids=data.input_ids, pixel_values=data.pixel_values, labels=data.labels).loss.backward()
    # the tower ends at the hidden state that is taken: adapters of the block behind it would have no gradient
    assert len(pairs) == 4 + 2 * 2 * (3 + 2)
    for name, p, other in pairs:
        assert p.grad.abs().sum() > 0, name
        same(p.grad, other.grad)


def _stock_name(name):
    for pattern, there in (
        (r"^mm_projector\.0\.", "multi_modal_projector.linear_1."),
        (r"^mm_projector\.2\.", "multi_modal_projector.linear_2."),
        (r"^visual_encoder\.", "vision_tower."),
        (r"^llm_model\.model\.", "language_model."),
    ):
        name = re.sub(pattern, there, name)
    return name


@pytest.mark.parametrize("settings", [{}, {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}])
def test_written_again_it_is_the_same_stock_model(tmp_path, settings):
    """Read, trained a little through adapters, merged, written, opened by transformers, read again."""
    folder = hub_folder(stock_llava(**settings), tmp_path / "hub")
    config = trained(llava.own_config(json.loads((folder / "config.json").read_text()), str(folder)), adapters=2)
    model, data = read(folder, config), batch()
    if settings:
        data = replace(data, input_ids=data.input_ids.clone())
        data.input_ids[:, 4 : 4 + 17], data.input_ids[:, 21] = IMAGE, 5
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn_like(p)
    merge_lora(model.eval())
    with torch.no_grad():
        expected = logits(model, data)
        llava.to_stock(model, [2], 0).save_pretrained(tmp_path / "out")
        stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
        same(stock(input_ids=data.input_ids, pixel_values=data.pixel_values).logits, expected)
        again = read(tmp_path / "out")
        same(logits(again, data), expected)
        again.save_pretrained(tmp_path / "own")
        same(logits(Vlm.from_pretrained(tmp_path / "own"), data), expected)


def test_another_run_starts_from_its_parts(tmp_path):
    """`init: [{from: FOLDER, parts: [...]}]`."""
    source = read(hub_folder(stock_llava(), tmp_path))
    target = Vlm(source.config, copy_of(source.llm_model), IMAGE)
    before = {name: t.clone() for name, t in target.state_dict().items()}
    target.load_weights([Init(str(tmp_path), ("connector", "tower"))])
    for name, tensor in target.state_dict().items():
        own = not name.startswith("llm_model.")
        assert torch.equal(tensor, source.state_dict()[name] if own else before[name]), name
    whole = Vlm(source.config, copy_of(source.llm_model), IMAGE)
    whole.load_weights([Init(str(tmp_path))])
    same(logits(whole, batch()), logits(source, batch()))


def copy_of(llm):
    torch.manual_seed(5)
    return type(llm)(llm.config)


def test_other_models_are_refused_in_words(tmp_path):
    config = llava.own_config(
        json.loads((hub_folder(stock_llava(), tmp_path) / "config.json").read_text()), str(tmp_path)
    )
    assert llava.why_not(config) is None
    assert "not a vision model" in llava.why_not(VlmConfig())
    assert "not a vision model of transformers" in llava.why_not(replace(config, tower=EvaConfig()))
    assert "not an mlp of depth 2" in llava.why_not(replace(config, connector=LinearConfig()))
    assert "not an mlp of depth 2" in llava.why_not(replace(config, connector=MlpConfig(depth=3)))
    assert "tiles" in llava.why_not(replace(config, media=replace(config.media, tiling="anyres")))
    siglip = {**CLIP, "model_type": "siglip_vision_model"}
    normed = replace(config.tower, config=siglip, final_norm=True)
    assert "final_norm=false" in llava.why_not(replace(config, tower=normed))
    values = json.loads((tmp_path / "config.json").read_text())
    for change in ({"vision_feature_layer": [-2, -1]}, {"projector_hidden_act": "relu"}, {"vision_config": siglip}):
        with pytest.raises(CheckpointError, match="parts that cannot be read"):
            llava.own_config(values | change, str(tmp_path))


def test_real_sizes_consume_every_key(tmp_path):
    """llava-1.5-7b-hf: 686 tensors of 7.06 G numbers; the last block of CLIP and its last norm are left out."""
    values = {
        "model_type": "llava",
        "image_token_index": 32000,
        "text_config": {
            "model_type": "llama",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-05,
            "vocab_size": 32064,
        },
        "vision_config": CLIP
        | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"image_size": 336, "projection_dim": 768},
    }
    with torch.device("meta"):
        stock = LlavaForConditionalGeneration(LlavaConfig.from_dict(dict(values)))
    file = {_hub_name(name): tensor for name, tensor in stock.state_dict().items()}
    config = llava.own_config(values, str(tmp_path))
    assert (config.tokens_per_tile, config.max_length, config.tower.blocks()) == (576, 2048, 23)
    with torch.device("meta"):
        llm = LlamaForCausalLM(LlamaConfig.from_dict(values["text_config"]))
    model = Vlm(config, llm, 32000, all_on_meta=True)
    own = llava.own_tensors(file, config)
    assert {name: t.shape for name, t in own.items()} == {name: t.shape for name, t in model.state_dict().items()}
    assert (len(file), len(file) - len(own)) == (686, 16 + 2)
    assert sum(t.numel() for t in file.values()) == 7_063_427_072


def _hub_name(name):
    for pattern, there in (
        (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
    ):
        name = re.sub(pattern, there, name)
    return name


def test_a_recipe_s_output_folder_means_its_newest_run(tmp_path):
    for run in ("20260101_000000", "20260102_000000", "20260103_000000"):
        (tmp_path / run / "checkpoints").mkdir(parents=True)
    for run in ("20260101_000000", "20260102_000000"):  # the newest has no checkpoint yet
        step = tmp_path / run / "checkpoints" / "step-10"
        step.mkdir()
        (step / "COMPLETE").write_text(json.dumps({"valid_loss": None, "step": 10}))
    found = trained_file(tmp_path)
    assert found == tmp_path / "20260102_000000" / "checkpoints" / "step-10" / "trainable.safetensors"
    with pytest.raises(CheckpointError, match="holds no trained parts"):
        trained_file(tmp_path / "20260103_000000")
