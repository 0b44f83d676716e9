"""Towers of other libraries equal what those libraries compute, and consume every tensor of their files."""

import json
import re
from dataclasses import replace

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from lavis.config.recipe import recipe_from_dict
from lavis.core.errors import CheckpointError, ConfigError
from lavis.core.registries import TOWERS
from lavis.models.tower_configs import ClipConfig, Dinov2Config, HfVisionConfig, SiglipConfig, TimmConfig
from lavis.weights.tensors import check_fit

SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
VISION = SMALL | {"intermediate_size": 128}


def whole(kind):
    """A small CLIP or SigLIP with its text half, random weights."""
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = getattr(transformers, f"{kind}Config")(vision_config=VISION, text_config=TEXT | ids)
    return getattr(transformers, f"{kind}Model")(config).eval()


def dinov2(**settings):
    """A small DINOv2, random weights."""
    torch.manual_seed(0)
    return transformers.Dinov2Model(transformers.Dinov2Config(**SMALL | settings)).eval()


def built(config, on_meta=True):
    """The tower of `config`, filled from its weights as a model does it."""
    with torch.device("meta" if on_meta else "cpu"):
        tower = TOWERS.get(config.name).from_config(config)
    tower.load(config.weights)
    return tower.eval()


def pixels(size=56):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def states(model, x, **options):
    return model(pixel_values=x, output_hidden_states=True, **options)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("on_meta", [True, False])
def test_clip_is_the_last_hidden_state_but_one_without_the_class_token(tmp_path, on_meta):
    model = whole("CLIP")
    model.save_pretrained(tmp_path)
    config = ClipConfig(name="clip", weights=str(tmp_path))
    tower = built(config, on_meta)
    expected = states(model.vision_model, pixels()).hidden_states[-2][:, 1:]
    same(tower(pixels()), expected)
    assert expected.shape[1:] == (config.span(), config.width())
    assert (config.image_size, config.blocks(), len(list(tower.layers()))) == (56, 3, 3)


@torch.no_grad()
def test_a_pickle_with_position_ids_and_its_shards_are_read(tmp_path):
    """openai/clip-vit-large-patch14-336 is such a file."""
    model = whole("CLIP")
    model.config.save_pretrained(tmp_path)
    ids = {f"{half}_model.embeddings.position_ids": torch.arange(17)[None] for half in ("vision", "text")}
    torch.save(model.state_dict() | ids, tmp_path / "pytorch_model.bin")
    tower = built(ClipConfig(name="clip", weights=str(tmp_path)))
    same(tower(pixels()), states(model.vision_model, pixels()).hidden_states[-2][:, 1:])


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -3, 2])
def test_any_layer_with_the_class_token(tmp_path, layer):
    model = whole("CLIP")
    model.vision_model.save_pretrained(tmp_path)  # the vision half alone has bare names
    config = HfVisionConfig(name="hf_vision", weights=str(tmp_path), layer=layer, class_token="keep")
    expected = states(model.vision_model, pixels()).hidden_states[layer]
    same(built(config)(pixels()), expected)
    assert expected.shape[1] == config.span() == 17


@torch.no_grad()
def test_siglip_is_the_last_hidden_state(tmp_path):
    model = whole("Siglip")
    model.save_pretrained(tmp_path)
    config = SiglipConfig(name="siglip", weights=str(tmp_path))
    expected = states(model.vision_model, pixels()).last_hidden_state
    same(built(config)(pixels()), expected)
    assert expected.shape[1:] == (config.span(), config.width())
    raw = replace(config, layer=-2, final_norm=False)
    same(built(raw)(pixels()), states(model.vision_model, pixels()).hidden_states[-2])


