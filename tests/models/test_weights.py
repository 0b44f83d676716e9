import os
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from lavis.core.errors import CheckpointError
from lavis.models.vlm import Vlm
from lavis.weights.tensors import read_tensors
from tests.models.conftest import IMAGE_ID, model_config, small_llm, small_model, start_from, tower_settings


def original_names(model):
    """The tower under the names of the original BLIP-2 file, with what that file holds besides."""
    tensors = {}
    for name, value in model.state_dict().items():
        if name.startswith(("Qformer.", "ln_vision.", "query_tokens")):
            name = name.replace("Qformer.layernorm.", "Qformer.bert.embeddings.LayerNorm.")
            name = name.replace("Qformer.encoder.", "Qformer.bert.encoder.")
            name = re.sub(r"\.(attention|crossattention)\.attention\.", r".\1.self.", name)
            tensors[name] = value.clone()
    extras = ["t5_proj.weight", "Qformer.cls.predictions.bias", "Qformer.bert.embeddings.word_embeddings.weight"]
    extras += [
        "Qformer.bert.encoder.layer.0.intermediate.dense.weight",
        "Qformer.bert.encoder.layer.0.output.LayerNorm.bias",
    ]
    return tensors | {name: torch.ones(3) for name in extras}


def vit_file(model):
    """The ViT as eva_vit_g.pth has it: bare names, one block more, a norm and a head."""
    tensors = {
        k.removeprefix("visual_encoder."): v.clone()
        for k, v in model.state_dict().items()
        if k.startswith("visual_encoder.")
    }
    extra = {k.replace("blocks.1.", "blocks.2."): v for k, v in tensors.items() if k.startswith("blocks.1.")}
    return tensors | extra | {"fc_norm.weight": torch.ones(48), "head.weight": torch.ones(5, 48)}


def test_the_original_files_fill_the_tower(tmp_path):
    source, model = small_model(), small_model()
    for p in model.parameters():
        p.data.zero_()
    torch.save({"model": original_names(source)}, tmp_path / "blip2.pth")
    torch.save(vit_file(source), tmp_path / "eva.pth")
    vit = model.visual_encoder.load(str(tmp_path / "eva.pth"))
    rest = model.connector.load(str(tmp_path / "blip2.pth"))
    tower = {k: v for k, v in source.state_dict().items() if not k.startswith("llm_")}
    for name, value in tower.items():
        assert torch.equal(model.state_dict()[name], value), name
    assert len(vit.loaded) + len(rest.loaded) == len(tower)
    assert len(vit.ignored) == 13 + 2 and "visual_encoder.head.weight" in vit.ignored  # a block, norm and head
    assert len(rest.ignored) == 5 and "t5_proj.weight" in rest.ignored


def test_a_position_embedding_of_another_image_size_is_resized(tmp_path):
    source, model = small_model(), small_model(image_size=48)
    torch.save(vit_file(source), tmp_path / "eva.pth")
    report = model.visual_encoder.load(str(tmp_path / "eva.pth"))
    given, got = source.visual_encoder.model.pos_embed, model.visual_encoder.model.pos_embed
    grid = given[:, 1:].reshape(1, 4, 4, 48).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    assert report.resized == ("visual_encoder.pos_embed",)
    assert torch.equal(got[:, :1], given[:, :1])
    assert torch.allclose(got[:, 1:], grid.permute(0, 2, 3, 1).reshape(1, 36, 48), atol=1e-6)


def test_a_model_made_without_values_gets_all_of_them_from_its_files(tmp_path):
    source = small_model()
    torch.save({"model": original_names(source)}, tmp_path / "blip2.pth")
    torch.save(vit_file(source), tmp_path / "eva.pth")
    files = {"pretrained": str(tmp_path / "blip2.pth"), "vit_pretrained": str(tmp_path / "eva.pth")}
    config = model_config(**tower_settings(), **files)
    model = Vlm(config, small_llm(), IMAGE_ID, on_meta=True)
    assert model.connector.query_tokens.is_meta
    model.load_weights()
    assert not [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval().encode_images(pixels), source.eval().encode_images(pixels))
    assert not model.connector.query_tokens.requires_grad


def test_adapters_are_put_on_the_loaded_tower_and_each_has_an_effect(tmp_path):
    source = small_model()
    save_file(
        {k: v.clone() for k, v in source.state_dict().items() if not k.startswith("llm_")},
        tmp_path / "tower.safetensors",
    )
    adapters = {"get_lora": True, "lora_parts": ["vit", "qformer"], "lora_dropout": 0.0}
    config = model_config(**tower_settings(), pretrained=str(tmp_path / "tower.safetensors"), **adapters)
    model = Vlm(config, small_llm(), IMAGE_ID, on_meta=True)
    model.load_weights()
    pixels = torch.randn(2, 3, 32, 32)
    plain = source.eval().encode_images(pixels)
    torch.testing.assert_close(model.eval().encode_images(pixels), plain)
    adapted = {name: p for name, p in model.named_parameters() if ".lora_B." in name}
    assert any(".attn.qkv.lora_B" in name for name in adapted)
    for name, p in adapted.items():
        with torch.no_grad():
            p.normal_()
            changed = not torch.allclose(model.encode_images(pixels), plain, rtol=1e-3)
            p.zero_()
        assert changed, name


def test_missing_unexpected_and_misshapen_tensors_are_named_and_nothing_is_copied(tmp_path):
    model = small_model()
    before = model.connector.ln_vision.weight.clone()
    tensors = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("llm_")}
    tensors["ln_vision.weight"] += 1
    del tensors["ln_vision.bias"]
    tensors["query_tokens"] = torch.ones(1, 5, 40)
    tensors["stranger.weight"] = torch.ones(2)
    save_file(tensors, tmp_path / "tower.safetensors")
    with pytest.raises(CheckpointError) as error:
        model.connector.load(str(tmp_path / "tower.safetensors"))
    for part in (
        "missing: ln_vision.bias",
        "unexpected: stranger.weight",
        "query_tokens: [1, 5, 40] in the file, [1, 4, 40]",
    ):
        assert part in str(error.value)
    assert torch.equal(model.connector.ln_vision.weight, before)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_projection_file_loads_in_both_wrappings(tmp_path, wrapped):
    model = small_model()
    tensors = {"llm_proj.weight": torch.randn(64, 40), "llm_proj.bias": torch.randn(64)}
    torch.save({"model": tensors} if wrapped else tensors, tmp_path / "model.pth")
    start_from(model, tmp_path / "model.pth")
    assert torch.equal(model.connector.llm_proj.weight, tensors["llm_proj.weight"])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": Evil()}))
    torch.save({"model": Evil()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(CheckpointError, match=name):
            read_tensors(tmp_path / name)
    assert not (tmp_path / "evil-was-here").exists()


def test_truncated_and_absent_files_are_clear_errors(tmp_path):
    save_file({"a": torch.ones(100)}, tmp_path / "a.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-50])
    torch.save({"a": torch.ones(1000)}, tmp_path / "b.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "b.pth").read_bytes()[:-500])
    for name in ("cut.safetensors", "cut.pth", "absent.pth"):
        with pytest.raises(CheckpointError, match=name):
            read_tensors(tmp_path / name)
