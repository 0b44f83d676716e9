"""Every key of the flat `model` section, and what it is called now."""

from pathlib import Path
from typing import Any

import pytest

from lavis.config.compat import translate
from lavis.config.recipe import load_model_config, load_recipe
from lavis.core.errors import ConfigError

KEYS: dict[str, tuple[Any, str, Any]] = {
    "image_size": (448, "tower.image_size", 448),
    "drop_path_rate": (0.1, "tower.drop_path_rate", 0.1),
    "use_grad_checkpoint": (True, "tower.recompute", True),
    "vit_precision": ("bf16", "tower.precision", "bf16"),
    "unfreeze_pos_embed": (True, "tower.train_positions", True),
    "freeze_vit": (False, "tower.train", "full"),
    "vit": ({"depth": 3, "num_heads": None}, "tower.depth", 3),
    "vit_model": ("eva_clip_g", "tower.name", "eva_clip_g"),
    "num_query_token": (8, "connector.num_query_token", 8),
    "qformer": ({"dropout": 0.0}, "connector.qformer.dropout", 0.0),
    "freeze_qformer": (False, "connector.train_qformer", "full"),
    "freeze_queries": (False, "connector.train_queries", True),
    "freeze_proj": (True, "connector.train", "frozen"),
    "llm_model": ("a/b", "llm.weights", "a/b"),
    "llm_config": ({"model_type": "llama"}, "llm.config", {"model_type": "llama"}),
    "tokenizer": ("a", "llm.tokenizer", "a"),
    "llm_device_map": ("cpu", "llm.device_map", "cpu"),
    "llm_quantization": ("int4", "llm.quantization", "int4"),
    "llm_grad_checkpoint": (True, "llm.recompute", True),
    "freeze_llm": (False, "llm.train", "full"),
    "get_lora": (True, "llm.train", "lora"),
    "lora_r": (4, "llm.lora.rank", 4),
    "lora_alpha": (8, "llm.lora.alpha", 8),
    "lora_dropout": (0.2, "llm.lora.dropout", 0.2),
    "max_txt_len": (77, "max_length", 77),
    "finetuned": ("p.pth", "released", "p.pth"),
    "pretrained": ("x.pth", "connector.weights", "x.pth"),
    "vit_pretrained": ("v.pth", "tower.weights", "v.pth"),
    "load_pretrained": (False, "connector.weights", None),
    "model_type": ("shapes", "preset", "minigpt4qwen/shapes"),
    "enable_autocast": (False, "enable_autocast", False),
    "chat_template": ("x", "chat_template", "x"),
}


def model_of(*layers: dict[str, Any]) -> dict[str, Any]:
    translated = translate([{"model": layer} for layer in layers])
    assert not translated.wrong
    merged: dict[str, Any] = {}
    for layer in translated.layers:
        _merge(merged, layer["model"])
    return merged


def _merge(below: dict[str, Any], above: dict[str, Any]) -> None:
    for name, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(name), dict):
            _merge(below[name], value)
        else:
            below[name] = value


def at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


@pytest.mark.parametrize("old", KEYS)
def test_each_key_has_one_of_today(old: str) -> None:
    value, new, expected = KEYS[old]
    section = model_of({"arch": "minigpt4qwen", old: value})
    assert at(section, new) == expected
    assert old in (new, "chat_template", "enable_autocast") or old not in section


@pytest.mark.parametrize("old", [key for key in KEYS if key not in ("llm_config", "tokenizer", "model_type")])
def test_each_key_works_as_an_option(old: str) -> None:
    value, new, expected = KEYS[old]
    text = str(value).replace("'", "").replace("None", "null").replace("True", "true").replace("False", "false")
    config = load_model_config("minigpt4qwen", "qwen7b_chat", [f"{old}={text}"])
    for part in new.split("."):
        config = getattr(config, part)
    assert config == expected


def test_architectures_are_compositions_now() -> None:
    seeing = model_of({"arch": "minigpt4qwen"})
    assert (seeing["arch"], seeing["tower"]["name"], seeing["connector"]["name"]) == (
        "vlm",
        "eva_clip_g",
        "qformer_linear",
    )
    text = model_of({"arch": "causal_lm", "llm_config": {"model_type": "llama"}, "tokenizer": "t"})
    assert text["arch"] == "vlm" and text["llm"] == {
        "train": "full",
        "config": {"model_type": "llama"},
        "tokenizer": "t",
    }
    assert "tower" not in text
    stage1 = model_of({"arch": "blip2_qformer", "tokenizer": "t", "freeze_vit": False})
    assert (stage1["arch"], stage1["text_tokenizer"], stage1["tower"]) == ("blip2_qformer", "t", {"train": "full"})


