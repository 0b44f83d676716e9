"""Data as a list of entries: mixing, weights, fractions, dialects and sources of one's own, and the older form."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast

from lavis.cli import main
from lavis.config.recipe import Recipe, load_recipe, recipe_from_dict
from lavis.core.errors import ConfigError
from lavis.core.registries import DIALECTS, SOURCES
from lavis.data.assemble import portions, prepare_split
from lavis.data.sampler import StepPlan
from lavis.objectives.sft import NextToken
from lavis.train.data import RunData

MODEL = {"arch": "causal_lm", "tokenizer": "small", "llm_config": {"model_type": "qwen3"}, "max_txt_len": 64}


@pytest.fixture
def recipe_of(cache: Path, tokenizer: PreTrainedTokenizerFast):
    tokenizer.save_pretrained(cache / "small")

    def build(data: dict[str, Any], *options: str, model: dict[str, Any] = MODEL, **run: Any) -> Recipe:
        run = {"task": "language_modeling", **run}
        (cache / "recipe.yaml").write_text(yaml.safe_dump({"model": model, "data": data, "run": run}))
        return load_recipe(cache / "recipe.yaml", options)

    return build


def write(cache: Path, name: str, texts: list[str]) -> dict[str, Any]:
    rows = [{"id": f"{name}{i}", "instruction": text, "output": "yes"} for i, text in enumerate(texts)]
    (cache / f"{name}.json").write_text(json.dumps(rows))
    return {"name": name, "path": f"{name}.json"}


def ids(tables: list[Any]) -> list[str]:
    return [table.conversation(i).id for table in tables for i in range(len(table))]


def test_any_number_of_entries_of_one_source(cache: Path, recipe_of, tokenizer: PreTrainedTokenizerFast) -> None:
    entries = [write(cache, name, [f"{name}{i}" for i in range(4)]) for name in "abcde"]
    recipe = recipe_of({"train": entries, "valid": [{**entries[0], "split": "easy"}, {**entries[1], "split": "hard"}]})
    tables = prepare_split(recipe, "train", tokenizer)
    assert ids(tables) == [f"{name}{i}" for name in "abcde" for i in range(4)]
    assert ids(prepare_split(recipe, "hard", tokenizer)) == [f"b{i}" for i in range(4)]
    assert [p.split for p in portions(recipe)] == ["train"] * 5 + ["easy", "hard"]


def test_weights_are_shares_of_an_epoch(cache: Path, recipe_of, tokenizer: PreTrainedTokenizerFast) -> None:
    entries = [
        {**write(cache, n, [f"{n}{i}" for i in range(40)]), "weight": w} for n, w in (("a", 1), ("b", 3), ("c", 0))
    ]

    class Task:
        pass

    Task.tokenizer, Task.template = tokenizer, type("T", (), {"pad_token_id": 0})
    from lavis.core.dist import World

    recipe = recipe_of({"train": entries, "num_workers": 0}, batch_size_train=4)
    data = RunData(recipe, Task, World(0, 0, 1, torch.device("cpu")))
    plan: StepPlan = data.plan
    rows = [
        i
        for step in range(plan.steps_per_epoch)
        for batch in plan.micro_batches(0, step, 0)
        for row in batch
        for i in row
    ]
    assert Counter(i // 40 for i in rows) == {0: 30, 1: 90}
    assert sum(len(b.lengths) for step in data.loader.steps(0) for b in step) == 120


def test_a_fraction_is_taken_out_of_train_whatever_the_order(
    cache: Path, recipe_of, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [f"question {i}" for i in range(300)]
    a, b = write(cache, "a", texts), write(cache, "b", [f"other {i}" for i in range(100)])
    recipe = recipe_of({"train": [a, b], "valid": [{"fraction": 0.1}], "test": [{"name": "a", "fraction": 0.2}]})
    train, valid, test = (set(ids(prepare_split(recipe, s, tokenizer))) for s in ("train", "valid", "test"))
    assert not train & valid and not train & test and not valid & test
    assert len(train | valid | test) == 400
    assert 20 < len([i for i in valid if i[0] == "a"]) < 45 and [i for i in valid if i[0] == "b"]
    assert 40 < len(test) < 80 and {i[0] for i in test} == {"a"}
    write(cache, "a", texts[::-1])  # the same rows in another order are divided in the same way
    again = {f"a{299 - int(i[1:])}" for i in ids(prepare_split(recipe, "valid", tokenizer)) if i[0] == "a"}
    assert again == {i for i in valid if i[0] == "a"}


def test_rows_about_one_picture_and_equal_rows_stay_together(cache: Path, recipe_of, tokenizer) -> None:
    rows = [{"id": f"{i}", "image": f"{i % 20}.png", "instruction": f"question {i}", "output": "x"} for i in range(200)]
    (cache / "rows.json").write_text(json.dumps(rows))
    model = {"arch": "minigpt4qwen", "llm_model": "small"}
    entry = {"path": "rows.json", "images": "pictures"}
    recipe = recipe_of(
        {"train": [entry], "valid": [{"fraction": 0.3}]},
        model={**model, "load_pretrained": False, "freeze_vit": False},
        task="image_text_pretrain",
    )
    sides = {s: {int(i) % 20 for i in ids(prepare_split(recipe, s, tokenizer))} for s in ("train", "valid")}
    assert not sides["train"] & sides["valid"] and len(sides["train"] | sides["valid"]) == 20


def test_fractions_of_documents_are_cut_before_the_blocks(cache: Path, recipe_of, tokenizer) -> None:
    (cache / "docs.jsonl").write_text("\n".join(json.dumps({"text": f"Hi {i} red"}) for i in range(50)))
    recipe = recipe_of({"train": [{"path": "docs.jsonl", "kind": "document"}], "valid": [{"fraction": 0.3}]})
    (train,), (valid,) = (prepare_split(recipe, s, tokenizer) for s in ("train", "valid"))
    assert train.report.kept + valid.report.kept == 50 and 5 < valid.report.kept < 25
    texts = [tokenizer.decode(t.sample(i).input_ids) for t in (train, valid) for i in range(len(t))]
    assert sorted("".join(texts).split("<|endoftext|>")[:-1]) == sorted(f"Hi {i} red" for i in range(50))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "data.train is empty"),
        ({"train": [{"source": "fils"}]}, "data.train.0.source"),
        ({"train": [{"source": "fils"}]}, "unknown source of data 'fils'. Did you mean 'files'"),
        ({"train": [{"name": "x"}]}, "data.train.0.path is empty"),
        ({"train": [{"path": "a", "pth": "b"}]}, "unknown key. Did you mean 'path'"),
        ({"train": [{"path": "a", "format": "lava"}]}, "'lava' is no dialect. Did you mean 'llava'"),
        ({"train": [{"path": "a", "kind": "documents"}]}, "'documents' is not one of: conversation, caption, document"),
        ({"train": [{"path": "a", "weight": 1}, {"path": "b"}]}, "data.train.1 has no weight but others have"),
        ({"train": [{"path": "a", "weight": 0}]}, "are all 0"),
        ({"train": [{"path": "a", "fraction": 0.1}]}, "move it to data.valid"),
        ({"train": [{"path": "a"}], "valid": [{"fraction": 1.5}]}, "it is above 0 and below 1"),
        ({"train": [{"path": "a"}], "valid": [{"fraction": 0.5}], "test": [{"fraction": 0.5}]}, "leave some rows"),
        ({"train": [{"path": "a"}], "valid": [{"name": "x", "fraction": 0.5}]}, "is no entry of data.train"),
        ({"train": [{"path": "a"}], "test": [{"path": "a", "kind": "document"}]}, "data.test.0 holds documents"),
        ({"train": [{"path": "a", "kind": "caption"}]}, "takes conversation, document, pair or prompt"),
        ({"train": [{"path": "a", "url": ["x", "y"]}]}, "url has 2 for the 1 of data.train.0.path"),
        ({"train": [{"path": 3}]}, "data.train.0.path is 3: give the annotation file"),
        ({"train": ["a.json"]}, "data.train.0"),
    ],
)
def test_wrong_entries_are_told(recipe_of, data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_of(data)
    assert said in str(caught.value)


def test_an_option_changes_one_entry_by_number_or_name(cache: Path, recipe_of) -> None:
    entries = [write(cache, name, ["x"]) for name in "ab"]
    recipe = recipe_of(
        {"train": entries}, "data.train.0.weight=2", "data.train.b.weight=5", "data.train.b.text.prompt=Q"
    )
    assert [(e.name, e.weight, e.text.prompt) for e in recipe.data.train] == [("a", 2, None), ("b", 5, "Q")]
    assert recipe.origins["data.train"] == "--options"
    with pytest.raises(ConfigError, match=r"data\.train\.7 .*there is no such entry \(there are: 0 \(a\), 1 \(b\)\)"):
        recipe_of({"train": entries}, "data.train.7.weight=2")
    saved = recipe_from_dict(recipe.to_dict())
    assert saved.data == recipe.data


# ---- one's own

OWN = """
from lavis.core.registries import DIALECTS, SOURCES
from lavis.core.types import Conversation, Message
from lavis.data.sources import FileSource

