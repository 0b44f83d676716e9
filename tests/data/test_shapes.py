"""The shapes world: right answers, held-out pairs kept out, and a build that is whole, repeatable and idempotent."""

import json
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from lavis.data.shapes import HELD_OUT, Scene, ShapesSpec, ensure_shapes, render, sample_scene
from lavis.data.shapes.language import KINDS, LANGS, answers, ask, caption, describe, interview
from lavis.data.shapes.scene import COLOURS, SHAPES, SIDES

SPEC = ShapesSpec(train=40, val=20, test=40, text_train=60, text_val=40)
NUMBERS = ("one", "two", "three")
ZH = {
    **dict(zip(COLOURS, ("红色", "橙色", "黄色", "绿色", "蓝色", "紫色", "粉色", "黑色"), strict=True)),
    **dict(zip(SHAPES, ("圆形", "方形", "三角形", "星形", "十字形", "圆环"), strict=True)),
    **dict(zip(SIDES, ("左边", "右边", "上边", "下边"), strict=True)),
    **dict(zip(NUMBERS, ("一个", "两个", "三个"), strict=True)),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_shapes(tmp_path_factory.mktemp("shapes") / "world", SPEC)


def rows(world: Path, name: str) -> list[dict]:
    return json.loads((world / f"{name}.json").read_text(encoding="utf-8"))


def turns(row: dict) -> list[tuple[str, str]]:
    asked, answered = row["instruction"], row["output"]
    return list(zip(asked, answered, strict=True)) if isinstance(asked, list) else [(asked, answered)]


def facts(scene: Scene) -> tuple[str, str, str, str]:
    return scene.colour, scene.shape, NUMBERS[len(scene.items) - 1], scene.side


def named(text: str, name: str) -> bool:
    return bool(re.search(rf"\b{name}(e?s)?\b", text.lower())) or ZH[name] in text


def expected(scene: Scene, question: str) -> set[str]:
    """The right answers, found from the words of the question and the scene alone."""
    colour, shape, number, side = facts(scene)
    for pattern, fact in (
        ("color|颜色", colour),
        ("[Hh]ow many|number|几个|多少", number),
        ("side|[Ww]here|哪一?边|哪里", side),
        ("shape|形状", shape),
    ):
        if re.search(pattern, question):
            return {fact, ZH[fact]}
    raise AssertionError(question)


@pytest.mark.parametrize("lang", LANGS)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right(kind: str, lang: str) -> None:
    for index in range(100):
        scene = sample_scene(f"right/{index}", combos="any")
        question = ask(scene, kind, lang, random.Random(index))
        assert question.answer in expected(scene, question.text)
        assert question.answer in answers(kind, lang)


@pytest.mark.parametrize(("split", "combos"), [("train", "seen"), ("val", "seen"), ("test", "held_out")])
def test_written_answers_match_their_pictures(world: Path, split: str, combos: str) -> None:
    for row in rows(world, split):
        scene = sample_scene(f"{SPEC.seed}/{split}/{int(row['image'][-10:-4])}", combos=combos)
        for asked, answered in turns(row):
            if row["kind"] == "caption":
                assert all(named(answered, fact) for fact in facts(scene))
            else:
                assert answered in expected(scene, asked.removeprefix("<Img><ImageHere></Img> "))


def test_same_key_same_scene() -> None:
    assert sample_scene("a") == sample_scene("a")
    assert sample_scene("a") != sample_scene("b")


def test_a_group_is_nearest_to_its_own_side() -> None:
    for index in range(300):
        scene = sample_scene(f"side/{index}", combos="any")
        x, y = (sum(getattr(item, axis) for item in scene.items) / scene.count for axis in "xy")
        distances = {"left": x, "right": 1 - x, "top": y, "bottom": 1 - y}
        assert min(distances, key=distances.get) == scene.side
        for a, b in pairwise(scene.items):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius - 0.02


def test_held_out_pairs_stay_out_of_training_and_make_up_the_test() -> None:
    for index in range(500):
        assert sample_scene(f"train/{index}").combo not in HELD_OUT
        assert sample_scene(f"test/{index}", combos="held_out").combo in HELD_OUT


def test_training_text_never_names_a_held_out_pair(world: Path) -> None:
    for name in ("train", "val", "captions"):
        for row in rows(world, name):
            text = " ".join(part for turn in turns(row) for part in turn)
            assert not any(named(text, colour) and named(text, shape) for colour, shape in HELD_OUT), row


def test_kinds_and_languages_are_balanced(world: Path) -> None:
    found = rows(world, "test")
    assert len(found) == 2 * SPEC.test
    assert set(Counter((row["kind"], row["lang"]) for row in found).values()) == {2 * SPEC.test // 8}


def test_an_interview_asks_each_kind_once() -> None:
    for count in range(5):
        questions = interview(sample_scene("interview"), "en", random.Random(count), count)
        assert len({question.kind for question in questions}) == len(questions) == count


def test_caption_and_description_tell_the_whole_scene() -> None:
    for index in range(100):
        scene = sample_scene(f"caption/{index}", combos="any")
        for lang in LANGS:
            for text in (caption(scene, lang), describe(scene, lang, random.Random(index))):
                assert all(named(text, fact) for fact in facts(scene)), text


def test_objects_are_drawn_in_their_colour_and_place() -> None:
    scene = sample_scene("drawn")
    image = render(scene, 448)
    assert image.size == (448, 448) and image.mode == "RGB"
    for item in scene.items:
        edge = 0.8 * item.radius if item.shape == "ring" else 0.0
        assert image.getpixel((round((item.x + edge) * 448), round(item.y * 448))) == item.tint
    assert min(image.getpixel((224, 224))) >= 220


def test_pictures_decode_at_the_right_size(world: Path) -> None:
    names = {row["image"] for split in ("train", "val", "test", "captions") for row in rows(world, split)}
    assert len(names) == SPEC.train + SPEC.val + SPEC.test
    for name in names:
        with Image.open(world / "images" / name) as image:
            assert image.convert("RGB").size == (SPEC.size, SPEC.size)


def test_rows_have_the_original_format(world: Path) -> None:
    for name in ("train", "val", "test"):
        for row in rows(world, name):
            first, *later = (asked for asked, _ in turns(row))
            assert first.startswith("<Img><ImageHere></Img> ") and not any("<ImageHere>" in asked for asked in later)
    for name in ("text_train", "text_val"):
        assert all("image" not in row and "ImageHere" not in str(row["instruction"]) for row in rows(world, name))
    ids = [row["id"] for name in ("train", "val", "test", "text_train", "text_val") for row in rows(world, name)]
    assert len(ids) == len(set(ids))


def test_building_again_changes_nothing(world: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    assert ensure_shapes(world, SPEC) == world
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before


def test_same_spec_same_bytes(world: Path, tmp_path: Path) -> None:
    again = ensure_shapes(tmp_path / "world", SPEC)
    for path in world.rglob("*.json"):
        assert path.read_bytes() == (again / path.relative_to(world)).read_bytes()


def test_another_spec_replaces_the_world_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    small = ShapesSpec(train=2, val=1, test=1, text_train=2, text_val=1)
    root = ensure_shapes(tmp_path / "world", small)
    ensure_shapes(root, ShapesSpec(train=3, val=1, test=1, text_train=2, text_val=1))
    assert len(list((root / "images").glob("train_*.png"))) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="mine|not empty"):
        ensure_shapes(tmp_path, SPEC)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_an_unknown_choice_of_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match="combos"):
        sample_scene("x", combos="all")
