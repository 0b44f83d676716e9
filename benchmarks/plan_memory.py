"""Expected against measured peak memory and time of real training runs on the CPU: python benchmarks/plan_memory.py
[--sizes small medium large]

A random LLM of each size is written to a temporary folder and its projection trained for a step through the real
commands: on one rank, on one
rank with recomputation, over a pipeline of two and with ZeRO-2 and 3 on two ranks. What is measured is the largest
resident memory of each rank's process.
glibc's malloc is told to give memory back at once (MALLOC_MMAP_THRESHOLD_), so that this is what the process needs;
--malloc default leaves it as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from transformers import Qwen2Config, Qwen2ForCausalLM

from lavis.config.recipe import load_recipe
from lavis.data.assemble import load_tokenizer
from lavis.parallel.plan import Layout, Machine, Planner

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 0.15
SIZES = {"small": (768, 2048, 12, 1024), "medium": (1280, 3456, 14, 1536), "large": (1792, 4864, 18, 2048)}
"""Width, width of the MLP, blocks, tokens of a packed row."""
LAYOUTS: dict[str, tuple[Layout, bool, list[str]]] = {
    "one rank": (Layout(1), False, []),
    "one rank, recomputing": (Layout(1), True, []),
    "pipeline of 2": (Layout(2, 2), False, ["parallel.strategy=pipeline", "parallel.num_stages=2"]),
    "ZeRO-2 on 2": (
        Layout(2, zero=2),
        False,
        ["parallel.strategy=zero", "parallel.deepspeed.zero_optimization.stage=2"],
    ),
    "ZeRO-3 on 2": (
        Layout(2, zero=3),
        False,
        ["parallel.strategy=zero", "parallel.deepspeed.zero_optimization.stage=3"],
    ),
}
CHILD = """
import re, sys
from pathlib import Path
from lavis.train.callbacks import StepLog
status = lambda key: int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
on_step = StepLog.on_step
def measured(self, step):
    seconds, rank = step.seconds - step.data_seconds, self.world.rank
    sys.stdout.write(f"MEASURED {rank} {status('VmHWM')} {seconds}\\n")  # at once, as ranks share the stream
    sys.stdout.flush()
    return on_step(self, step)
StepLog.on_step = measured
from lavis.cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


def write_recipe(folder: Path, size: str) -> Path:
    """An LLM of `size` and a recipe that trains its projection on packed rows."""
    width, mlp, blocks, tokens = SIZES[size]
    tokenizer = load_tokenizer(load_recipe("shapes/align").model)
    heads = width // 64
    config = Qwen2Config(
        vocab_size=16_000,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    recipe = {
        "model": {"arch": "minigpt4qwen", "model_type": "shapes", "llm_model": str(folder / "llm")},
        "datasets": {
            "shapes_instruction": {"generate": {"train": 300, "val": 10, "test": 10, "text_train": 60, "text_val": 10}},
        },
        "run": {
            "task": "image_text_pretrain", "packing": True, "pack_length": tokens, "batch_size_train": 1,
            "accum_grad_iters": 2, "max_steps": 1, "num_workers": 0, "log_freq": 1, "save_freq": 99,
            "trackers": [], "num_sample_prompts": 0, "output_dir": str(folder / "output"),
        },
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def measure(recipe: Path, layout: Layout, options: list[str], malloc: str) -> tuple[dict[int, int], float]:
    """(peak of each rank in bytes, seconds of the last step)."""
    launcher = (
        [sys.executable]
        if layout.ranks == 1
        else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={layout.ranks}"]
    )
    child = recipe.parent / "child.py"
    child.write_text(CHILD)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LAVIS_CACHE": str(recipe.parent / "cache"),
        "OMP_NUM_THREADS": "2" if layout.ranks == 1 else "1",
    }
    environment |= {"MALLOC_MMAP_THRESHOLD_": "262144"} if malloc == "exact" else {}
    done = subprocess.run(
        [*launcher, str(child), "--cfg-path", str(recipe), "--options", *options],
        cwd=recipe.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    rows = re.findall(r"MEASURED (\d+) (\d+) ([\d.]+)", done.stdout)
    if done.returncode or len(rows) < layout.ranks:
        raise SystemExit(done.stderr[-3000:])
    return {int(rank): int(peak) for rank, peak, _ in rows}, float(rows[-1][2])


def main() -> int:
    """Print the table; 1 if a rank of one is further off than the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--malloc", default="exact", choices=["exact", "default"])
    args = parser.parse_args()
    worst, machine = 0.0, Machine.this(torch.device("cpu"))  # before this process holds anything
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as name:
            torch.manual_seed(0)
            recipe = write_recipe(Path(name), size)
            for kind in args.layouts:
                layout, recompute, options = LAYOUTS[kind]
                options = [*options, f"model.llm_grad_checkpoint={str(recompute).lower()}"]
                plan = Planner(
                    load_recipe(recipe, options), machine, ranks=layout.ranks, images=row_images(recipe)
                ).plan(layout)
                peaks, seconds = measure(recipe, layout, options, args.malloc)
                for rank, peak in sorted(peaks.items()):
                    expected = plan.memory[rank // layout.replicas].total
                    worst = max(worst, abs(expected / peak - 1))
                    print(
                        f"{size:7} {kind:22} rank {rank}: expected {expected / 2**30:6.2f} GiB, measured"
                        f" {peak / 2**30:6.2f} GiB, ratio {expected / peak:.2f}",
                        flush=True,
                    )
                assert plan.seconds is not None  # a CPU's arithmetic is measured
                print(
                    f"{size:7} {kind:22} step: expected {plan.seconds:6.1f} s, measured {seconds:6.1f} s, ratio"
                    f" {plan.seconds / seconds:.2f}",
                    flush=True,
                )
    print(json.dumps({"largest_deviation": round(worst, 3), "limit": LIMIT}))
    return int(worst > LIMIT)


def row_images(recipe: Path) -> int:
    """Images of a packed row of the shapes world: a sample is of some 60 tokens and has one image in three of four."""
    return load_recipe(recipe).data.pack_length // 60


if __name__ == "__main__":
    sys.exit(main())
