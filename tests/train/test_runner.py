"""What a run writes and when it stops, through the real commands."""

import json
import re
import subprocess
from html.parser import HTMLParser

from PIL import Image

from tests.train.world import command, environment, launch, only_run, train, train_lines, write_recipe


def test_a_run_leaves_what_it_promises(cache, tmp_path):
    run = train(
        cache,
        tmp_path,
        run={
            "valid_splits": ["val"], "test_splits": ["test"], "eval_freq": 2, "save_freq": 2, "num_sample_prompts": 2,
            "max_new_tokens": 3, "evaluate_before": True, "evaluate_blind": True, "trackers": ["tensorboard"],
            "export": str(tmp_path / "exported"),
        },
    )  # fmt: skip
    lines = train_lines(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert {"loss", "lr", "grad_norm", "samples_per_s", "tokens_per_s", "padding", "data_seconds"} <= lines[0].keys()
    assert {"forward_seconds", "backward_seconds", "optimizer_seconds", "mfu"} <= lines[0].keys()
    summary = json.loads((run / "summary.json").read_text())
    for label in ("before", "test", "blind"):
        assert 0 <= summary["results"][f"{label}/test/accuracy"] <= 1
    assert summary["trainable_parameters"] == 32 * 48 + 48
    for name in (
        "config.yaml",
        "loss.png",
        "report.html",
        "tensorboard",
        "checkpoints/step-5/COMPLETE",
        "answers_blind_test.jsonl",
    ):
        assert (run / name).exists(), name
    with Image.open(run / "loss.png") as plot:
        assert plot.size[0] > 400
    page = (run / "report.html").read_text()
    HTMLParser().feed(page)
    assert [int(s) for s in re.findall(r"<th>step (\d+)</th>", page)] == [0, 2, 4, 5]
    assert page.count("data:image/png") == 2
    answers = [json.loads(line) for line in (run / "answers_blind_test.jsonl").read_text().splitlines()]
    assert len(answers) == 12 and all(a["images"] == [] for a in answers)
    assert (tmp_path / "exported/tower.safetensors").exists()


def test_the_exported_projection_is_the_trained_one_and_evaluates_alone(cache, tmp_path):
    run = train(
        cache, tmp_path, "run.test_splits=[test]", "eval.max_new_tokens=3", f"export.path={tmp_path / 'exported'}"
    )
    expected = json.loads((run / "summary.json").read_text())["results"]
    (run.parent / run.name).rename(tmp_path / "first")
    options = ["run.test_splits=[test]", "eval.max_new_tokens=3", "model.load_finetuned=true"]
    again = train(
        cache, tmp_path, "run.evaluate=true", *options, f"model.finetuned={tmp_path / 'exported/tower.safetensors'}"
    )
    assert json.loads((again / "summary.json").read_text())["results"] == expected


def test_a_run_is_evaluated_from_its_checkpoint_into_a_folder_of_its_own(cache, tmp_path):
    options = ["run.test_splits=[test]", "eval.max_new_tokens=3"]
    run = train(cache, tmp_path, *options)
    config = (run / "config.yaml").read_text()
    done = subprocess.run(
        command(tmp_path / "recipe.yaml", *options, "run.evaluate=true", f"run.resume={run}"),
        cwd=tmp_path,
        env=environment(cache),
        timeout=300,
    )
    assert done.returncode == 0
    (other,) = set((tmp_path / "output").iterdir()) - {run}
    results = [json.loads((folder / "summary.json").read_text())["results"] for folder in (run, other)]
    assert results[0] == results[1] and (run / "config.yaml").read_text() == config


def test_mixed_precision_on_the_cpu_stays_near_fp32(cache, tmp_path):
    exact = train_lines(train(cache, tmp_path / "fp32"))
    mixed = train_lines(train(cache, tmp_path / "bf16", "train.autocast_on_cpu=true"))
    assert all(abs(a["loss"] - b["loss"]) < 0.05 * a["loss"] for a, b in zip(exact, mixed, strict=True))
    assert [a["loss"] for a in exact] != [b["loss"] for b in mixed]


def stops(cache, folder, *options):
    done = launch(cache, write_recipe(folder), *options)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stderr


def test_a_loss_that_is_not_finite_stops_before_the_update(cache, tmp_path):
    message = stops(
        cache,
        tmp_path,
        "optim.lr=1e36",
        "optim.warmup_steps=0",
        "optim.max_grad_norm=null",
        "checkpoint.every=1",
        "optim.min_lr=0",
    )
    assert "nothing was saved" in message
    checkpoints = list((only_run(tmp_path) / "checkpoints").iterdir())
    assert checkpoints  # of the steps before


def test_too_many_broken_images_stop_the_run_and_few_do_not(cache, tmp_path):
    import shutil

    own = tmp_path / "cache"
    shutil.copytree(cache, own)
    train(own, tmp_path / "fine", "train.max_steps=3")  # makes the pictures
    pictures = sorted((own / "dataset/shapes/images").glob("train_*"))
    pictures[0].write_bytes(b"no picture")
    options = ("train.micro_batch_size=24", "train.max_steps=6")
    run = train(own, tmp_path / "few", *options, "run.max_bad_image_share=0.2")
    assert "can't be read" in (run / "log.txt").read_text()
    (tmp_path / "many").mkdir()
    assert "max_bad_image_share=0.01" in stops(own, tmp_path / "many", *options)


def test_two_starts_in_one_second_get_two_folders(tmp_path):
    from lavis.runs.folder import _new_folder

    assert len({_new_folder(tmp_path) for _ in range(5)}) == 5
