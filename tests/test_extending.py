"""The worked files of docs/extending.md, each under every command that a part of its kind takes part in."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lavis.cli import main
from lavis.config.recipe import load_recipe
from lavis.core.registries import SOURCES
from lavis.data.assemble import load_tokenizer, prepare_split
from lavis.export.trained import open_run
from lavis.generation.engine import Engine
from lavis.generation.pictures import open_picture
from lavis.models.vlm import Vlm
from lavis.serve.load import load_chat
from lavis.serve.session import ChatSession
from tests.train.world import only_run, train_lines, validation_losses

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "extending"
WORLD = "{train: 24, val: 4, test: 6, text_train: 60, text_val: 10}"
SHORT = [
    *("train.micro_batch_size=4", "train.max_steps=2", "optim.warmup_steps=0", "log.every=1", "log.trackers=[]"),
    *("eval.num_prompts=0", "eval.max_new_tokens=4", "run.device=cpu"),
]
PICTURES = [f"data.{section}.0.generate={WORLD}" for section in ("train", "test")]
VALID = [f"data.valid=[{{source: shapes_instruction, split: val, generate: {WORLD}}}]"]
LAYOUTS = {
    "DDP of 2": ["train.micro_batch_size=2"],
    "ZeRO-2 of 2": [
        "train.micro_batch_size=2",
        "parallel.strategy=zero",
        "parallel.deepspeed.zero_optimization.stage=2",
    ],
    "pipeline of 2": [
        *("train.micro_batch_size=1", "train.accumulation=4", "parallel.strategy=pipeline", "parallel.num_stages=2")
    ],
}


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    """A cache of the module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAVIS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def train(folder, recipe, *options, ranks=1):
    """`lavis train` on one of the worked recipes in processes of its own; the run's folder."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    given = [f"run.output_dir={folder}/output", *SHORT, *options]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "lavis", "train", str(EXAMPLES / f"{recipe}.yaml"), "--options", *given],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return only_run(folder)


def here(folder, command, recipe, *options):
    """`lavis COMMAND` on one of the worked recipes in this process; the run's folder."""
    given = [f"run.output_dir={folder}/output", *SHORT, *options]
    assert main([command, str(EXAMPLES / f"{recipe}.yaml"), "--options", *given]) == 0
    return only_run(folder)


def results(run):
    """What the run measured of its test entries."""
    return json.loads((run / "summary.json").read_text())["results"]


# ---- a tower and a connector


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return train(tmp_path_factory.mktemp("single"), "conv_tower", *PICTURES, *VALID)


@pytest.mark.parametrize("recipe", sorted(path.stem for path in EXAMPLES.glob("*.yaml")))
def test_every_recipe_is_valid(recipe, capsys):
    assert main(["configs", "check", str(EXAMPLES / f"{recipe}.yaml")]) == 0
    assert f"{recipe}.yaml: valid" in capsys.readouterr().out


