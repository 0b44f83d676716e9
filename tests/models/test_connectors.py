"""Connectors equal those of transformers' models; spans are what comes out."""

import pytest
import torch
from transformers import InternVLConfig, LlavaConfig
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from lavis.core.errors import CheckpointError, ConfigError
from lavis.core.registries import CONNECTORS
from lavis.models.connector_configs import PixelShuffleConfig, ResamplerConfig

TOWER, LLM = 32, 48


def vectors(tokens=16):
    return torch.randn(3, tokens, TOWER, generator=torch.Generator().manual_seed(0))


def new(name, **settings):
    torch.manual_seed(1)
    config = CONNECTORS.config(name)(name=name, **settings)
    return CONNECTORS.get(name).from_config(config, TOWER, LLM)


@pytest.mark.parametrize("name", ["linear", "mlp", "pixel_shuffle", "resampler"])
def test_span_width_and_gradients(name):
    connector = new(name)
    out = connector(vectors())
    assert out.shape == (3, connector.config.span(16), LLM)
    out.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in connector.parameters())


def test_mlp_is_llava_s():
    ours = new("mlp")
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "hidden_size": TOWER, "num_attention_heads": 4},
        text_config={"model_type": "llama", "hidden_size": LLM, "num_attention_heads": 4, "num_key_value_heads": 4},
    )
    theirs = LlavaMultiModalProjector(config)
    for own, layer in (("mm_projector.0", theirs.linear_1), ("mm_projector.2", theirs.linear_2)):
        layer.load_state_dict(ours.get_submodule(own).state_dict())
    torch.testing.assert_close(ours(vectors()), theirs(vectors()), rtol=1e-5, atol=1e-5)


def test_pixel_shuffle_is_internvl_s():
    ours = new("pixel_shuffle")
    config = InternVLConfig(
        vision_config={"hidden_size": TOWER, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 8},
        text_config={"model_type": "qwen2", "hidden_size": LLM, "num_attention_heads": 4, "num_hidden_layers": 1},
    )
    theirs = InternVLMultiModalProjector(config)
    for own, layer in (("0", theirs.layer_norm), ("1", theirs.linear_1), ("3", theirs.linear_2)):
        layer.load_state_dict(ours.mlp1.get_submodule(own).state_dict())
    grid = InternVLModel.pixel_shuffle(None, vectors().reshape(3, 4, 4, TOWER), scale_factor=0.5)
    torch.testing.assert_close(ours(vectors()), theirs(grid.reshape(3, 4, -1)), rtol=1e-5, atol=1e-5)


def test_pixel_shuffle_wants_a_grid_that_can_be_divided():
    with pytest.raises(ConfigError, match="17 vectors are no square grid"):
        PixelShuffleConfig(name="pixel_shuffle").span(17)
    with pytest.raises(ConfigError, match="whose side 2 divides"):
        PixelShuffleConfig(name="pixel_shuffle").span(9)
    assert PixelShuffleConfig(name="pixel_shuffle").span(1024) == 256


def test_depth_and_width():
    assert len(new("mlp", depth=3).mm_projector) == 5
    assert new("resampler", queries=5, width=16, heads=2)(vectors(9)).shape == (3, 5, LLM)
    assert "no multiple of the 8 heads" in next(ResamplerConfig(width=20).problems("model.connector"))
    with pytest.raises(ConfigError, match="cannot have 7 heads"):
        new("resampler", heads=7)


def test_llava_s_own_projector_file_is_read(tmp_path):
    source, target = new("mlp"), new("mlp", train="frozen")
    torch.nn.init.zeros_(target.mm_projector[0].weight)
    torch.save({f"model.{name}": t for name, t in source.state_dict().items()}, tmp_path / "mm_projector.bin")
    target.load(str(tmp_path / "mm_projector.bin"))
    torch.testing.assert_close(target(vectors()), source(vectors()))
    torch.save({"model.mm_projector.0.weight": source.mm_projector[0].weight}, tmp_path / "part.bin")
    with pytest.raises(CheckpointError, match=r"missing: mm_projector.0.bias"):
        target.load(str(tmp_path / "part.bin"))
