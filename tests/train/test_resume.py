"""Interrupted and resumed equals uninterrupted, bit for bit."""

import re
import shutil
import signal
import subprocess
import time

import psutil
import pytest
import torch

from tests.train.world import command, environment, launch, only_run, saved_tensors, train, train_lines, write_recipe

# Dropout in what is trained, so that a generator left in another state would show.
TRAINED = {"freeze_qformer": False, "freeze_queries": False, "get_lora": True, "lora_dropout": 0.2}
pytestmark = pytest.mark.usefixtures("deepspeed_operators")
STEPS = 14
RUN = {
    "max_steps": STEPS,
    "save_freq": 2,
    "valid_splits": ["val"],
    "eval_freq": 7,
    "num_sample_prompts": 1,
    "max_new_tokens": 2,
}


@pytest.fixture(scope="module")
def uninterrupted(cache, tmp_path_factory):
    return train(cache, tmp_path_factory.mktemp("whole"), model=TRAINED, run=RUN)


def start(cache, folder, *options, ranks):
    """Start training and wait until step 5 is logged; the launcher's process."""
    recipe = write_recipe(folder, TRAINED, RUN)
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        command(recipe, *options, ranks=ranks),
        cwd=folder,
        env=environment(cache),
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        lines = list((folder / "output").glob("*/metrics.jsonl"))
        if lines and lines[0].read_text().count('"train"') >= 5:
            break
        time.sleep(0.01)
    assert process.poll() is None, (folder / "log").read_text()[-3000:]
    return psutil.Process(process.pid)


def start_and_kill(cache, folder, *options, ranks):
    """Start training and kill all of it with SIGKILL in the middle; its run folder."""
    launcher = start(cache, folder, *options, ranks=ranks)
    for victim in [launcher, *launcher.children(recursive=True)]:  # torchrun gives its workers sessions of their own
        victim.send_signal(signal.SIGKILL)
    launcher.wait()
    return only_run(folder)


def assert_same_end(run, expected):
    want, got = saved_tensors(expected, STEPS), saved_tensors(run, STEPS)
    assert want.keys() == got.keys()
    for name in want:
        assert torch.equal(want[name], got[name]), name
    columns = [[(r["step"], r["loss"], r["lr"], r["grad_norm"]) for r in train_lines(r)] for r in (expected, run)]
    assert columns[0] == columns[1]


def test_a_killed_run_goes_on_bit_for_bit(cache, tmp_path, uninterrupted):
    run = start_and_kill(cache, tmp_path, ranks=1)
    assert not (run / f"checkpoints/step-{STEPS}").exists()
    newest = max(int(p.name.split("-")[1]) for p in (run / "checkpoints").glob("step-*"))
    assert newest >= 4
    assert train(cache, tmp_path, "run.resume=auto", model=TRAINED, run=RUN) == run
    assert_same_end(run, uninterrupted)


def test_a_damaged_checkpoint_is_passed_over(cache, tmp_path, uninterrupted):
    run = start_and_kill(cache, tmp_path, ranks=1)
    newest = max((run / "checkpoints").glob("step-*"), key=lambda p: int(p.name.split("-")[1]))
    with (newest / "trainable.safetensors").open("r+b") as f:
        f.truncate(100)
    shutil.copytree(newest, run / "checkpoints/step-999")
    assert train(cache, tmp_path, "run.resume=auto", model=TRAINED, run=RUN) == run
    assert_same_end(run, uninterrupted)


ZERO = "parallel.deepspeed.zero_optimization"
RUNNERS = {
    "data-parallel": [],
    "ZeRO-2": ["parallel.strategy=zero", f"{ZERO}.stage=2"],
    "ZeRO-3": ["parallel.strategy=zero", f"{ZERO}.stage=3", f"{ZERO}.stage3_param_persistence_threshold=1"],
    "pipeline": ["parallel.strategy=pipeline", "parallel.num_stages=2"],
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name.startswith("ZeRO") else []) for name in RUNNERS]
)
def test_two_ranks_resume_too(cache, tmp_path, name):
    options = RUNNERS[name]
    whole = tmp_path / "whole"
    expected = train(cache, whole, *options, ranks=2, model=TRAINED, run=RUN)
    cut = tmp_path / "cut"
    cut.mkdir()
    run = start_and_kill(cache, cut, *options, ranks=2)
    assert train(cache, cut, "run.resume=auto", *options, ranks=2, model=TRAINED, run=RUN) == run
    assert_same_end(run, expected)


def test_when_a_rank_dies_all_end_within_a_minute_and_the_rank_is_named(cache, tmp_path):
    launcher = start(cache, tmp_path, *RUNNERS["pipeline"], ranks=2)
    (victim,) = [p for p in launcher.children() if p.environ().get("RANK") == "1"]
    victim.send_signal(signal.SIGKILL)
    assert launcher.wait(timeout=60) != 0
    message = (tmp_path / "log").read_text()
    assert "Signal 9 (SIGKILL)" in message and re.search(r"rank\s*: 1 ", message)


def test_another_layout_goes_on_from_a_zero_checkpoint(cache, tmp_path):
    """The first three steps with ZeRO-2 on two ranks, the others alone, equal all of them alone."""
    steps = {"batch_size_train": 4, "global_batch_size": 8, "save_freq": 3}
    whole = train(cache, tmp_path / "whole", run=steps)
    first = train(cache, tmp_path / "first", *RUNNERS["ZeRO-2"], ranks=2, run=steps)
    shutil.rmtree(first / "checkpoints/step-5")
    assert train(cache, tmp_path / "first", f"run.resume={first / 'checkpoints/step-3'}", run=steps) == first
    got, want = saved_tensors(first, 5), saved_tensors(whole, 5)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-7)


def failing(cache, folder, *options):
    done = launch(cache, write_recipe(folder), *options)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stderr


def test_resuming_something_else_is_refused(cache, tmp_path):
    first = train(cache, tmp_path, "checkpoint.every=2")
    assert "model.num_query_token" in failing(cache, tmp_path, f"run.resume={first}", "model.num_query_token=3")
    assert "rows per step" in failing(cache, tmp_path, f"run.resume={first}", "train.micro_batch_size=2")
    assert "no complete checkpoint" in failing(cache, tmp_path, "run.resume=nowhere")


def test_changed_frozen_weights_are_refused(cache, tmp_path):
    own = tmp_path / "cache"
    shutil.copytree(cache, own)
    first = train(own, tmp_path, "train.max_steps=3", "checkpoint.every=1")
    from safetensors.torch import load_file, save_file

    file = own / "tiny/tower.safetensors"
    tensors = load_file(file)
    tensors["ln_vision.bias"] += 1
    save_file(tensors, file)
    message = failing(own, tmp_path, f"run.resume={first}", "train.max_steps=3")
    assert "other frozen weights" in message and "model.pretrained" in message


def test_a_finished_run_is_not_resumed_by_auto(cache, tmp_path):
    train(cache, tmp_path, "train.max_steps=3")
    done = subprocess.run(
        command(tmp_path / "recipe.yaml", "train.max_steps=3", "run.resume=auto"),
        cwd=tmp_path,
        env=environment(cache),
        timeout=300,
    )
    assert done.returncode == 0
    assert len(list((tmp_path / "output").iterdir())) == 2