def test_a_recipe_without_an_arch_was_a_minigpt4qwen() -> None:
    assert model_of({"model_type": "shapes"})["preset"] == "minigpt4qwen/shapes"
    assert model_of({"llm_model": "a"})["tower"]["name"] == "eva_clip_g"
    assert model_of({"preset": "minigpt4qwen/shapes"}) == {"preset": "minigpt4qwen/shapes"}
    assert model_of({"llm": {"weights": "a"}}) == {"llm": {"weights": "a"}}


def test_one_file_for_tower_and_qformer_or_two() -> None:
    both = {"tower": {"weights": "t"}, "connector": {"weights": "t"}}
    apart = {"tower": {"weights": "v"}, "connector": {"weights": "t"}}

    def weights(below: dict[str, Any], above: dict[str, Any]) -> tuple[Any, Any]:
        section = model_of(below, above)
        return section["tower"]["weights"], section["connector"]["weights"]

    assert weights(both, {"pretrained": "x"}) == ("x", "x")
    assert weights(apart, {"pretrained": "x"}) == ("v", "x")
    assert weights(apart, {"vit_pretrained": None}) == ("t", "t")
    assert weights(both, {"vit_pretrained": "v"}) == ("v", "t")
    assert weights(apart, {"load_pretrained": False}) == (None, None)


def test_adapters_go_where_their_parts_were_named() -> None:
    old = {"get_lora": True, "lora_parts": ["vit", "qformer"], "lora_r": 3}
    section = model_of({"preset": "a/b"}, old, {"freeze_llm": True})
    assert section["tower"] == {"train": "lora", "lora": {"rank": 3}}
    assert section["connector"] == {"train_qformer": "lora", "lora": {"rank": 3}}
    assert section["llm"] == {"train": "frozen"}
    later = model_of({"preset": "a/b", "get_lora": True, "lora_r": 3}, {"lora_parts": ["vit"]})
    assert later["tower"] == {"train": "lora", "lora": {"rank": 3}} and "llm" not in later


def test_what_was_finetuned_before_is_a_start() -> None:
    old = {"preset": "a/b", "finetuned": "p.pth"}
    values = translate([{"model": old | {"load_finetuned": True}}]).layers[0]
    assert values["init"] == [{"from": "p.pth"}] and values["model"] == {"preset": "a/b", "released": "p.pth"}
    assert "init" not in translate([{"model": old | {"load_finetuned": False}}]).layers[0]
    recipe = load_recipe("shapes/evaluate_tower")
    assert recipe.init == [{"from": "shapes/tower/tower.safetensors"}]
    assert load_recipe("shapes/evaluate_tower", ["model.load_finetuned=false"]).init == []


def test_the_processor_of_the_first_images_is_the_model_s() -> None:
    train, judged = {"name": "blip2_image_train", "min_scale": 0.3}, {"name": "image_plain", "mean": [0.1, 0.2, 0.3]}
    datasets = {
        "text": {"data_type": "text", "vis_processor": {"eval": {"name": "other"}}},
        "mine": {"vis_processor": {"train": train, "eval": judged}},
    }
    media = translate([{"model": {}, "datasets": datasets}]).layers[0]["model"]["media"]
    assert media == {
        "processor": "image_plain",
        "mean": [0.1, 0.2, 0.3],
        "train_processor": "blip2_image_train",
        "min_scale": 0.3,
    }


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("qformer_text_input=true", r"model.qformer_text_input \(--options\): the Q-Former is not given"),
        ("vit_modell=x", r"model.vit_modell \(--options\): unknown key"),
        ("vit.depht=3", r"model.vit.depht \(--options\): unknown key. Did you mean 'depth'"),
        ("max_txt_len=1", r"model.max_txt_len \(--options\): 1 is below .*called model.max_length now"),
        ("arch=minigpt4qwn", "unknown model 'minigpt4qwn'. Did you mean 'minigpt4qwen'"),
    ],
)
def test_what_is_wrong_is_told_as_it_is_written(option: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_recipe("shapes/align", [f"model.{option}"])


def test_a_part_that_another_one_replaces_leaves_nothing(tmp_path: Path) -> None:
    """A section belongs to the part it names."""
    path = tmp_path / "text.yaml"
    path.write_text(
        "model: {preset: minigpt4qwen/shapes, tower: null, connector: null}\ndatasets: {shapes_text: {}}\n"
        "run: {task: language_modeling}\n"
    )
    model: Any = load_recipe(path, ["model.llm.train=lora"]).model
    assert (model.tower, model.connector, model.llm.train, model.sees) == (None, None, "lora", False)


def test_an_older_model_type_takes_the_place_of_a_preset_below_it() -> None:
    recipe = load_recipe("instruction_tuning/train", ["model.model_type=qwen14b_chat"])
    assert (recipe.model.preset, recipe.model.llm.weights) == ("minigpt4qwen/qwen14b_chat", "ckpt/Qwen-14B-Chat")
    later = load_recipe("instruction_tuning/train", ["model.preset=minigpt4qwen/qwen3_8b", "model.get_lora=true"])
    assert (later.model.preset, later.model.llm.train) == ("minigpt4qwen/qwen3_8b", "lora")