def test_samples_are_shown_with_the_vectors_of_the_tower(capsys):
    assert main(["data", "show", str(EXAMPLES / "conv_tower.yaml"), "-n", "1", "--options", *PICTURES]) == 0
    assert "16" in capsys.readouterr().out  # (64 / 16)^2 vectors


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tower_trains_the_same_in_any_layout(tmp_path, single, layout, request):
    if layout != "DDP of 2":
        request.getfixturevalue("deepspeed_operators")
    run = train(tmp_path, "conv_tower", *PICTURES, *VALID, *LAYOUTS[layout], ranks=2)
    for want, got in zip(train_lines(single), train_lines(run), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
    assert validation_losses(run) == pytest.approx(validation_losses(single), rel=1e-5)


def test_the_tower_is_planned(capsys):
    command = ["plan", str(EXAMPLES / "conv_tower.yaml"), "--gpus", "2", "--gpu", "3090", "--json"]
    assert main(command) == 0
    assert len(json.loads(capsys.readouterr().out)["plans"]) > 1


def test_a_trained_tower_is_evaluated_chatted_with_and_saved(tmp_path, single, capsys):
    run = here(tmp_path, "evaluate", "conv_tower", *PICTURES, f"init=[{{from: {single}, parts: [tower, connector]}}]")
    assert "test/test/accuracy" in results(run)
    chat = load_chat(run=single, device="cpu")
    engine = Engine(chat)
    picture = tmp_path / "red.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    answer = ChatSession(engine).ask("What is it?", [open_picture(picture)])
    assert "".join(answer) == answer.text
    engine.close()
    chat.model.save_pretrained(tmp_path / "whole")
    again = Vlm.from_pretrained(tmp_path / "whole", llm_dtype=torch.float32)
    before, after = chat.model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and "visual_encoder.0.weight" in before and "norm_linear.1.weight" in before
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert main(["export", "hf", str(single), str(tmp_path / "hf")]) != 0
    assert "can't be exported as hf" in capsys.readouterr().err


# ---- the other kinds


def test_rows_of_an_own_dialect_are_learned_from(tmp_path, capsys):
    folder = Path(os.environ["LAVIS_CACHE"]) / "dataset/mine"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(folder / "images/red.png")
    choices = ["red", "blue"]
    rows = [{"question": "Which is it?", "choices": choices, "right": i % 2} for i in range(8)]
    rows[0]["picture"] = "red.png"
    (folder / "choices.jsonl").write_text("\n".join(map(json.dumps, [*rows, {**rows[0], "right": 2}])))
    recipe = str(EXAMPLES / "my_dialect.yaml")
    assert main(["data", "show", recipe, "-n", "1"]) == 0
    assert "A. red" in capsys.readouterr().out
    assert main(["data", "check", recipe]) == 1
    assert "no right choice" in capsys.readouterr().out
    run = here(tmp_path, "train", "my_dialect")
    assert len(train_lines(run)) == 2 and (run / "imports/my_dialect.py").is_file()


def test_an_own_objective_counts_sure_tokens_less(tmp_path):
    lines = train_lines(here(tmp_path / "focal", "train", "my_objective", *PICTURES))
    assert len(lines) == 2 and all(0 < line["loss"] < line["cross_entropy"] for line in lines)
    for line in train_lines(here(tmp_path / "plain", "train", "my_objective", *PICTURES, "objective.gamma=0")):
        assert line["loss"] == pytest.approx(line["cross_entropy"], rel=1e-6)


def test_an_own_metric_is_in_the_results(tmp_path):
    run = here(tmp_path, "evaluate", "my_metric", *PICTURES)
    assert {"test/test/word_recall", "test/test/accuracy"} <= results(run).keys()


def test_an_own_media_format_is_what_stands_around_a_picture(capsys):
    assert main(["data", "show", str(EXAMPLES / "my_format.yaml"), "-n", "1", "--options", *PICTURES]) == 0
    assert re.search(r"<picture>.*16.*</picture>\n", capsys.readouterr().out)


def test_an_own_schedule_sets_the_rate(tmp_path):
    options = ["train.max_steps=4", "optim.warmup_steps=1", "optim.lr=1e-3"]
    lines = train_lines(here(tmp_path, "train", "my_schedule", *PICTURES, *options))
    assert [line["lr"] for line in lines][1:] == pytest.approx([1e-3, 1e-3 / 2**0.5, 1e-3 / 3**0.5])


def test_an_own_exporter_writes_what_was_trained(tmp_path, capsys):
    run = here(tmp_path, "train", "my_exporter", *PICTURES)
    assert main(["export", "numpy", str(run), str(tmp_path / "out")]) == 0
    with np.load(tmp_path / "out/trained.npz") as arrays:
        trained = open_run(run).checkpoint.tensors()
        assert {name: arrays[name].tolist() for name in arrays} == {n: t.tolist() for n, t in trained.items()}
    assert main(["export", "nunpy", str(run), str(tmp_path / "out")]) == 1
    assert "can't be exported as nunpy. Known formats: hf, numpy, peft, pth. Did you mean" in capsys.readouterr().err
    assert main(["export", "numpy", str(run), str(tmp_path / "out"), "--dtype", "fp16"]) == 2
    assert "leave out for numpy" in capsys.readouterr().err


def test_an_own_source_gives_other_rows_where_other_ones_are_asked_for(tmp_path, capsys):
    shown = []
    for seed in (0, 1):
        options = [f"data.train.0.generate={{rows: 40, seed: {seed}}}"]
        assert main(["data", "show", str(EXAMPLES / "my_source.yaml"), "-n", "1", "--options", *options]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] != shown[1]
    options = ["data.train.0.generate={rows: 40}", "data.test.0.generate={rows: 4, seed: 1}"]
    run = here(tmp_path, "train", "my_source", *options)
    answers = [json.loads(line) for line in (run / "answers_test_test.jsonl").read_text().splitlines()]
    assert len(answers) == 4 and all(a["question"].endswith(" =") for a in answers)


def test_prepared_rows_follow_the_code_that_reads_them(tmp_path):
    text = (EXAMPLES / "my_source.py").read_text().replace('"sums"', '"products"')
    recipe = yaml.safe_load((EXAMPLES / "my_source.yaml").read_text())
    recipe["data"] = {"train": [{"source": "products", "generate": {"rows": 3}}]}

    def prepared(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"imports": [f"{name}.py"]}))
        read = load_recipe(tmp_path / "recipe.yaml")
        tokenizer = load_tokenizer(read.model)
        [table] = prepare_split(read, "train", tokenizer)
        return tokenizer.decode(table.sample(0).input_ids)

    assert " + " in prepared("first", text)
    SOURCES._entries.pop("products")  # as in another process
    assert " * " in prepared("second", text.replace(" + {b}", " * {b}").replace("a + b", "a * b"))