@DIALECTS.register("quiz")
class Quiz:
    @staticmethod
    def matches(row):
        return "question" in row

    @staticmethod
    def read(row, where):
        return Conversation((Message("user", (row["question"],)), Message("assistant", (row["right"],))), where)

@SOURCES.register("numbers")
class Numbers(FileSource):
    def files(self):
        return []

    def rows(self, on_error=None):
        for i in range(self.entry.generate["count"]):
            yield f"number {i}", {"question": f"What is {i}?", "right": str(i)}
"""


@pytest.fixture
def own(tmp_path: Path):
    """A file of a user's own, imported."""
    path = tmp_path / "own.py"
    path.write_text(OWN)
    spec = importlib.util.spec_from_file_location("own_data", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    DIALECTS._entries.pop("quiz")
    SOURCES._entries.pop("numbers")


def test_a_dialect_and_a_source_of_ones_own(
    cache: Path, recipe_of, own, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache / "quiz.jsonl").write_text('{"question": "Hi?", "right": "yes"}\n{"question": "Hi?", "right": " "}\n')
    recipe = recipe_of({"train": [{"path": "quiz.jsonl"}, {"source": "numbers", "generate": {"count": 3}}]})
    quiz, numbers = prepare_split(recipe, "train", tokenizer)
    assert [m.text for m in quiz.conversation(0).messages] == ["Hi?", "yes"]
    assert list(quiz.report.dropped) == ["an answer is empty"]  # checked like those of the package
    assert [numbers.conversation(i).messages[1].text for i in range(3)] == ["0", "1", "2"]
    assert main(["data", "show", str(cache / "recipe.yaml"), "-n", "1"]) == 0
    assert "What is 0?" in capsys.readouterr().out
    assert main(["data", "check", str(cache / "recipe.yaml")]) == 1
    assert "numbers train: 3 rows" in capsys.readouterr().out
    named = recipe_of({"train": [{"path": "quiz.jsonl", "format": "quiz"}]})
    assert len(prepare_split(named, "train", tokenizer)[0]) == 1


@pytest.mark.parametrize(
    ("question", "right", "said"),
    [
        ("Hi?", 4, "a part of a message is not text (int)"),
        ([1], "yes", "a part of a message is not text (list)"),
        ("Hi?", "nothing", "the dialect gives a NoneType, no example"),
        ("Hi?", "missing", "the dialect fails (KeyError: 'missing')"),
    ],
)
def test_a_row_that_a_dialect_of_ones_own_can_not_read_is_named(
    cache: Path, recipe_of, own, tokenizer, monkeypatch: pytest.MonkeyPatch, question: Any, right: Any, said: str
) -> None:
    read = own.Quiz.read
    answers = {"nothing": lambda *_: None, "missing": lambda row, _: row["missing"]}
    monkeypatch.setattr(own.Quiz, "read", staticmethod(lambda r, w: answers.get(str(r["right"]), read)(r, w)))
    rows = [{"question": "Hi?", "right": "yes"}, {"question": question, "right": right}]
    (cache / "quiz.json").write_text(json.dumps(rows))
    recipe = recipe_of({"train": [{"path": "quiz.json", "format": "quiz"}]})
    (table,) = prepare_split(recipe, "train", tokenizer)
    (dropped,) = table.report.dropped.values()
    assert len(table) == 1 and dropped.count == 1 and "quiz.json row 2: " + said in str(dropped)


# ---- check and show of other kinds


def test_check_and_show_documents_pairs_and_prompts(
    cache: Path, recipe_of, capsys: pytest.CaptureFixture[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    (cache / "docs.jsonl").write_text("\n".join(json.dumps({"id": f"d{i}", "text": "red Hi"}) for i in range(3)))
    (cache / "pairs.jsonl").write_text(json.dumps({"prompt": "What?", "chosen": "red", "rejected": "no"}))
    (cache / "prompts.jsonl").write_text(json.dumps({"prompt": "What?"}) + '\n{"text": "x"}')
    entries = [
        {"path": f"{kind}s.jsonl", "kind": name}
        for kind, name in (("doc", "document"), ("pair", "pair"), ("prompt", "prompt"))
    ]
    recipe_of({"train": entries})
    assert main(["data", "check", str(cache / "recipe.yaml")]) == 1
    out = capsys.readouterr().out
    assert "3 rows, 0 images" in out and "1 x the row is a document, not a prompt" in out
    assert main(["data", "show", str(cache / "recipe.yaml"), "-n", "1"]) == 0
    out = capsys.readouterr().out
    assert "d0 to d2 (3 documents) · 12 tokens, 9 supervised" in out
    assert "⟦red<|im_end|>⟧" in out and "· rejected" in out and "⟦no<|im_end|>⟧" in out
    assert out.rstrip().endswith("assistant")


def test_pairs_are_not_trained_on_yet(cache: Path, recipe_of, tokenizer: PreTrainedTokenizerFast) -> None:
    (cache / "pairs.jsonl").write_text(json.dumps({"prompt": "What?", "chosen": "red", "rejected": "no"}))
    recipe = recipe_of({"train": [{"path": "pairs.jsonl", "kind": "pair"}]})
    with pytest.raises(ConfigError, match=r"data\.train\.0\.kind is pair.*no objective learns from them yet"):
        RunData(recipe, None, None)


def test_rows_that_the_objective_does_not_read_are_refused(
    cache: Path, recipe_of, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NextToken, "kinds", frozenset({"document"}))
    recipe = recipe_of({"train": [write(cache, "a", ["Hi"])]})
    with pytest.raises(
        ConfigError, match=r"data\.train\.0\.kind is conversation, but objective.name sft reads document"
    ):
        RunData(recipe, None, None)


# ---- the older form


def test_the_older_form_means_the_same(cache: Path) -> None:
    processor = {"train": {"name": "blip2_image_train"}, "eval": {"mean": [0.5] * 3}}
    old = {
        "datasets": {
            "llava_instruction": {"vis_processor": processor},
            "shapes_text": {"generate": {"text_train": 5}},
        },
        "run": {"train_splits": ["train"], "valid_splits": ["val"], "train_dataset_ratios": {"shapes_text": 2},
                "packing": True, "num_workers": 0},
    }  # fmt: skip
    path = cache / "old.yaml"
    path.write_text(yaml.safe_dump({"model": {"arch": "minigpt4qwen", "model_type": "qwen7b_chat"}, **old}))
    recipe = load_recipe(path)
    llava, text = recipe.data.train
    assert (llava.source, llava.path, llava.images) == (
        "files", "dataset/llava/llava_minigpt4qwen_format.json", "dataset/llava/image",
    )  # fmt: skip
    assert (text.source, text.split, text.generate, text.images) == ("shapes_text", "train", {"text_train": 5}, None)
    assert (llava.weight, text.weight) == (0, 2) and [e.name for e in recipe.data.valid] == ["shapes_text"]
    assert recipe.data.packing and recipe.data.num_workers == 0
    media = recipe.model.media
    assert (media.processor, media.train_processor, media.mean) == ("blip2_image_eval", "blip2_image_train", [0.5] * 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            [f"datasets.{n}_instruction.vis_processor.eval.mean=[{m},0,0]" for n, m in (("llava", 0), ("minigpt4", 1))],
            "differs from datasets.llava_instruction.vis_processor.eval.mean",
        ),
        (["datasets.llava_instruction.vis_processor.train.image_size=64"], "is 64 but model.tower.image_size is 224"),
        (["datasets.instruction.format=llava"], "stands beside data, which has no entry 'instruction'"),
        (["datasets.llava_instruction.supervise=all"], "'all' is not one of: assistant, markup"),
    ],
)
def test_what_cannot_be_translated_is_told(options: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("instruction_tuning/train", options)
    assert said in str(caught.value)


def test_older_options_change_the_entries_of_that_name() -> None:
    options = [
        "datasets.shapes_instruction.generate.train=9",
        "datasets.shapes_instruction.supervise=markup",
        "run.test_splits=[val,test]",
        "run.valid_splits=[]",
        "run.train_dataset_ratios={shapes_instruction: 2}",
        "run.num_workers=3",
    ]
    data = load_recipe("shapes/align", options).data
    assert [(e.split, e.weight) for e in data.train] == [(None, 2)] and not data.valid
    assert [(e.split, e.weight) for e in data.test] == [("val", None), ("test", None)]
    assert {(e.source, e.generate["train"], e.supervise) for e in (*data.train, *data.test)} == {
        ("shapes_instruction", 9, "markup")
    }
    assert data.num_workers == 3