@torch.no_grad()
def test_siglip2_of_any_aspect_ratio_reads_squares(tmp_path):
    vision = {k: v for k, v in VISION.items() if k != "image_size"} | {"num_patches": 16}
    config = transformers.Siglip2Config(vision_config=vision, text_config=TEXT | {"pad_token_id": 1})
    torch.manual_seed(0)
    model = transformers.Siglip2Model(config).eval()
    model.save_pretrained(tmp_path)
    for size in (56, 84):  # the second with resized positions
        grid = size // 14
        # transformers' own image processor flattens a patch as rows, columns, channels
        flat = torch.nn.functional.unfold(pixels(size), 14, stride=14).transpose(1, 2)
        flat = flat.reshape(2, grid * grid, 3, 14, 14).permute(0, 1, 3, 4, 2).reshape(2, grid * grid, -1)
        mask, shapes = torch.ones(2, grid * grid, dtype=torch.long), torch.tensor([[grid, grid]] * 2)
        expected = model.vision_model(flat, mask, shapes).last_hidden_state
        ours = SiglipConfig(name="siglip2", weights=str(tmp_path), image_size=None if size == 56 else size)
        assert (ours.image_size, ours.span()) == (size, grid * grid)
        same(built(ours)(pixels(size)), expected)


@torch.no_grad()
@pytest.mark.parametrize("size", [56, 84])
def test_dinov2_with_other_picture_sizes(tmp_path, size):
    model = dinov2()
    model.save_pretrained(tmp_path)
    config = Dinov2Config(name="dinov2", weights=str(tmp_path), image_size=size)
    expected = states(model, pixels(size)).last_hidden_state[:, 1:]
    assert expected.shape[1:] == (config.span(), config.width())
    same(built(config)(pixels(size)), expected)
    assert not any("mask_token" in name for name, _ in built(config).named_parameters())


@torch.no_grad()
def test_registers_are_dropped_with_the_class_token(tmp_path):
    torch.manual_seed(0)
    settings = transformers.Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3)
    model = transformers.Dinov2WithRegistersModel(settings).eval()
    model.save_pretrained(tmp_path)
    config = Dinov2Config(name="dinov2", weights=str(tmp_path))
    expected = states(model, pixels()).last_hidden_state
    same(built(config)(pixels()), expected[:, 4:])
    kept = replace(config, class_token="keep")
    assert kept.span() == expected.shape[1]
    same(built(kept)(pixels()), expected)


@torch.no_grad()
def test_internvit(tmp_path):
    settings = VISION | {"image_size": [56, 56], "patch_size": [14, 14]}
    torch.manual_seed(0)
    model = transformers.InternVLVisionModel(transformers.InternVLVisionConfig(**settings)).eval()
    model.save_pretrained(tmp_path)
    config = HfVisionConfig(name="hf_vision", weights=str(tmp_path), layer=-1, final_norm=True)
    same(built(config)(pixels()), model(pixels()).last_hidden_state[:, 1:])


@torch.no_grad()
def test_clip_of_another_picture_size_equals_interpolation(tmp_path):
    model = whole("CLIP")
    model.save_pretrained(tmp_path)
    config = ClipConfig(name="clip", weights=str(tmp_path), image_size=84)
    expected = states(model.vision_model, pixels(84), interpolate_pos_encoding=True).hidden_states[-2][:, 1:]
    same(built(config)(pixels(84)), expected)
    assert config.span() == 36


def test_weights_of_16_bits_give_vectors_of_the_pixels_type(tmp_path):
    whole("CLIP").half().save_pretrained(tmp_path)
    tower = built(ClipConfig(name="clip", weights=str(tmp_path)))
    assert {p.dtype for p in tower.parameters()} == {torch.float32}
    tower.cast_frozen(torch.bfloat16)
    vectors = tower.encode(pixels())
    assert (vectors.dtype, vectors.requires_grad) == (torch.float32, True)
    tower.freeze()
    assert not tower.encode(pixels()).requires_grad


