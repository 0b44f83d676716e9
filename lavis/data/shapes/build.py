"""Writes the shapes world to disk: pictures, image-text annotations and the text corpus of its small chat LLMs."""

import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lavis.data.shapes.language import CAPTION_REQUESTS, KINDS, LANGS, ask, caption, describe, interview
from lavis.data.shapes.scene import Combos, Scene, render, sample_scene

Row = dict[str, Any]
FORMAT = 6
"""Raised when the same spec would write different files."""

IMAGE_TAG = "<Img><ImageHere></Img> "
_SPEC_FILE = "spec.json"


@dataclass(frozen=True)
class ShapesSpec:
    """What to generate; two equal specs give byte-equal annotations.

    Attributes:
        train, val, test: pictures in each split; val and test get two questions for each picture.
        text_train, text_val: dialogues and single questions of the text corpus.
        size: side of a picture in pixels.
        seed: of everything.
    """

    train: int = 16_000
    val: int = 200
    test: int = 500
    text_train: int = 40_000
    text_val: int = 400
    size: int = 64
    seed: int = 42


def ensure_shapes(root: Path, spec: ShapesSpec = ShapesSpec()) -> Path:
    """Make sure that `root` holds the world of `spec`, and return it.

    Nothing is done when it does already. Otherwise all is written to a folder beside it and renamed at the end, so
    `root` is whole or absent; a `root` of another spec is replaced.

    Raises:
        FileExistsError: `root` exists, is not empty and was not written by this function.
    """
    root = Path(root)
    wanted = {"format": FORMAT, **asdict(spec)}
    if _holds(root, wanted):
        return root
    if root.exists() and not (root / _SPEC_FILE).is_file() and any(root.iterdir()):
        raise FileExistsError(f"{root} is not empty and holds no {_SPEC_FILE}: choose another folder or empty it")
    root.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        _write_world(work, spec)
        _write_json(work / _SPEC_FILE, wanted)
        work.chmod(0o755)  # mkdtemp makes it private
        _move_into_place(work, root)
    except OSError:
        if not _holds(root, wanted):  # unless another process made the same world in the meantime
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return root


def _holds(root: Path, wanted: dict[str, Any]) -> bool:
    spec_file = root / _SPEC_FILE
    return spec_file.is_file() and json.loads(spec_file.read_text(encoding="utf-8")) == wanted


def _move_into_place(work: Path, root: Path) -> None:
    """Rename `work` to `root`, setting an older world aside first: a folder cannot be renamed onto a full one."""
    if root.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{root.name}-old-", dir=root.parent))
        os.replace(root, old / "world")
        os.replace(work, root)
        shutil.rmtree(old)
    else:
        os.replace(work, root)


def _write_world(folder: Path, spec: ShapesSpec) -> None:
    (folder / "images").mkdir()
    train: list[Row] = []
    captions: list[Row] = []
    interviews: list[Row] = []
    for index, (name, scene) in enumerate(_pictures(folder, spec, "train", spec.train, "seen")):
        rng = random.Random(f"{spec.seed}/train/words/{index}")
        train.extend(_train_rows(name, scene, rng))
        interviews.append(_interview_row(f"{name[:-4]}-interview", name, scene, rng.choice(LANGS), rng, len(KINDS)))
        captions.extend(
            _row(f"{name[:-4]}-{lang}", "caption", lang, "", caption(scene, lang), image=name) for lang in LANGS
        )
    _write_json(folder / "train.json", train)
    _write_json(folder / "captions.json", captions)
    _write_json(folder / "interviews.json", interviews)
    parts: list[tuple[str, int, Combos]] = [("val", spec.val, "seen"), ("test", spec.test, "held_out")]
    for split, count, combos in parts:
        pictures = _pictures(folder, spec, split, count, combos)
        _write_json(folder / f"{split}.json", _question_rows(pictures, spec, split))
    _write_json(folder / "text_train.json", [_text_dialogue(spec, index) for index in range(spec.text_train)])
    _write_json(folder / "text_val.json", [_text_question(spec, index) for index in range(spec.text_val)])


def _pictures(folder: Path, spec: ShapesSpec, split: str, count: int, combos: Combos) -> Iterator[tuple[str, Scene]]:
    """Draw, save and yield the pictures of a split with their file names."""
    for index in range(count):
        scene = sample_scene(f"{spec.seed}/{split}/{index}", combos=combos)
        name = f"{split}_{index:06d}.png"
        render(scene, spec.size).save(folder / "images" / name, compress_level=1)
        yield name, scene


