"""Words of the shapes world: captions, scene descriptions, questions and short answers in English and Chinese."""

import random
from dataclasses import dataclass

from lavis.data.shapes.scene import COLOURS, MAX_COUNT, SHAPES, SIDES, Scene

LANGS: tuple[str, ...] = ("en", "zh")
KINDS: tuple[str, ...] = ("colour", "shape", "count", "side")

_NUMBERS = ("one", "two", "three")[:MAX_COUNT]
_ZH = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色",
    "blue": "蓝色", "purple": "紫色", "pink": "粉色", "black": "黑色",
    "circle": "圆形", "square": "方形", "triangle": "三角形", "star": "星形", "cross": "十字形", "ring": "圆环",
    "left": "左边", "right": "右边", "top": "上边", "bottom": "下边",
    "one": "一个", "two": "两个", "three": "三个",
}  # fmt: skip
_QUESTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "colour": ("What color do you see?", "Which color is in the picture?", "What color is shown here?"),
        "shape": ("What shape do you see?", "Which shape is in the picture?", "What shape is shown here?"),
        "count": (
            "How many shapes do you see?",
            "How many are in the picture?",
            "What number of shapes is shown here?",
        ),
        "side": ("On which side do you see it?", "Where in the picture is it?", "Which side is it on?"),
    },
    "zh": {
        "colour": ("你看到什么颜色？", "图片里是什么颜色？", "这里是哪种颜色？"),
        "shape": ("你看到什么形状？", "图片里是什么形状？", "这里是哪种形状？"),
        "count": ("你看到几个图形？", "图片里有几个图形？", "一共有多少个？"),
        "side": ("在图片的哪一边？", "图形在哪里？", "位置在哪边？"),
    },
}
CAPTION_REQUESTS: dict[str, tuple[str, ...]] = {
    "en": ("Describe the picture.", "What is in the picture?", "Tell me what you see."),
    "zh": ("描述这张图片。", "图片里有什么？", "说说你看到了什么。"),
}


@dataclass(frozen=True)
class Question:
    """A question with its one right answer."""

    kind: str
    lang: str
    text: str
    answer: str


def word(name: str, lang: str) -> str:
    """The word for a colour, shape, side or number, given by its English name."""
    return name if lang == "en" else _ZH[name]


def answers(kind: str, lang: str) -> tuple[str, ...]:
    """All canonical answers of a question kind."""
    names = {"colour": tuple(COLOURS), "shape": SHAPES, "count": _NUMBERS, "side": SIDES}[kind]
    return tuple(word(name, lang) for name in names)


def caption(scene: Scene, lang: str) -> str:
    """The full caption; it determines the scene up to jitter."""
    number = _NUMBERS[scene.count - 1]
    if lang == "en":
        place = f"on the {scene.side}" if scene.side in ("left", "right") else f"at the {scene.side}"
        return f"{number.capitalize()} {scene.colour} {_plural(scene.shape, scene.count)} {place}."
    return f"{_ZH[scene.side]}有{_ZH[number]}{_ZH[scene.colour]}的{_ZH[scene.shape]}。"


def describe(scene: Scene, lang: str, rng: random.Random) -> str:
    """A textual stand-in for the picture: the caption, or a bare list of its four facts in any order."""
    if rng.random() < 0.5:
        return caption(scene, lang)
    facts = [word(name, lang) for name in (scene.colour, scene.shape, scene.side, _NUMBERS[scene.count - 1])]
    rng.shuffle(facts)
    return (", " if lang == "en" else "，").join(facts)


def ask(scene: Scene, kind: str, lang: str, rng: random.Random) -> Question:
    """Put a question of a kind to a scene, in one of its phrasings."""
    name = {"colour": scene.colour, "shape": scene.shape, "count": _NUMBERS[scene.count - 1], "side": scene.side}[kind]
    return Question(kind, lang, rng.choice(_QUESTIONS[lang][kind]), word(name, lang))


def interview(scene: Scene, lang: str, rng: random.Random, count: int) -> list[Question]:
    """`count` questions of different kinds (at most one of each) in any order."""
    return [ask(scene, kind, lang, rng) for kind in rng.sample(KINDS, min(count, len(KINDS)))]


def _plural(shape: str, count: int) -> str:
    if count == 1:
        return shape
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"