def test_a_tower_is_trained_through_recomputation(tmp_path):
    whole("CLIP").save_pretrained(tmp_path)
    gradients = []
    for recompute in (False, True):
        tower = built(ClipConfig(name="clip", weights=str(tmp_path), train="full", recompute=recompute)).train()
        tower(pixels()).square().sum().backward()
        assert all(p.grad is not None for p in tower.parameters())  # nothing is there that is not used
        gradients.append(torch.cat([p.grad.flatten() for p in tower.parameters()]))
    torch.testing.assert_close(*gradients)


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    whole("CLIP").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp.fc1" not in k}, file)
    with pytest.raises(CheckpointError, match=r"missing: visual_encoder.encoder.layers.1.mlp.fc1.bias"):
        built(ClipConfig(name="clip", weights=str(tmp_path)))
    save_file(tensors | {"vision_model.encoder.stray": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"unexpected: visual_encoder.encoder.stray"):
        built(ClipConfig(name="clip", weights=str(tmp_path)))
    save_file({"something.else": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"no tensor called embeddings.patch_embedding.weight"):
        built(ClipConfig(name="clip", weights=str(tmp_path)))


def test_sections_are_checked_without_weights(tmp_path):
    config = ClipConfig(name="clip", weights=str(tmp_path / "nowhere"))
    assert config.image_size is None  # what its files say is not known yet
    with pytest.raises(CheckpointError, match="has no config.json"):
        config.span()
    planned = replace(config, config={"model_type": "clip_vision_model", **VISION})
    assert (planned.image_size, planned.span(), planned.width()) == (56, 16, 64)
    assert next(ClipConfig(name="clip").problems("model.tower")).startswith("model.tower.weights names no tower")
    assert not list(replace(planned, image_size=60).problems("model.tower"))  # as SigLIP-so400m's 384
    assert "no multiple" in next(replace(planned, image_size=10).problems("model.tower"))
    any_ratio = {"model_type": "siglip2_vision_model", **VISION, "num_patches": 16}
    assert "no multiple" in next(replace(planned, image_size=60, config=any_ratio).problems("model.tower"))
    with pytest.raises(ConfigError, match="layer is 9, but the tower has 4 blocks"):
        replace(planned, layer=9).blocks()
    with pytest.raises(ConfigError, match="'bert' cannot be a tower"):
        HfVisionConfig(config={"model_type": "bert"}).values()


def test_a_config_beside_a_weight_file(tmp_path):
    model = whole("CLIP").vision_model
    save_file(model.state_dict(), tmp_path / "clip.safetensors")
    values = {"model_type": "clip_vision_model", **VISION}
    config = ClipConfig(name="clip", weights=str(tmp_path / "clip.safetensors"), config=values)
    same(built(config)(pixels()), states(model, pixels()).hidden_states[-2][:, 1:])


@torch.no_grad()
def test_fewer_blocks_of_the_same_tower(tmp_path):
    whole("CLIP").save_pretrained(tmp_path)
    config = ClipConfig(name="clip", weights=str(tmp_path)).with_depth(2)
    tower = TOWERS.get("clip").from_config(config)
    assert (config.blocks(), len(list(tower.layers())), tower(pixels()).shape) == (2, 2, (2, 16, 64))


# ---- real sizes: the layouts of the hub, on the meta device

CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
SO400M_384 = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
DINOV2_L = {
    "model_type": "dinov2",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 518,
    "patch_size": 14,
}


def hub_names(tensors):
    """DINOv2's names on the hub, which transformers 5 renames when it reads them; those of the others are its own."""
    renames = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
    renames |= {"o_proj": "output.dense"}
    if not any(".attention.q_proj" in name for name in tensors):
        return tensors
    return {re.sub(r"(?<=attention\.)[qkvo]_proj", lambda m: renames[m[0]], name): t for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("name", "vision", "text", "span", "parameters"),
    [
        ("clip", CLIP_L_336, {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}, 576, 291e6),
        ("siglip", SO400M_384, {"hidden_size": 1152, "num_attention_heads": 16, "intermediate_size": 4304}, 729, 413e6),
        ("dinov2", DINOV2_L, None, 1369, 304e6),
    ],
)
def test_real_sizes_consume_every_key(tmp_path, name, vision, text, span, parameters):
    top = {"clip": "CLIP", "siglip": "Siglip"}.get(name)
    with torch.device("meta"):
        if top:
            config = getattr(transformers, f"{top}Config")(vision_config=vision, text_config=text)
            model = getattr(transformers, f"{top}Model")(config)
        else:
            config = transformers.Dinov2Config(**{k: v for k, v in vision.items() if k != "model_type"})
            model = transformers.Dinov2Model(config)
    # what the files on the hub say: the vision half's own keys, and no more
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name, "vision_config": vision} if top else vision))
    section = TOWERS.config(name)(name=name, weights=str(tmp_path))
    assert not list(section.problems("model.tower"))
    assert (section.span(), section.width(), section.image_size) == (
        span,
        vision["hidden_size"],
        vision["image_size"],
    )
    with torch.device("meta"):
        tower = TOWERS.get(name).from_config(section)
    file = hub_names(model.state_dict()) | (
        {"vision_model.embeddings.position_ids": torch.empty(1, 577)} if top else {}
    )
    found, left_out = tower.own_tensors(file)
    own = {f"visual_encoder.{k}": v.shape for k, v in tower.model.state_dict().items()}
    check_fit("real layout", own, {k: v.shape for k, v in found.items()}, lambda key: key in left_out)
    assert len(own) + len(left_out) == len(file)  # every key is loaded or named as left out
    behind = {key.removeprefix("visual_encoder.").split(".")[0] for key in left_out}
    assert (
        behind
        == {
            "clip": {
                "text_model",
                "logit_scale",
                "visual_projection",
                "text_projection",
                "post_layernorm",
                "encoder",
                "embeddings",
            },
            "siglip": {"text_model", "logit_scale", "logit_bias", "head", "embeddings"},
            "dinov2": {"embeddings"},  # the mask token
        }[name]
    )
    assert sum(p.numel() for p in tower.parameters()) == pytest.approx(parameters, rel=0.01)


