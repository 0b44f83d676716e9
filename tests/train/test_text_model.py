"""An LLM alone through the real commands: adapters, every way to lay it out, and a start from an earlier run."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.train.world import PICTURES, train_lines, train_recipe

pytestmark = pytest.mark.usefixtures("deepspeed_operators")
RUN = {
    "task": "language_modeling", "batch_size_train": 8, "max_steps": 3, "init_lr": 1e-2, "warmup_steps": 1,
    "num_workers": 0, "log_freq": 1, "save_freq": 1, "keep_checkpoints": 9, "trackers": [], "output_dir": "output",
    "num_sample_prompts": 0,
}  # fmt: skip
LORA = {"weights": "tiny/llm", "train": "lora", "lora": {"rank": 2, "dropout": 0.0, "targets": "linear"}}
NEW = {
    "tokenizer": "tiny/llm", "train": "full", "config": {
        "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    },
}  # fmt: skip
LAYOUTS = {
    "data-parallel": (2, ["train.micro_batch_size=4"]),
    "ZeRO-2": (2, ["train.micro_batch_size=4", "parallel.strategy=zero"]),
    "pipeline of 2": (
        2,
        ["train.micro_batch_size=2", "train.accumulation=4", "parallel.strategy=pipeline", "parallel.num_stages=2"],
    ),
}
LAYOUTS["ZeRO-2"][1].append("parallel.deepspeed.zero_optimization.stage=2")


def train_text(cache, folder, llm, *options, ranks=1, **sections):
    folder.mkdir(exist_ok=True)
    recipe = folder / "recipe.yaml"
    model = {"llm": llm, "max_length": 200}
    data = {"shapes_text": {"generate": PICTURES}}
    recipe.write_text(yaml.safe_dump({"model": model, "datasets": data, "run": RUN} | sections))
    return train_recipe(cache, recipe, *options, ranks=ranks)


@pytest.fixture(scope="module", params=["adapters", "new"])
def single(request, cache, tmp_path_factory):
    llm = {"adapters": LORA, "new": NEW}[request.param]
    return llm, train_text(cache, tmp_path_factory.mktemp("single"), llm)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_equals_a_single_process(cache, tmp_path, single, layout):
    llm, expected = single
    ranks, options = LAYOUTS[layout]
    run = train_text(cache, tmp_path, llm, *options, ranks=ranks)
    for want, got in zip(train_lines(expected), train_lines(run), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
    ours, theirs = (load_file(r / "checkpoints/step-3/trainable.safetensors") for r in (expected, run))
    assert ours.keys() == theirs.keys()


def test_a_run_starts_from_another_one(cache, tmp_path):
    first = train_text(cache, tmp_path / "first", LORA, "train.max_steps=1", "optim.warmup_steps=0")
    init = [{"from": str(first), "parts": ["llm"]}]
    second = train_text(
        cache,
        tmp_path / "second",
        LORA,
        "train.max_steps=1",
        "optim.warmup_steps=0",
        "optim.lr=0.0",
        "optim.min_lr=0.0",
        init=init,
    )
    before, after = (load_file(run / "checkpoints/step-1/trainable.safetensors") for run in (first, second))
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
