"""The tutorials' scripts run and show what their pages say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def output_of(name, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LAVIS_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, str(ROOT / f"docs/tutorials/{name}.py")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_precision_and_checkpointing(tmp_path):
    rows = [line.split() for line in output_of("precision_and_checkpointing", tmp_path).splitlines()[1:]]
    kept = {tuple(row[:3]): float(row[3]) for row in rows}
    forwards = {tuple(row[:3]): int(row[5]) for row in rows}
    error = {tuple(row[:3]): float(row[6]) for row in rows}
    assert kept["frozen", "fp32", "no"] < 0.6 * kept["trained", "fp32", "no"]
    for weights in ("trained", "frozen"):
        assert kept[weights, "bf16", "no"] < 0.8 * kept[weights, "fp32", "no"]
        for precision in ("fp32", "bf16"):
            assert kept[weights, precision, "yes"] < 0.4 * kept[weights, precision, "no"]
            assert (forwards[weights, precision, "no"], forwards[weights, precision, "yes"]) == (8, 16)
            assert (
                error[weights, precision, "yes"]
                == error[weights, precision, "no"]
                <= (0 if precision == "fp32" else 0.01)
            )


@pytest.mark.slow
def test_zero_and_pipeline(tmp_path, deepspeed_operators):
    text = output_of("zero_and_pipeline", tmp_path)
    shares = [tuple(map(int, pair)) for pair in re.findall(r"(\d+)% of the weights +(\d+)% of AdamW's state", text)]
    assert shares == [(100, 100)] * 2 + [(100, 50)] * 4 + [(50, 50)] * 2
    assert len(set(re.findall(r"state, loss ([\d.]+)", text))) == 1
    assert [len(re.findall(f"stage {i}: forward of micro-batch", text)) for i in (0, 1)] == [4, 4]


def test_training_loop(tmp_path):
    by_hand, by_the_runner = re.findall(r"by (?:hand|the runner): +(.+)", output_of("training_loop", tmp_path))
    assert by_hand == by_the_runner and len(by_hand.split()) == 5
