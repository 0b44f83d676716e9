"""The claim of the program: after training one linear layer, an LLM that never met the vision tower answers about
pictures.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LESS = "datasets.shapes_instruction.generate={train: 2000, val: 40, test: 200, text_train: 10, text_val: 10}"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LAVIS_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "lavis", "demo", "--options", LESS, "train.epochs=4"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done, folder


def test_a_linear_layer_makes_the_llm_see(demo):
    *_, how_to_talk, last = demo[0].stdout.splitlines()
    assert how_to_talk.startswith("Talk with the result: lavis chat --run ")
    figures = json.loads(last)
    assert figures["held_out_accuracy"] >= 0.85
    assert figures["held_out_accuracy"] >= figures["blind_accuracy"] + 0.35
    assert figures["held_out_accuracy"] >= figures["accuracy_before"] + 0.3
    assert figures["held_out_accuracy"] >= 0.9 * figures["accuracy_with_own_llm"]
    assert figures["trainable_parameters"] == 128 * 144 + 144
    assert figures["total_parameters"] > 100 * figures["trainable_parameters"] and figures["seconds"] > 0


def test_only_the_linear_layer_was_trained_and_it_says_so(demo):
    done, folder = demo
    assert "llm_proj.weight, llm_proj.bias" in done.stderr
    (run,) = (folder / "output/shapes/align").iterdir()
    from safetensors.torch import load_file

    for checkpoint in (run / "checkpoints").glob("step-*"):
        assert set(load_file(checkpoint / "trainable.safetensors")) == {"llm_proj.weight", "llm_proj.bias"}
    assert (run / "report.html").exists() and (run / "answers.svg").exists() and (run / "loss.png").exists()


def test_it_answers_in_both_languages(demo):
    (run,) = (demo[1] / "output/shapes/align").iterdir()
    rows = [json.loads(line) for line in (run / "answers_test_test.jsonl").read_text(encoding="utf-8").splitlines()]
    for lang in ("en", "zh"):
        right = [row["correct"] for row in rows if row["lang"] == lang]
        assert sum(right) / len(right) >= 0.8


def test_shipped_parts_are_small():
    size = sum(f.stat().st_size for f in (ROOT / "lavis/assets/shapes").rglob("*") if f.is_file())
    assert size <= 10e6
