"""Words of the shapes world: captions, scene descriptions, questions and short answers in English and Chinese."""

import random
from dataclasses import dataclass

from lavis.datasets.shapes.scene import COLOURS, HELD_OUT, PLACES, SHAPES, Item, Scene

LANGS: tuple[str, ...] = ("en", "zh")
KINDS: tuple[str, ...] = ("colour", "shape", "count", "side", "exist")

_ZH = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色",
    "blue": "蓝色", "purple": "紫色", "pink": "粉色", "black": "黑色",
    "circle": "圆形", "square": "方形", "triangle": "三角形", "star": "星形", "cross": "十字形", "ring": "圆环",
    "top left": "左上角", "top right": "右上角", "bottom left": "左下角", "bottom right": "右下角",
    "one": "一个", "two": "两个", "three": "三个", "four": "四个", "yes": "有", "no": "没有",
}  # fmt: skip
_NUMBERS = ("one", "two", "three", "four")

# A question names its object by colour ({c}), shape ({s}), corner ({p}) or colour and shape ({cs}).
_QUESTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "colour": (
            "What color is the {s}?",
            "Which color does the {s} have?",
            "What is the color of the {s}?",
            "What color is the object at the {p}?",
        ),
        "shape": (
            "What shape is the {c} object?",
            "Which shape does the {c} object have?",
            "What is the shape of the {c} object?",
            "What shape is the object at the {p}?",
        ),
        "count": ("How many objects are there?", "How many shapes do you see?", "What is the number of objects?"),
        "side": ("Where is the {s}?", "Where is the {c} object?", "Where is the {cs}?", "In which corner is the {s}?"),
        "exist": ("Is there a {cs}?", "Do you see a {cs}?", "Is a {cs} there?"),
    },
    "zh": {
        "colour": ("{s}是什么颜色？", "{s}的颜色是什么？", "{p}的物体是什么颜色？"),
        "shape": ("{c}的物体是什么形状？", "{c}物体的形状是什么？", "{p}的物体是什么形状？"),
        "count": ("有几个物体？", "图形有几个？", "一共有几个物体？"),
        "side": ("{s}在哪里？", "{c}的物体在哪里？", "{c}的{s}在哪里？", "{s}在哪个角？"),
        "exist": ("有{c}的{s}吗？", "有没有{c}的{s}？", "能看到{c}的{s}吗？"),
    },
}
CAPTION_REQUESTS: dict[str, tuple[str, ...]] = {
    "en": ("Describe the picture.", "What is in the picture?", "Tell me what you see."),
    "zh": ("描述这张图片。", "图片里有什么？", "说说你看到了什么。"),
}

CHINESE_WORDS: tuple[str, ...] = (
    *_ZH.values(), "有没有", "物体", "颜色", "形状", "图形", "图片", "什么", "哪里", "哪个角", "几个", "一共", "看到",
)  # fmt: skip
"""Words for a tokenizer to keep whole: Chinese has no spaces, and merges across words ("红色的圆") would make each
colour-shape pair a token of its own, so that a pair never seen could not be said."""


@dataclass(frozen=True)
class Question:
    """A question with its one right answer. `target` is the object asked about (None for counts and refused objects)."""

    kind: str
    lang: str
    text: str
    answer: str
    target: Item | None = None


def word(name: str, lang: str) -> str:
    """The word for a colour, shape, place, number or yes/no, given by its English name."""
    return name if lang == "en" else _ZH[name]


def answers(kind: str, lang: str, max_items: int = 3) -> tuple[str, ...]:
    """All canonical answers of a question kind."""
    names = {
        "colour": tuple(COLOURS),
        "shape": SHAPES,
        "count": _NUMBERS[:max_items],
        "side": tuple(PLACES),
        "exist": ("yes", "no"),
    }[kind]
    return tuple(word(name, lang) for name in names)