# ---- timm


def timm_model(name, **settings):
    torch.manual_seed(0)
    return timm.create_model(name, **settings).eval()


TIMM = [
    ("vit_tiny_patch16_224", 1),  # class token
    ("vit_small_patch14_reg4_dinov2", 5),  # class token and registers, layer scale
    ("eva02_tiny_patch14_224", 1),  # rotary positions
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "prefix"), TIMM)
def test_timm(tmp_path, name, prefix):
    size = 64 if "patch16" in name else 56
    model = timm_model(name, img_size=size)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = TimmConfig(name="timm", model=name, weights=str(tmp_path / "model.safetensors"), image_size=size)
    whole_output = model.forward_features(pixels(size))
    same(built(config)(pixels(size)), whole_output[:, prefix:])
    assert (config.span(), config.width()) == tuple(whole_output[:, prefix:].shape[1:])
    same(built(replace(config, class_token="keep"), on_meta=False)(pixels(size)), whole_output)
    [third] = model.forward_intermediates(pixels(size), indices=[2], output_fmt="NLC", intermediates_only=True)
    cut = replace(config, layer=3, final_norm=False)
    same(built(cut)(pixels(size)), third)
    assert len(list(built(cut).layers())) == cut.blocks() == 3


@torch.no_grad()
def test_timm_with_a_pooling_head_and_another_picture_size(tmp_path):
    """SigLIP of timm pools by attention, which a tower has no use for; positions are resized as timm does it."""
    name = "vit_base_patch16_siglip_224"
    save_file(timm_model(name, num_classes=1000).state_dict(), tmp_path / "model.safetensors")
    config = TimmConfig(name="timm", model=name, weights=str(tmp_path), image_size=64)
    file = {"file": str(tmp_path / "model.safetensors")}
    reference = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=file, img_size=64, num_classes=1000)
    same(built(config)(pixels(64)), reference.eval().forward_features(pixels(64)))
    assert (config.span(), config.width()) == (16, 768)


