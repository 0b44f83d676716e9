"""A run on a list of entries: text before pictures, tiles of unequal number, documents; trained, asked and exported."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from PIL import Image

from lavis.cli import main
from lavis.generation.engine import Engine
from lavis.generation.pictures import open_picture
from lavis.serve.load import load_chat
from lavis.serve.session import ChatSession
from lavis.train import train_recipe
from tests.train.world import MODEL, PICTURES, RUN

SHAPES = {"source": "shapes_instruction", "generate": PICTURES}
TEXT = {"source": "shapes_text", "generate": PICTURES}
STEPS = {"max_steps": 2, "warmup_steps": 0, "num_sample_prompts": 0}


@pytest.fixture
def run_of(cache, tmp_path, monkeypatch):
    """Trains on a `data` section and returns the run's folder."""
    from lavis.config.recipe import load_recipe

    monkeypatch.setenv("LAVIS_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)

    def train(data, model=MODEL, **run):
        run = {**{key: value for key, value in RUN.items() if key != "num_workers"}, **STEPS, **run}
        recipe = {"model": model, "data": {"num_workers": 0, **data}, "run": run}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        before = set((tmp_path / "output").glob("*"))
        train_recipe(load_recipe(tmp_path / "recipe.yaml"))
        (new,) = set((tmp_path / "output").iterdir()) - before
        return new

    return train


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {kind: [row["loss"] for row in rows if row["kind"] == kind] for kind in ("train", "valid")}


def test_a_text_entry_before_one_with_pictures(run_of, cache, tmp_path):
    """The processor is the model's, not the first entry's: chat and export see pictures of the model's size."""
    run = run_of({"train": [TEXT, SHAPES], "valid": [{**SHAPES, "split": "val"}], "test": [SHAPES]}, max_new_tokens=2)
    assert len(losses(run)["train"]) == 2 and len(losses(run)["valid"]) == 1
    summary = json.loads((run / "summary.json").read_text())
    assert "test/test/accuracy" in summary["results"] and (run / "answers_test_test.jsonl").is_file()
    chat = load_chat(run=run, device="cpu")
    assert (chat.processor.image_size, chat.processor.mean) == (64, (0.9, 0.9, 0.9))
    engine = Engine(chat)
    try:
        picture = open_picture(cache / "dataset/shapes/images/test_000000.png")
        session = ChatSession(engine, chat.defaults.with_values({"max_new_tokens": 3}))
        assert isinstance("".join(session.ask("What?", [picture])), str)
    finally:
        engine.close()
    assert main(["export", "hf", str(run), str(tmp_path / "hf")]) == 0
    values = json.loads((tmp_path / "hf/processor_config.json").read_text())["image_processor"]
    assert (values["size"], values["image_mean"]) == ({"height": 64, "width": 64}, [0.9, 0.9, 0.9])


def picture_rows(cache):
    """Pictures of three shapes, so that they have unequal numbers of tiles."""
    folder = cache / "shapely"
    folder.mkdir(exist_ok=True)
    rows = []
    for i, size in enumerate([(64, 64), (200, 64), (70, 190), (130, 128)] * 4):
        Image.effect_noise(size, 80 + i).convert("RGB").save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "instruction": f"What is {i}?", "output": "red"})
    (cache / "shapely.json").write_text(json.dumps(rows))
    return {"path": "shapely.json", "images": "shapely"}


@pytest.mark.parametrize("tiling", ["tiles", "anyres"])
def test_tiles_of_unequal_number_train_cached_and_packed_alike_and_are_asked(run_of, cache, tiling):
    entry = picture_rows(cache)
    model = {**MODEL, "media": {"tiling": tiling, "max_tiles": 3}}
    data = {"train": [entry], "valid": [entry], "length_grouping": False}
    live = losses(run_of(data, model))
    cached = losses(run_of({**data, "cache_features": True}, model))
    assert live["train"] == pytest.approx(cached["train"], rel=1e-5)
    assert live["valid"] == pytest.approx(cached["valid"], rel=1e-5)
    run = run_of({**data, "packing": True, "pack_length": 256}, model, batch_size_train=2)
    chat = load_chat(run=run, device="cpu")
    pictures = [open_picture(cache / f"shapely/{i}.png") for i in (1, 0)]
    engine = Engine(chat)
    try:
        session = ChatSession(engine, chat.defaults.with_values({"max_new_tokens": 3, "do_sample": False}))
        first = session.ask("What?", pictures)
        "".join(first)
        again = session.ask("And?", [open_picture(cache / "shapely/2.png")])
        "".join(again)
    finally:
        engine.close()
    prompt = again.answer.prompt
    assert again.answer.cached_tokens > 0 and len(prompt.pictures) == 3
    with torch.inference_mode():  # what the engine said from what it had read is what reading all anew says
        features = [chat.model.encode_images(chat.pixels(p)) for p in prompt.pictures]
        logits = chat.llm(inputs_embeds=chat.embed(prompt.ids, features)).logits[0, -1]
    stops = {*chat.stop_token_ids}
    assert (again.answer.ids or [None])[0] == (None if int(logits.argmax()) in stops else int(logits.argmax()))


def test_documents_train_packed_and_unpacked_alike(run_of, cache):
    texts = [" ".join(f"red {i} circle {j}" for j in range(i % 7 + 1)) for i in range(60)]
    (cache / "docs.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    model = {"arch": "causal_lm", "llm_model": "tiny/llm", "max_txt_len": 64}
    entry = {"path": "docs.jsonl", "kind": "document"}
    data = {"train": [entry], "valid": [entry]}
    blocks = losses(run_of(data, model, task="language_modeling", num_sample_prompts=2))
    rows = losses(run_of({**data, "packing": True, "pack_length": 128}, model, task="language_modeling"))
    # the same tokens, whichever blocks share a row
    assert all(loss > 0 for loss in blocks["train"] + rows["train"]) and blocks["valid"][0] > 0
