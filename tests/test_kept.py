"""What version 0.1 wrote is opened and means the same: recipes, interrupted and finished runs, exports.

The files are in tests/fixtures/v0_1; tests/fixtures/make_v0_1.py tells how they came about.
They are copied before anything is written.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lavis.cli import main
from lavis.config.recipe import load_recipe
from lavis.generation.engine import Engine
from lavis.generation.model import user_message
from lavis.generation.pictures import open_picture
from lavis.serve.load import load_chat
from lavis.serve.session import ChatSession

KEPT = Path(__file__).resolve().parent / "fixtures/v0_1"
EXPECTED = json.loads((KEPT / "expected.json").read_text(encoding="utf-8"))
RUNS = ("lora", "projection", "text")


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in the order in which they were made, and the program's log as it was before."""
    threads, handlers = torch.get_num_threads(), list(logging.getLogger("lavis").handlers)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logging.getLogger("lavis").handlers[:] = handlers


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A copy of the files that may be written to: it is the working directory, and its `cache` the cache folder."""
    folder = tmp_path / "kept"
    shutil.copytree(KEPT, folder)
    monkeypatch.setenv("LAVIS_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_recipes_and_saved_configurations_are_read(kept, name):
    """The flat recipe, with what was the default then, and the configuration that was saved with all its values mean
    the same.
    """
    given = yaml.safe_load(Path(f"recipes/{name}.yaml").read_text())["run"].get("cache_features", False)
    recipe = load_recipe(f"recipes/{name}.yaml", [f"run.cache_features={str(given).lower()}"])
    saved = load_recipe(f"runs/{name}/config.yaml")
    assert (recipe.model, recipe.data, recipe.run) == (saved.model, saved.data, saved.run)
    of_checkpoint = load_recipe(f"runs/{name}/checkpoints/step-3/config.yaml")
    assert (of_checkpoint.data, of_checkpoint.run) == (saved.data, saved.run)
    assert main(["configs", "check", f"recipes/{name}.yaml"]) == 0


def test_keys_of_a_recipe_keep_their_meaning(kept):
    recipe = load_recipe("recipes/lora.yaml")
    model = recipe.model
    tower, connector, llm = model.tower, model.connector, model.llm
    assert (tower.name, connector.name, llm.weights, tower.embed_dim, connector.qformer.hidden_size) == (
        "eva_clip_g",
        "qformer_linear",
        "tiny/llm",
        32,
        32,
    )
    assert (tower.train, connector.train_qformer, connector.train_queries) == ("frozen", "frozen", False)
    assert (connector.train, llm.train) == ("full", "lora")
    assert (llm.lora.rank, llm.lora.alpha, llm.lora.dropout, llm.lora.targets) == (2, 8, 0.2, "linear")
    assert (connector.num_query_token, tower.image_size, model.max_length) == (4, 64, 128)
    assert [entry.name for entry in recipe.data.train] == ["minigpt4_instruction", "llava_instruction"]
    first = recipe.data.train[0]
    assert first.path == ["data/train.json"] and first.images == "data/pictures"
    assert (
        recipe.optim.lr,
        recipe.optim.warmup_steps,
        recipe.optim.beta2,
        recipe.train.max_steps,
        recipe.train.accumulation,
    ) == (1e-2, 2, 0.98, 6, 2)
    assert [entry.weight for entry in recipe.data.train] == [3, 1]
    assert (recipe.eval.every, recipe.checkpoint.every, recipe.run.seed, recipe.run.output_dir) == (
        3,
        3,
        7,
        "output/lora",
    )


def ask(chat, engine, question, pictures):
    """The answer's ids and text, and the logits [vocabulary] of its first token."""
    settings = chat.defaults.with_values({"max_new_tokens": 8, "do_sample": False, "repetition_penalty": 1.0})
    reply = ChatSession(engine, settings).ask(question, pictures)
    text = "".join(reply)
    prompt = chat.encode([user_message(question, pictures)], {p.key: p for p in pictures})
    with torch.inference_mode():
        features = [chat.model.encode_images(chat.pixels(p))[0] for p in prompt.pictures]
        logits = chat.llm(inputs_embeds=chat.embed(prompt.ids, features)).logits[0, -1].float()
    return list(prompt.ids), reply.answer.ids, text, logits