def _train_rows(name: str, scene: Scene, rng: random.Random) -> list[Row]:
    """A caption, a single question and a dialogue about one picture, each in a language drawn for it."""
    lang, stem = rng.choice(LANGS), name[:-4]
    request = IMAGE_TAG + rng.choice(CAPTION_REQUESTS[lang])
    rows = [_row(f"{stem}-0", "caption", lang, request, caption(scene, lang), image=name)]
    question = ask(scene, rng.choice(KINDS), lang := rng.choice(LANGS), rng)
    rows.append(_row(f"{stem}-1", question.kind, lang, IMAGE_TAG + question.text, question.answer, image=name))
    lang = rng.choice(LANGS)
    rows.append(_interview_row(f"{stem}-2", name, scene, lang, rng, rng.randint(2, len(KINDS))))
    return rows


def _interview_row(ident: str, name: str, scene: Scene, lang: str, rng: random.Random, count: int) -> Row:
    turns = interview(scene, lang, rng, count)
    asked = [IMAGE_TAG + turns[0].text, *(turn.text for turn in turns[1:])]
    return _row(ident, "dialogue", lang, asked, [turn.answer for turn in turns], image=name)


def _question_rows(pictures: Iterator[tuple[str, Scene]], spec: ShapesSpec, split: str) -> list[Row]:
    """Two single questions for each picture; kinds and languages come round evenly."""
    rows = []
    for index, (name, scene) in enumerate(pictures):
        rng = random.Random(f"{spec.seed}/{split}/words/{index}")
        for turn, lang in enumerate(LANGS):
            kind = KINDS[(index + turn) % len(KINDS)]
            question = ask(scene, kind, lang, rng)
            rows.append(_row(f"{name[:-4]}-{turn}", kind, lang, IMAGE_TAG + question.text, question.answer, image=name))
    return rows


def _text_dialogue(spec: ShapesSpec, index: int) -> Row:
    """A conversation about a scene given in words: a caption, a single question, or several questions and perhaps a
    caption.

    Captions, whose every word is found in the description, are what a small LLM learns to look things up from. One
    question in 25 hides
    the scene, so that the LLM has an idea what to say when it sees nothing.
    """
    rng, scene = _text_scene(spec, "text_train", index)
    lang, form = rng.choice(LANGS), rng.random()
    request = (rng.choice(CAPTION_REQUESTS[lang]), caption(scene, lang))
    count = 0 if form < 0.25 else 1 if form < 0.45 else len(KINDS)
    turns = [(question.text, question.answer) for question in interview(scene, lang, rng, count)]
    if not turns or (count > 1 and rng.random() < 0.3):
        turns.append(request)
    asked, answered = [turn[0] for turn in turns], [turn[1] for turn in turns]
    ident, kind = f"text_train_{index:06d}", ("caption", "question", "dialogue")[min(count, 2)]
    if kind == "question" and rng.random() < 0.04:
        return _row(ident, kind, lang, asked[0], answered[0])
    asked[0] = _with_description(describe(scene, _mostly(lang, rng), rng), asked[0], rng)
    return (
        _row(ident, kind, lang, asked, answered) if len(asked) > 1 else _row(ident, kind, lang, asked[0], answered[0])
    )


def _text_question(spec: ShapesSpec, index: int) -> Row:
    """A single question about a scene given in words; kinds and languages come round evenly."""
    rng, scene = _text_scene(spec, "text_val", index)
    kind, lang = KINDS[index % len(KINDS)], LANGS[index // len(KINDS) % len(LANGS)]
    question = ask(scene, kind, lang, rng)
    asked = _with_description(describe(scene, _mostly(lang, rng), rng), question.text, rng)
    return _row(f"text_val_{index:06d}", kind, lang, asked, question.answer)


def _mostly(lang: str, rng: random.Random) -> str:
    """The given language, or three times in ten one drawn anew: a scene is understood whatever language tells it."""
    return rng.choice(LANGS) if rng.random() < 0.3 else lang


def _text_scene(spec: ShapesSpec, split: str, index: int) -> tuple[random.Random, Scene]:
    rng = random.Random(f"{spec.seed}/{split}/words/{index}")
    return rng, sample_scene(f"{spec.seed}/{split}/{index}", combos="any")


def _with_description(description: str, question: str, rng: random.Random) -> str:
    """A user turn that gives the scene in words; most of them in the tags that hold a picture later.

    The spaces inside the tags keep words and tags the same tokens as elsewhere: without them "red" and " red" differ.
    """
    wrapper = rng.choice(("<Img> {d} </Img> {q}", "<Img> {d} </Img> {q}", "{d}\n{q}"))
    return wrapper.format(d=description, q=question)


def _row(
    ident: str, kind: str, lang: str, asked: str | list[str], answered: str | list[str], image: str | None = None
) -> Row:
    picture = {} if image is None else {"image": image}
    return {"id": ident, "kind": kind, "lang": lang, **picture, "instruction": asked, "output": answered}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=None), encoding="utf-8")
