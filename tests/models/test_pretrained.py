"""save_pretrained and from_pretrained: the same model, bit for bit.

What transformers' own folder gives is in tests/export.
"""

import json

import pytest
import torch

from lavis.core.errors import CheckpointError, ConfigError
from lavis.models.vlm import Vlm
from tests.models.conftest import batch_of, loss_of, small_model


@pytest.mark.parametrize("changes", [{}, {"get_lora": True}, {"freeze_llm": False, "freeze_vit": False}])
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_round_trip(tmp_path, changes, size):
    model = small_model(**changes).eval()
    model.llm_model.generation_config.repetition_penalty = 1.05
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (size == "5GB")
    again = Vlm.from_pretrained(tmp_path)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(theirs[k], ours[k]) for k in ours)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert again.llm_model.generation_config.repetition_penalty == 1.05 and not again.training
    batch = batch_of([19, 12], [2, 1])
    assert torch.equal(loss_of(model, batch), loss_of(again, batch))


def test_a_tied_head_is_saved_once(tmp_path):
    model = small_model()
    model.llm_model.config.tie_word_embeddings = True
    model.llm_model.tie_weights()
    model.save_pretrained(tmp_path)
    again = Vlm.from_pretrained(tmp_path).llm_model
    assert torch.equal(again.lm_head.weight, model.llm_model.lm_head.weight)
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()


def test_what_is_no_such_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Vlm.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava_next"}')
    with pytest.raises(CheckpointError, match="'llava_next'"):
        Vlm.from_pretrained(tmp_path)


def test_a_tensor_too_few(tmp_path):
    from safetensors.torch import load_file, save_file

    small_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["ln_vision.bias"], tensors["llm_model.model.layers.1.self_attn.q_proj.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"missing: llm_model\.model\.layers\.1\.self_attn\.q_proj\.bias, ln_vision\.bias"
    ):
        Vlm.from_pretrained(tmp_path)


def test_a_section_of_another_version(tmp_path):
    small_model().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["model"]["colour"] = "red"
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"model\.colour"):
        Vlm.from_pretrained(tmp_path)


def test_quantised_weights_are_not_saved(tmp_path):
    model = small_model()
    model.config.llm.quantization = "int4"
    with pytest.raises(ConfigError, match="int4"):
        model.save_pretrained(tmp_path)
