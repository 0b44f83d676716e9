"""First-generation Qwen folders converted for other tools."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lavis.cli import main
from lavis.models.llm import load_llm
from lavis.tokens.qwen1 import qwen1_tokenizer
from tests.models.qwen1_reference import CONFIG, logits, random_weights, write_folder, write_vocabulary


@pytest.fixture
def source(tmp_path):
    folder = write_folder(tmp_path / "Qwen-7B-Chat", random_weights(), form="bin")
    write_vocabulary(folder, [b"ab", "你".encode()[:2], "你".encode()])
    return folder


def test_transformers_opens_the_folder_and_gets_the_same_model_and_ids(source, tmp_path, capsys):
    target = tmp_path / "qwen2"
    assert main(["convert", "qwen1", str(source), str(target), "--max-shard-size", "100KB"]) == 0
    printed = capsys.readouterr().out
    assert (
        all(f"{file}  " in printed for file in target.iterdir()) and len(list(target.glob("model-*.safetensors"))) > 2
    )
    model, direct = AutoModelForCausalLM.from_pretrained(target, dtype="auto"), load_llm(str(source))
    assert model.state_dict().keys() == direct.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), direct.state_dict().values(), strict=True)
    )
    ids = torch.arange(20) * 7 % CONFIG["vocab_size"]
    with torch.inference_mode():
        assert torch.allclose(model(ids[None]).logits[0], logits(random_weights(), ids), rtol=1e-4, atol=1e-4)
    tokenizer, own = AutoTokenizer.from_pretrained(target), qwen1_tokenizer(source)
    for text in ("ab你好 ab", "<|im_start|>user\n你<|im_end|>", "x" * 9):
        assert tokenizer(text)["input_ids"] == own(text)["input_ids"]
    assert tokenizer.chat_template == own.chat_template
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_folder_says_where_to_stop_and_how_far_it_reads(source, tmp_path):
    main(["convert", "qwen1", str(source), str(tmp_path / "qwen2")])
    config = json.loads((tmp_path / "qwen2" / "config.json").read_text())
    settings = json.loads((tmp_path / "qwen2" / "generation_config.json").read_text())
    end_of_text = 256 + 3
    assert (
        settings["eos_token_id"] == [end_of_text + 2, end_of_text + 1, end_of_text]
        and settings["pad_token_id"] == end_of_text
    )
    assert settings["top_p"] == 0.8 and settings["do_sample"] is True
    assert (config["model_type"], config["max_position_embeddings"], config["dtype"]) == (
        "qwen2",
        CONFIG["seq_length"],
        "float32",
    )
    assert "auto_map" not in config
    assert (tmp_path / "qwen2" / "model.safetensors").is_file()


def test_what_can_not_be_converted_is_told_and_leaves_nothing(source, tmp_path, capsys):
    assert main(["convert", "qwen1", str(source), str(source)]) == 2
    assert "exists: choose a new folder" in capsys.readouterr().err
    assert main(["convert", "qwen1", str(tmp_path), str(tmp_path / "a")]) == 1
    assert "is no first-generation Qwen folder" in capsys.readouterr().err
    (source / "qwen.tiktoken").unlink()
    assert main(["convert", "qwen1", str(source), str(tmp_path / "a")]) == 1
    assert "qwen.tiktoken does not exist" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Qwen-7B-Chat"]
