"""What `init` names: strict within the parts, and nothing else is touched."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lavis.config.init import Init, inits
from lavis.core.errors import CheckpointError
from lavis.models.initial import load_initial
from lavis.weights.trained import trained_file
from tests.models.conftest import small_model


def start(model, source, *parts, filled=None):
    """Load `source` into `model`, whose weight files brought all but the linear layer."""
    brought = {name for name in model.state_dict() if not name.startswith("llm_proj.") and ".lora_" not in name}
    brought = {name.replace(".base_layer.", ".") for name in brought}
    return load_initial(model.state_dict(), Init(str(source), parts), model.visual_encoder, filled or brought)


def saved(path, tensors):
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


def projection(model):
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith("llm_proj.")}


@pytest.mark.parametrize("changes", [{"get_lora": True}, {"freeze_llm": False}, {"freeze_vit": False}])
def test_a_trained_projection_is_the_start_of_any_later_stage(tmp_path, changes):
    first, second = small_model(), small_model(**changes)
    for p in first.parameters():
        p.data += 1
    before = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    report = start(second, saved(tmp_path / "p.safetensors", projection(first)), "connector")
    assert report.loaded == ("llm_proj.bias", "llm_proj.weight")
    for name, tensor in second.state_dict().items():
        expected = first.state_dict()[name] if name.startswith("llm_proj.") else before[name]
        assert torch.equal(tensor, expected), name


def test_a_part_is_taken_whole_and_others_are_left(tmp_path):
    source, model = small_model(), small_model(get_lora=True, lora_parts=["llm", "vit"])
    for p in source.parameters():
        p.data += 1
    file = saved(tmp_path / "all.safetensors", source.state_dict())
    start(model, file, "tower", "llm")
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in source.state_dict().items():
        taken = name.startswith(("visual_encoder.", "llm_model."))
        assert torch.equal(state[name], tensor) == taken, name


def test_what_does_not_fit_is_named(tmp_path):
    source, model = small_model(), small_model()
    tensors = source.state_dict()
    with pytest.raises(CheckpointError, match="missing: llm_proj.bias"):
        start(model, saved(tmp_path / "a.safetensors", {"llm_proj.weight": tensors["llm_proj.weight"]}))
    odd = projection(source) | {"llm_proj.scale": torch.ones(1), "visual_encoder.odd": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"unexpected: llm_proj.scale\.$"):
        start(model, saved(tmp_path / "b.safetensors", odd), "connector")
    with pytest.raises(CheckpointError, match="holds nothing of the tower, only of: connector"):
        start(model, saved(tmp_path / "c.safetensors", projection(source)), "tower", "connector")
    wide = {"llm_proj.weight": torch.ones(64, 41), "llm_proj.bias": torch.ones(64)}
    with pytest.raises(CheckpointError, match=r"llm_proj.weight: \[64, 41\] in the file, \[64, 40\] in the model"):
        start(model, saved(tmp_path / "d.safetensors", wide))


def test_a_frozen_part_without_weights_has_to_be_in_the_source(tmp_path):
    file = saved(tmp_path / "p.safetensors", projection(small_model()))
    with pytest.raises(CheckpointError, match="missing: Qformer"):
        start(small_model(), file, filled={"nothing"})


def test_adapters_are_taken_all_or_none(tmp_path):
    source = small_model(get_lora=True)
    adapters = {name: tensor for name, tensor in source.state_dict().items() if ".lora_" in name}
    model = small_model(get_lora=True)
    start(model, saved(tmp_path / "all.safetensors", adapters), "llm")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in adapters.items())
    adapters.popitem()
    with pytest.raises(CheckpointError, match=r"missing: .*lora_"):
        start(model, saved(tmp_path / "some.safetensors", adapters), "llm")
    with pytest.raises(CheckpointError, match=r"unexpected: .*lora_A"):
        start(small_model(), saved(tmp_path / "again.safetensors", adapters), "llm")


def test_a_run_means_its_best_checkpoint_else_its_last(tmp_path):
    for step, loss in ((1, None), (2, None), (3, None)):
        write(tmp_path / "plain", step, loss)
    for step, loss in ((1, 0.5), (2, 0.25), (3, 0.75)):
        write(tmp_path / "judged", step, loss)
    assert trained_file(tmp_path / "plain").parent.name == "step-3"
    assert trained_file(tmp_path / "judged").parent.name == "step-2"
    assert trained_file(tmp_path / "judged/checkpoints/step-1").parent.name == "step-1"
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no trained parts"):
        trained_file(tmp_path / "empty")


def write(run, step, loss):
    folder = run / f"checkpoints/step-{step}"
    folder.mkdir(parents=True)
    save_file({"a": torch.ones(1)}, folder / "trainable.safetensors")
    (folder / "COMPLETE").write_text(json.dumps({"step": step, "valid_loss": loss, "files": {}}))


def test_entries_of_a_recipe():
    assert inits([{"from": "a"}, {"from": "b", "parts": "llm"}]) == [Init("a"), Init("b", ("llm",))]
    assert Init.read({"parts": []}, "init.0")[1] and Init.read({"from": "a", "parts": ["head"]}, "init.0")[1]
    assert Init.read({"from": "a", "part": []}, "init.0")[1] == ["init.0.part: unknown key; known: from, parts."]