@pytest.mark.parametrize("name", EXPECTED["artefacts"])
def test_answers_are_the_same(kept, name):
    how, answers = EXPECTED["artefacts"][name].values()
    where = {key: kept / how[key] for key in ("run", "checkpoint") if key in how}
    chat = load_chat(**{**how, **where}, device="cpu")
    engine = Engine(chat)
    try:
        for row in answers:
            pictures = [open_picture(kept / f"cache/data/pictures/{picture}.png") for picture in row["pictures"]]
            prompt_ids, ids, text, logits = ask(chat, engine, row["question"], pictures)
            assert (prompt_ids, ids, text) == (row["prompt_ids"], row["answer_ids"], row["answer"])
            largest = torch.tensor(row["logits"]["ids"])
            torch.testing.assert_close(logits[largest], torch.tensor(row["logits"]["values"]), rtol=0, atol=1e-5)
            rest = logits.clone().index_fill_(0, largest, -torch.inf)
            assert rest.max() < logits[largest].min() + 1e-5
    finally:
        engine.close()


def metrics(run):
    """Training and validation lines as they are kept."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [[row[key] for key in ("step", "loss", "lr", "grad_norm")] for row in rows if row["kind"] == "train"]
    return train, [[row["step"], row["loss"]] for row in rows if row["kind"] == "valid"]


def assert_goes_on_as_it_would_have(run):
    train, valid = metrics(run)
    before = EXPECTED["resumed"]["from_step"]
    assert train[:before] == EXPECTED["resumed"]["train"][:before]  # lines that were there already
    made = EXPECTED["made_with"]
    same = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()} == made
    # Another torch or processor adds up in another order.
    close = {"rel": 0, "abs": 0} if same else {"rel": 1e-5, "abs": 1e-7}
    for got, want in ((train, EXPECTED["resumed"]["train"]), (valid, EXPECTED["resumed"]["valid"])):
        assert len(got) == len(want)
        for row, expected in zip(got, want, strict=True):
            assert row == pytest.approx(expected, **close)
    assert (run / "summary.json").is_file() and (run / "checkpoints/step-6/COMPLETE").is_file()


def test_an_interrupted_run_goes_on_from_its_own_configuration(kept):
    run = kept / "runs/lora"
    assert len(metrics(run)[0]) == 4 and not (run / "summary.json").exists()
    assert main(["train", "--cfg-path", str(run / "config.yaml"), "--options", f"run.resume={run}"]) == 0
    assert_goes_on_as_it_would_have(run)


def test_an_interrupted_run_is_found_by_its_recipe(kept):
    run = kept / "output/lora/20250101_000000"
    shutil.copytree(kept / "runs/lora", run)
    assert main(["train", "--cfg-path", "recipes/lora.yaml", "--options", "run.resume=auto"]) == 0
    assert_goes_on_as_it_would_have(run)
    assert list(run.parent.iterdir()) == [run]


def test_a_finished_run_is_not_gone_on_with_but_trained_further_on_demand(kept):
    run = kept / "output/projection/20250101_000000"
    shutil.copytree(kept / "runs/projection", run)
    before = metrics(run)[0]
    assert (
        main(["train", "--cfg-path", "recipes/projection.yaml", "--options", f"run.resume={run}", "train.max_steps=4"])
        == 0
    )
    after = metrics(run)[0]
    assert after[: len(before)] == before and [row[0] for row in after] == [1, 2, 3, 4]
    assert main(["train", "--cfg-path", "recipes/projection.yaml", "--options", "run.resume=auto"]) == 0
    assert len(list(run.parent.iterdir())) == 2


def test_exports_of_old_runs_are_the_same(kept):
    assert main(["export", "pth", "runs/projection", "again/model.pth"]) == 0
    assert main(["export", "peft", "runs/lora", "again/peft"]) == 0
    assert main(["export", "hf", "runs/projection", "again/hf"]) == 0
    pairs = [
        [torch.load(Path(f"{folder}/model.pth"), weights_only=True)["model"] for folder in ("again", "exports")],
        *(
            [load_file(f"{folder}/{file}") for folder in ("again", "exports")]
            for file in ("peft/adapter_model.safetensors", "peft/projection.safetensors", "hf/model.safetensors")
        ),
    ]
    for again, old in pairs:
        assert again.keys() == old.keys()
        for key in old:
            assert again[key].dtype == old[key].dtype and torch.equal(again[key], old[key]), key
