import json
import shutil

import pytest
import torch

from lavis.core.errors import CheckpointError
from lavis.runs.checkpoint import (
    TrainState,
    best_checkpoint,
    complete_checkpoints,
    find_checkpoint,
    identity,
    newest_run,
    prune,
    save_checkpoint,
)


def save(folder, step, loss=None):
    state = TrainState(step, 8, {}, {}, loss)
    return save_checkpoint(
        folder, state, {"w": torch.full((3,), float(step))}, {"exp_avg.w": torch.ones(3)}, "run: {}\n"
    )


def test_round_trip(tmp_path):
    save(tmp_path, 5, 0.25)
    (found,) = complete_checkpoints(tmp_path)
    assert found.step == 5 and found.valid_loss == 0.25
    assert found.state() == TrainState(5, 8, {}, {}, 0.25)
    assert torch.equal(found.tensors()["w"], torch.full((3,), 5.0))
    assert list(found.optimizer_tensors()) == ["exp_avg.w"]


@pytest.mark.parametrize(
    "file", ["trainable.safetensors", "optimizer.safetensors", "state.json", "config.yaml", "COMPLETE"]
)
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_what_is_not_whole_is_not_there(tmp_path, file, how):
    save(tmp_path, 1)
    broken = save(tmp_path, 2).path / file
    if how == "missing":
        broken.unlink()
    else:
        broken.write_bytes(broken.read_bytes()[:-1])
    assert [c.step for c in complete_checkpoints(tmp_path)] == [1]
    save(tmp_path, 2)  # is written anew
    assert [c.step for c in complete_checkpoints(tmp_path)] == [1, 2]


def test_pruning_keeps_the_newest_and_the_best_and_clears_leftovers(tmp_path):
    for step, loss in ((1, 0.9), (2, 0.1), (3, 0.5), (4, None), (5, 0.4)):
        save(tmp_path, step, loss)
    (tmp_path / ".tmp-step-6-123").mkdir()
    prune(tmp_path, 2)
    kept = complete_checkpoints(tmp_path)
    assert [c.step for c in kept] == [2, 4, 5]
    assert best_checkpoint(kept).step == 2
    assert not list(tmp_path.glob(".tmp*"))


def test_finding_by_path_and_the_newest_run(tmp_path):
    for name, step in (("20260101_000000", 9), ("20260102_000000", 3), ("20260103_000000", None)):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        if step:
            save(tmp_path / name / "checkpoints", step)
    assert newest_run(tmp_path, lambda _: True).step == 3
    assert newest_run(tmp_path, lambda folder: folder.name < "20260102").step == 9
    assert newest_run(tmp_path / "nowhere", lambda _: True) is None
    assert find_checkpoint(tmp_path / "20260101_000000").step == 9
    assert find_checkpoint(tmp_path / "20260101_000000/checkpoints/step-9").step == 9
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_checkpoint(tmp_path / "20260103_000000")


def test_identity_tells_contents_apart(tmp_path):
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"one")
    first = identity(file)
    file.write_bytes(b"two")
    assert identity(file) != first
    (tmp_path / "config.json").write_text(json.dumps({}))
    whole = identity(tmp_path)
    assert whole != identity(file)
    (tmp_path / "README.md").write_text("what this is")
    assert identity(tmp_path) == whole


def test_identity_looks_at_both_ends_of_a_large_file(tmp_path):
    file = tmp_path / "w.pth"
    size = 20 << 20
    file.write_bytes(bytes(size))
    first = identity(file)
    file.write_bytes(bytes(size - 1) + b"1")
    assert identity(file) != first


def test_a_checkpoint_that_has_gone_is_told(tmp_path):
    found = save(tmp_path, 5)
    shutil.rmtree(found.path)
    for read in (found.tensors, found.optimizer_tensors, found.state):
        with pytest.raises(CheckpointError, match="step-5"):
            read()
