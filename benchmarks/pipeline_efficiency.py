"""How much of the time the stages of a pipeline work, against the ideal m / (m + p - 1): python
benchmarks/pipeline_efficiency.py [--micro-batches 8 32]

Two processes of one thread each train the projection of a random LLM, first data-parallel, where each does whole
micro-batches and nothing waits, which gives
the work of one; then as a pipeline of p = 2 stages. Efficiency is m / p times that work over the time of the pipeline's
step. The fastest step of a run counts, as
other processes only add to it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from plan_memory import ROOT, SIZES, write_recipe

STAGES = 2
SIZES["bench"] = (512, 1376, 12, 256)


def step_seconds(recipe: Path, *options: str) -> float:
    """Time of the fastest optimiser step."""
    before = set(recipe.parent.glob("output/*"))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LAVIS_CACHE": str(recipe.parent / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={STAGES}",
        str(ROOT / "train.py"),
        "--cfg-path",
        str(recipe),
    ]
    done = subprocess.run(
        [*command, "--options", "run.cache_features=true", *options],
        cwd=recipe.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    (run,) = set(recipe.parent.glob("output/*")) - before
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return min(row["compute_seconds"] + row["comm_seconds"] for row in rows if row["kind"] == "train")


def main() -> None:
    """Print one line for each number of micro-batches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8, 32])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        torch.manual_seed(0)
        recipe = write_recipe(Path(name), "bench")
        for m in args.micro_batches:
            steps = ["train.max_steps=4", "optim.warmup_steps=0"]
            work = step_seconds(recipe, *steps, f"train.accumulation={m}") / m
            pipeline = step_seconds(
                recipe, *steps, f"train.accumulation={m}", "parallel.strategy=pipeline", f"parallel.num_stages={STAGES}"
            )
            ideal = m / (m + STAGES - 1)
            reached = m * work / STAGES / pipeline
            print(
                f"m = {m}: a micro-batch is {work:.2f} s of work, a step of the pipeline {pipeline:.2f} s: efficiency"
                f" {reached:.3f}, ideal {ideal:.3f}, ratio {reached / ideal:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
