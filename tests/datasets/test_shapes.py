"""The shapes world: right answers, held-out pairs kept out, and a build that is whole, repeatable and idempotent."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from lavis.datasets.shapes import HELD_OUT, Scene, ShapesSpec, ensure_shapes, render, sample_scene
from lavis.datasets.shapes.language import KINDS, LANGS, answers, ask, caption, describe, interview
from lavis.datasets.shapes.scene import COLOURS, PLACES, SHAPES

SPEC = ShapesSpec(train=40, val=20, test=40, text_train=60, text_val=40)
ZH = {
    **dict(zip(COLOURS, ("红色", "橙色", "黄色", "绿色", "蓝色", "紫色", "粉色", "黑色"), strict=True)),
    **dict(zip(SHAPES, ("圆形", "方形", "三角形", "星形", "十字形", "圆环"), strict=True)),
    **dict(zip(PLACES, ("左上角", "右上角", "左下角", "右下角"), strict=True)),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_shapes(tmp_path_factory.mktemp("shapes") / "world", SPEC)


def rows(world: Path, name: str) -> list[dict]:
    return json.loads((world / f"{name}.json").read_text(encoding="utf-8"))


def turns(row: dict) -> list[tuple[str, str]]:
    asked, answered = row["instruction"], row["output"]
    return list(zip(asked, answered, strict=True)) if isinstance(asked, list) else [(asked, answered)]


def english(text: str) -> str:
    """The text with the Chinese names of colours, shapes and places put into English, apart."""
    for name, zh in sorted(ZH.items(), key=lambda pair: -len(pair[1])):
        text = text.replace(zh, f" {name} ")
    return text


def named(text: str, names: object) -> list[str]:
    return [name for name in names if re.search(rf"\b{name}\b", english(text))]


def expected(scene: Scene, question: str) -> set[str]:
    """The right answers, found from the words of the question and the scene alone."""
    colours, shapes, places = (named(question, names) for names in (COLOURS, SHAPES, PLACES))
    matching = [
        item
        for item in scene.items
        if item.colour in (colours or COLOURS) and item.shape in (shapes or SHAPES) and item.place in (places or PLACES)
    ]
    if re.search("How many|number of|几个", question):
        count = len(scene.items)
        return {("one", "two", "three", "four")[count - 1], ("一个", "两个", "三个", "四个")[count - 1]}
    if re.search("^(Is|Do) |有.*吗|有没有|能看到", question):
        return {"yes", "有"} if matching else {"no", "没有"}
    assert len(matching) == 1, f"{question!r} does not name one object of {scene}"
    item = matching[0]
    if re.search("Where|corner|哪", question):
        name = item.place
    else:
        name = item.colour if re.search("color|颜色", question) else item.shape
    return {name, ZH[name]}


@pytest.mark.parametrize("lang", LANGS)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right(kind: str, lang: str) -> None:
    for index in range(300):
        scene = sample_scene(f"right/{index}", combos="any", max_items=4)
        question = ask(scene, kind, lang, random.Random(index), split="test")
        assert question.answer in expected(scene, question.text)
        assert question.answer in answers(kind, lang, max_items=4)


@pytest.mark.parametrize(("split", "combos"), [("train", "seen"), ("val", "seen"), ("test", "held_out")])
def test_written_answers_match_their_pictures(world: Path, split: str, combos: str) -> None:
    for row in rows(world, split):
        scene = sample_scene(f"{SPEC.seed}/{split}/{int(row['image'][-10:-4])}", combos=combos)
        for asked, answered in turns(row):
            if row["kind"] != "caption":
                assert answered in expected(scene, asked.removeprefix("<Img><ImageHere></Img> "))


def test_same_key_same_scene() -> None:
    assert sample_scene("a") == sample_scene("a")
    assert sample_scene("a") != sample_scene("b")


def test_no_attribute_repeats_in_a_scene() -> None:
    for index in range(300):
        items = sample_scene(f"unique/{index}", combos="any", max_items=4).items
        for name in ("colour", "shape", "place"):
            assert len({getattr(item, name) for item in items}) == len(items)
        assert [item.place for item in items] == [place for place in PLACES if place in {i.place for i in items}]


def test_held_out_pairs_stay_out_of_training_and_into_every_test_scene() -> None:
    for index in range(500):
        assert not HELD_OUT & sample_scene(f"train/{index}").combos
        assert HELD_OUT & sample_scene(f"test/{index}", combos="held_out").combos


def test_training_text_never_names_a_held_out_pair(world: Path) -> None:
    pairs = re.compile("|".join(f"{c} +(的 *)?{s}" for c, s in HELD_OUT))
    for name in ("train", "val", "captions"):
        for row in rows(world, name):
            for asked, answered in turns(row):
                assert not pairs.search(re.sub(" +", " ", english(f"{asked} {answered}"))), row


def test_test_questions_are_about_held_out_objects() -> None:
    scene = sample_scene("about", combos="held_out")
    item = next(item for item in scene.items if item.combo in HELD_OUT)
    question = ask(scene, "colour", "en", random.Random(0), split="test", item=item)
    assert question.target == item and question.answer == item.colour


def test_kinds_languages_and_existence_are_balanced(world: Path) -> None:
    found = rows(world, "test")
    assert len(found) == 2 * SPEC.test
    assert set(Counter((row["kind"], row["lang"]) for row in found).values()) == {2 * SPEC.test // 10}
    said = Counter(row["output"] for row in found if row["kind"] == "exist")
    assert said["yes"] == said["no"] and said["有"] == said["没有"]


def test_drawn_existence_is_balanced() -> None:
    scene = sample_scene("balance")
    said = Counter(ask(scene, "exist", "en", random.Random(i), split="train").answer for i in range(2000))
    assert abs(said["yes"] - said["no"]) < 200


def test_an_interview_does_not_give_its_answers_away() -> None:
    for index in range(200):
        scene = sample_scene(f"interview/{index}", combos="any")
        questions = interview(scene, "en", random.Random(index), 6, split="any")
        before = questions[:-1]
        assert questions[-1].kind == "exist" and all(question.kind != "exist" for question in before)
        assert all(sum(bool(named(q.text, names)) for names in (COLOURS, SHAPES, PLACES)) <= 1 for q in before)


def test_caption_and_description_tell_the_whole_scene() -> None:
    for index in range(100):
        scene = sample_scene(f"caption/{index}", combos="any")
        for lang in LANGS:
            for text in (caption(scene, lang), describe(scene, lang, random.Random(index))):
                for item in scene.items:
                    assert named(text.lower(), [item.colour, item.shape, item.place]) == [
                        item.colour,
                        item.shape,
                        item.place,
                    ]


def test_objects_are_drawn_in_their_colour_and_place() -> None:
    scene = sample_scene("drawn", max_items=1)
    item = scene.items[0]
    image = render(scene, 448)
    assert image.size == (448, 448) and image.mode == "RGB"
    edge = 0.8 * item.radius if item.shape == "ring" else 0.0
    assert image.getpixel((round((item.x + edge) * 448), round(item.y * 448))) == item.tint
    far = image.getpixel((round((1 - item.x) * 448), round((1 - item.y) * 448)))
    assert min(far) >= 220


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


@pytest.mark.parametrize("max_items", [0, 5])
def test_bad_counts_are_refused(max_items: int) -> None:
    with pytest.raises(ValueError, match="max_items"):
        sample_scene("x", max_items=max_items)
