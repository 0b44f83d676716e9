"""A tiny world on disk for tests of the real commands: tokenizer, random LLM and tower, a handful of generated
pictures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parents[2]
PICTURES = {"train": 24, "val": 4, "test": 6, "text_train": 60, "text_val": 10}
MODEL = {
    "arch": "minigpt4qwen",
    "model_type": "shapes",
    "llm_model": "tiny/llm",
    "pretrained": "tiny/tower.safetensors",
    "vit": {"embed_dim": 32, "depth": 1, "num_heads": 2},
    "qformer": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
    "num_query_token": 4,
}
RUN = {
    "task": "image_text_pretrain",
    "batch_size_train": 4,
    "max_steps": 5,
    "init_lr": 1e-2,
    "warmup_steps": 2,
    "num_workers": 0,
    "log_freq": 1,
    "trackers": [],
    "output_dir": "output",
}


def make_world(cache: Path) -> None:
    """Fill `cache` with what the recipes made by `write_recipe` name."""
    from lavis.config.recipe import load_recipe, recipe_from_dict
    from lavis.core.types import Conversation, Message
    from lavis.models.minigpt4qwen import MiniGPT4Qwen
    from lavis.tokens.training import TokenizerTraining
    from lavis.weights.tensors import write_tensors

    torch.manual_seed(0)
    words = "What colour is the circle? red blue square left 红色的圆形在左边。有几个图形? Is there a triangle? yes no"
    recipe = recipe_from_dict(
        {"model": {"arch": "byte_level_bpe", "vocab_size": 400}, "datasets": {"shapes_text": {}}, "run": {}}
    )
    tokenizer = TokenizerTraining(recipe).fit([Conversation((Message("user", (words,)),))] * 3)
    llm = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip
    llm.save_pretrained(cache / "tiny/llm")
    tokenizer.save_pretrained(cache / "tiny/llm")
    full = load_recipe(write_recipe(cache)).model
    model = MiniGPT4Qwen(full, llm, 0)
    tower = {
        k: 3 * torch.randn_like(v) if k == "query_tokens" else v
        for k, v in model.state_dict().items()
        if not k.startswith("llm_")
    }
    write_tensors(tower, cache / "tiny/tower.safetensors", torch.float32)


def write_recipe(folder: Path, model: dict | None = None, run: dict | None = None, data: dict | None = None) -> Path:
    """A recipe file in `folder`, with what `model` and `run` change, and `data` in place of the shapes world's."""
    rows = {"datasets": {"shapes_instruction": {"generate": PICTURES}}} if data is None else {}
    rows["data"] = {"cache_features": False} | (data or {})  # where it is not what is tested
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": MODEL | (model or {}), **rows, "run": RUN | (run or {})}))
    return path


def command(recipe: Path, *options: str, ranks: int = 1) -> list[str]:
    """train.py on `recipe`, under torchrun when there are several ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, str(ROOT / "train.py"), "--cfg-path", str(recipe), *(["--options", *options] if options else [])]


def environment(cache: Path) -> dict[str, str]:
    """Of a training process in tests."""
    return {**os.environ, "LAVIS_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def train(
    cache: Path,
    folder: Path,
    *options: str,
    ranks: int = 1,
    model: dict | None = None,
    run: dict | None = None,
    data: dict | None = None,
) -> Path:
    """Train in `folder` through the real command; returns the run's folder."""
    folder.mkdir(exist_ok=True)
    return train_recipe(cache, write_recipe(folder, model, run, data), *options, ranks=ranks)


def launch(cache: Path, recipe: Path, *options: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """The real command on `recipe`, in its folder."""
    return subprocess.run(
        command(recipe, *options, ranks=ranks),
        cwd=recipe.parent,
        env=environment(cache),
        capture_output=True,
        text=True,
        timeout=300,
    )


def train_recipe(cache: Path, recipe: Path, *options: str, ranks: int = 1) -> Path:
    """Train `recipe` through the real command; returns the run's folder."""
    done = launch(cache, recipe, *options, ranks=ranks)
    assert done.returncode == 0, done.stderr[-4000:]
    return only_run(recipe.parent)


def only_run(folder: Path) -> Path:
    """The one run folder under `folder`/output."""
    (found,) = (folder / "output").iterdir()
    return found


def train_lines(run: Path) -> list[dict]:
    """Training lines of metrics.jsonl."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


def validation_losses(run: Path) -> list[float]:
    """Losses of the validation lines of metrics.jsonl."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "valid"]


def saved_tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Trained tensors and optimiser state of the checkpoint at `step`."""
    folder = run / f"checkpoints/step-{step}"
    return load_file(folder / "trainable.safetensors") | load_file(folder / "optimizer.safetensors")