def caption(scene: Scene, lang: str) -> str:
    """The full caption, objects in reading order; it determines the scene up to jitter."""
    return _sentence(list(scene.items), lang)


def _sentence(items: list[Item], lang: str) -> str:
    if lang == "en":
        return ", ".join(f"{item.colour} {item.shape} at the {item.place}" for item in items) + "."
    return "，".join(f"{_ZH[i.colour]}的{_ZH[i.shape]}在{_ZH[i.place]}" for i in items) + "。"


def describe(scene: Scene, lang: str, rng: random.Random) -> str:
    """A textual stand-in for the picture: a sentence or a bare list, its objects in any order."""
    items = rng.sample(scene.items, len(scene.items))
    if rng.random() < 0.5:
        return _sentence(items, lang)
    gap, comma = (" ", ", ") if lang == "en" else ("", "，")
    return comma.join(gap.join(word(name, lang) for name in (i.colour, i.shape, i.place)) for i in items)


def ask(
    scene: Scene,
    kind: str,
    lang: str,
    rng: random.Random,
    *,
    split: str,
    item: Item | None = None,
    by: str = "",
    present: bool | None = None,
) -> Question:
    """Put a question of a kind to a scene.

    Args:
        split: "train" never names a held-out pair in a question about absence; "test" and "any" may.
        item: the object to ask about; drawn at random when not given.
        by: how the object is named: "c", "s", "p" or "cs" (colour, shape, corner); any way when empty.
        present: whether an existence question names `item` or something that is not there; drawn when not given.
    """
    item = item or rng.choice(scene.items)
    template = rng.choice([t for t in _QUESTIONS[lang][kind] if not by or f"{{{by}}}" in t])
    if kind == "exist":
        present = rng.random() < 0.5 if present is None else present
        colour, shape = item.combo if present else _absent(scene, item, rng, split)
        text = _fill(template, lang, colour, shape, item.place)
        return Question(kind, lang, text, word("yes" if present else "no", lang), item if present else None)
    text = _fill(template, lang, item.colour, item.shape, item.place)
    if kind == "count":
        return Question(kind, lang, text, word(_NUMBERS[len(scene.items) - 1], lang))
    name = {"colour": item.colour, "shape": item.shape, "side": item.place}[kind]
    return Question(kind, lang, text, word(name, lang), item)


def interview(scene: Scene, lang: str, rng: random.Random, count: int, *, split: str) -> list[Question]:
    """Up to `count` questions, none of which is answered by the words of an earlier one.

    All name their objects in one way (by colour, by shape or by corner), so that no question joins two attributes
    of an object; an existence question does, and comes last.
    """
    by, kinds = rng.choice((("c", ("shape", "side")), ("s", ("colour", "side")), ("p", ("colour", "shape"))))
    facts = [ask(scene, kind, lang, rng, split=split, item=item, by=by) for item in scene.items for kind in kinds]
    facts.append(ask(scene, "count", lang, rng, split=split))
    return [*rng.sample(facts, min(count - 1, len(facts))), ask(scene, "exist", lang, rng, split=split)]


def _absent(scene: Scene, item: Item, rng: random.Random, split: str) -> tuple[str, str]:
    """A pair that is not in the scene but shares its colour or its shape with `item`."""
    near = [(item.colour, s) for s in SHAPES] if rng.random() < 0.5 else [(c, item.shape) for c in COLOURS]
    barred = scene.combos | HELD_OUT if split == "train" else scene.combos
    return rng.choice([pair for pair in near if pair not in barred])


def _fill(template: str, lang: str, colour: str, shape: str, place: str) -> str:
    c, s, p = word(colour, lang), word(shape, lang), word(place, lang)
    if lang == "en" and colour == "orange":
        template = template.replace(" a {cs}", " an {cs}").replace("Is a {cs}", "Is an {cs}")
    return template.format(c=c, s=s, p=p, cs=f"{c} {s}")
