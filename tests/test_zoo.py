"""LAVIS's front door."""

import json
from pathlib import Path

import pytest
from PIL import Image
from torch import nn

import lavis
from lavis.config.init import Init
from lavis.core.errors import ConfigError, RegistryError
from lavis.models.configs import VlmConfig


class Built(nn.Module):
    """Stands for a model too large for a test; remembers what it was asked for."""

    def __init__(self, config: VlmConfig, init: list[Init]) -> None:
        super().__init__()
        self.config, self.init = config, init

    @classmethod
    def from_config(cls, config: VlmConfig, device="cpu", init=()) -> "Built":
        return cls(config, init)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lavis.registries.MODELS.get", lambda name: Built)


@pytest.mark.usefixtures("stand_in")
def test_a_model_comes_with_its_defaults_mode_and_processors() -> None:
    model, vis, txt = lavis.load_model_and_preprocess("minigpt4qwen", "qwen14b_chat", is_eval=True)
    assert (model.config.llm.weights, model.training) == ("ckpt/Qwen-14B-Chat", False)
    assert vis["eval"](Image.new("RGB", (30, 50))).shape == (3, 224, 224)
    assert txt["eval"]("What is this?") == "What is this?"


@pytest.mark.usefixtures("stand_in")
def test_a_checkpoint_is_loaded_on_top() -> None:
    model = lavis.load_model("minigpt4qwen", "qwen7b_chat", checkpoint="out/model: 1.pth")
    assert model.init == [Init("out/model: 1.pth")]


def test_unknown_names_suggest_near_ones() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'minigpt4qwen'"):
        lavis.load_model("minigpt4qwn", "qwen7b_chat")
    with pytest.raises((ConfigError, RegistryError), match="Did you mean 'llava_instruction'"):
        lavis.load_dataset("lava_instruction")


def test_a_dataset_is_its_conversations_by_split(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "instruction": "<Img><ImageHere></Img> What?", "output": "A cat."}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    config = tmp_path / "dataset.yaml"
    storage = json.dumps(str(tmp_path / "train.json"))
    config.write_text(f"datasets: {{instruction: {{build_info: {{annotations: {{train: {{storage: {storage}}}}}}}}}}}")
    data = lavis.load_dataset("instruction", cfg_path=str(config), vis_path=str(tmp_path))
    assert [message.role for message in data["train"][0].messages] == ["user", "assistant"]
    assert len(data["train"][0].images) == 1
