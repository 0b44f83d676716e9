"""`lavis data check` and `lavis data show` on a small dataset of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from lavis.cli import main
from lavis.core.errors import DataError
from lavis.data.assemble import load_tokenizer, prepare_split
from tests.models.conftest import model_config

RECIPE = """
model:
  arch: minigpt4qwen
  model_type: qwen7b_chat
  llm_model: ckpt/small
  num_query_token: 4
  max_txt_len: 100
datasets:
  instruction:
    build_info:
      annotations:
        train: {storage: mine/train.json}
        val: {storage: mine/val.json}
      images: {storage: mine/pictures}
run: {valid_splits: [val]}
"""
GOOD = [
    {"id": "first", "image": "a.png", "instruction": "What?", "output": "red"},
    {"instruction": ["Hi", "Hi"], "output": ["yes", "no"]},
]


@pytest.fixture
def recipe(cache: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A recipe with two good splits."""
    tokenizer.save_pretrained(cache / "ckpt" / "small")
    (cache / "mine" / "pictures").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(cache / "mine" / "pictures" / "a.png")
    write(cache, "train", GOOD)
    write(cache, "val", GOOD[:1])
    (cache / "recipe.yaml").write_text(RECIPE)
    return cache / "recipe.yaml"


def write(cache: Path, split: str, rows: list[Any]) -> None:
    (cache / "mine" / f"{split}.json").write_text(json.dumps(rows))


def test_check_of_good_data(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "instruction train: 2 rows, 1 images, longest sample" in out and "instruction val: 1 rows" in out
    assert out.count("no problem") == 2


def test_check_reports_each_kind_of_problem_with_examples(
    recipe: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache / "mine" / "pictures" / "bad.png").write_text("no picture")
    bad = [
        *({"instruction": f"{i}"} for i in range(7)),
        {"image": "bad.png", "instruction": "x", "output": "y"},
        {"image": "gone.png", "instruction": "x", "output": "y"},
        {"instruction": "Hi " * 200, "output": "no"},
    ]
    write(cache, "train", GOOD + bad)
    (cache / "mine" / "val.json").unlink()
    assert main(["data", "check", str(recipe)]) == 1
    out = capsys.readouterr().out
    assert "instruction train: 12 rows, 3 images" in out
    assert "7 x 'output' is missing" in out and "... and 2 more" in out and "train.json row 3" in out
    for problem in (
        "an image file is missing",
        "an image file can't be read",
        "no supervised token left",
        "can't be used",
    ):
        assert f"1 x {problem}" in out or f"1 x an annotation file {problem}" in out
    assert "val.json does not exist" in out


def test_show_marks_what_is_learned(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", str(recipe), "-n", "1"]) == 0
    out = capsys.readouterr().out
    assert "first" in out and "\x1b[" not in out
    assert "<Img>[image ×4 a.png]</Img> What?<|im_end|>" in out
    assert "assistant\n⟦red<|im_end|>⟧" in out
    assert "Hi" not in out
    main(["data", "show", str(recipe), "--options", "datasets.instruction.supervise=markup"])
    assert "⟦<|im_end|>\n<|im_start|>⟧user" in capsys.readouterr().out


def test_show_of_a_split_that_is_not_there(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", str(recipe), "--split", "tset"]) == 1
    assert "no dataset of the recipe has a split 'tset'" in capsys.readouterr().err


def test_prepared_split_of_a_recipe(recipe: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    from lavis.config.recipe import load_recipe

    (table,) = prepare_split(load_recipe(recipe), "train", tokenizer)
    assert len(table) == 2 and Path(table.sample(0).images[0]).is_file()
    with pytest.raises(DataError, match="train, val"):
        prepare_split(load_recipe(recipe), "test", tokenizer)


def test_missing_tokenizer_is_told(cache: Path) -> None:
    with pytest.raises(DataError, match=r"model\.llm\.weights"):
        load_tokenizer(model_config(llm_model="ckpt/none"))