def test_a_timm_section_is_checked():
    assert "Did you mean" in next(TimmConfig(model="siglip_224").problems("model.tower"))
    with pytest.raises(ConfigError, match="no ViT"):
        TimmConfig(model="resnet18").span()
    assert TimmConfig(model="vit_tiny_patch16_224").with_depth(2).blocks() == 2
    assert "names no ViT" in next(TimmConfig().problems("model.tower"))


def test_the_picture_size_of_a_section_is_that_of_its_model(tmp_path):
    """Not that of the schema's defaults, which a recipe's layers lie above."""
    whole("CLIP").save_pretrained(tmp_path)
    sections = {
        384: {"name": "timm", "model": "vit_base_patch16_siglip_384"},
        256: {"name": "timm", "model": "vit_base_patch16_siglip_384", "image_size": 256},
        56: {"name": "clip", "weights": str(tmp_path)},
    }
    for size, tower in sections.items():
        section = {"tower": tower, "connector": {"name": "mlp"}, "llm": {"weights": "somewhere"}}
        model = recipe_from_dict({"model": section, "data": {}, "run": {}}).model
        assert model.tower.image_size == size
        assert model.tokens_per_tile == (size // (14 if size == 56 else 16)) ** 2


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_adapters_take_part(name):
    """EVA's attention reads the weight of its qkv layer past an adapter unless it is asked not to."""
    config = TimmConfig(name="timm", model=name, image_size=56 if "14" in name else 64, layer=2, train="lora")
    tower = TOWERS.get("timm").from_config(config)
    tower.freeze()
    tower.adapt()
    assert tower.trained
    for name, p in tower.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)  # of zeros lora_A would have no gradient
    tower.encode(pixels(config.image_size)).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad == ("lora_" in n) for n, p in tower.named_parameters())
    assert tower.borrowed_parameters() == []


HALF, IMAGENET = [0.5] * 3, [0.485, 0.456, 0.406]


def media_of(tower, **media):
    """`media` as a recipe with this tower has it."""
    model = {"arch": "vlm", "tower": tower, "connector": {"name": "linear"}, "llm": {"weights": "shapes/llm_b"}}
    data = {"train": [{"source": "shapes_instruction"}]}
    return recipe_from_dict({"model": model | {"media": media}, "data": data}).model.media


@pytest.mark.parametrize(
    ("name", "kind", "mean"),
    [("siglip", "siglip_vision_model", HALF), ("dinov2", "dinov2", IMAGENET), ("clip", "clip_vision_model", None)],
)
def test_pictures_are_normalised_as_the_tower_was_trained(tmp_path, name, kind, mean):
    tower = {"name": name, "config": VISION | {"model_type": kind}, "train": "full"}
    assert media_of(tower).mean == mean
    assert media_of(tower, mean=[0.1, 0.2, 0.3]).mean == [0.1, 0.2, 0.3]  # a recipe has the last word
    (tmp_path / "config.json").write_text(json.dumps(tower["config"]))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.2] * 3}))
    found = media_of({"name": name, "weights": str(tmp_path), "train": "full"})
    assert (found.mean, found.std) == ([0.4] * 3, [0.2] * 3)


def test_pictures_for_a_vit_of_timm_are_normalised_as_timm_says():
    for model in ("vit_tiny_patch16_224", "vit_base_patch16_clip_224"):
        expected = timm.get_pretrained_cfg(model)
        media = media_of({"name": "timm", "model": model, "train": "full"})
        assert (media.mean, media.std) == (list(expected.mean), list(expected.std))
