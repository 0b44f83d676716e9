"""Scenes of the shapes world: what is in a picture, how one is drawn at random, and how it is rendered.

A scene is a group of one to three equal objects in a row along one side of the picture: "three red circles on the
left". Colour, shape,
number and side each have one right name, so every question has one right answer.
"""

import math
import random
from dataclasses import dataclass
from typing import Literal, cast

from PIL import Image, ImageDraw

Rgb = tuple[int, int, int]
Combos = Literal["seen", "held_out", "any"]

COLOURS: dict[str, Rgb] = {
    "red": (218, 32, 36),
    "orange": (247, 134, 20),
    "yellow": (240, 206, 20),
    "green": (30, 150, 62),
    "blue": (36, 84, 214),
    "purple": (132, 44, 168),
    "pink": (244, 132, 184),
    "black": (28, 28, 32),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring")
SIDES: tuple[str, ...] = ("left", "right", "top", "bottom")
MAX_COUNT = 3
"""Most objects in a scene."""

HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {
        ("red", "triangle"),
        ("orange", "cross"),
        ("green", "star"),
        ("blue", "square"),
        ("purple", "ring"),
        ("black", "circle"),
    }
)
"""(colour, shape) pairs that no training or validation picture shows."""

_SLOTS = (0.18, 0.5, 0.82)  # along the side
_DEPTH = 0.2  # from the side
_JITTER = 0.02
_RADIUS = (0.125, 0.15)
_COLOUR_JITTER = 24
_SUPERSAMPLE = 4


@dataclass(frozen=True)
class Item:
    """One object. `x`, `y` (centre) and `radius` are shares of the picture's side; `tint` is the drawn colour."""

    shape: str
    x: float
    y: float
    radius: float
    tint: Rgb


@dataclass(frozen=True)
class Scene:
    """Equal objects along one side, over a vertical two-colour gradient."""

    colour: str
    shape: str
    side: str
    items: tuple[Item, ...]
    background: tuple[Rgb, Rgb]

    @property
    def count(self) -> int:
        """How many objects there are."""
        return len(self.items)

    @property
    def combo(self) -> tuple[str, str]:
        """The (colour, shape) pair."""
        return self.colour, self.shape


def sample_scene(key: str, *, combos: Combos = "seen") -> Scene:
    """Draw a scene: a pure function of its arguments.

    Args:
        key: names the scene, e.g. "seed/split/index".
        combos: "seen" excludes held-out pairs, "held_out" draws one of them, "any" does not look.

    Raises:
        ValueError: `combos` is none of these.
    """
    if combos not in ("seen", "held_out", "any"):
        raise ValueError(f"combos is {combos!r}; it must be 'seen', 'held_out' or 'any'")
    rng = random.Random(key)
    colour, shape = rng.choice(_PAIRS[combos])
    side, count = rng.choice(SIDES), rng.randint(1, MAX_COUNT)
    # One object alone stands in the middle of its side: in a corner it would be on two sides.
    slots = [_SLOTS[1]] if count == 1 else sorted(rng.sample(_SLOTS, count))
    items = tuple(_place_item(rng, colour, shape, side, slot) for slot in slots)
    return Scene(colour, shape, side, items, background=(_light(rng), _light(rng)))


_ALL_PAIRS = [(c, s) for c in COLOURS for s in SHAPES]
_PAIRS: dict[str, list[tuple[str, str]]] = {
    "any": _ALL_PAIRS,
    "seen": [pair for pair in _ALL_PAIRS if pair not in HELD_OUT],
    "held_out": [pair for pair in _ALL_PAIRS if pair in HELD_OUT],
}


def _place_item(rng: random.Random, colour: str, shape: str, side: str, slot: float) -> Item:
    depth = _DEPTH if side in ("left", "top") else 1 - _DEPTH
    x, y = (depth, slot) if side in ("left", "right") else (slot, depth)
    return Item(
        shape=shape,
        x=x + rng.uniform(-_JITTER, _JITTER),
        y=y + rng.uniform(-_JITTER, _JITTER),
        radius=rng.uniform(*_RADIUS),
        tint=cast("Rgb", tuple(_jittered(c, rng) for c in COLOURS[colour])),
    )


def _jittered(channel: int, rng: random.Random) -> int:
    return min(255, max(0, channel + rng.randint(-_COLOUR_JITTER, _COLOUR_JITTER)))


def _light(rng: random.Random) -> Rgb:
    return rng.randint(222, 255), rng.randint(222, 255), rng.randint(222, 255)


def render(scene: Scene, size: int = 64) -> Image.Image:
    """Draw the scene as an RGB picture of `size` x `size` pixels, anti-aliased by supersampling."""
    top, bottom = scene.background
    ramp = Image.linear_gradient("L").resize((size, size))
    image = Image.composite(Image.new("RGB", ramp.size, bottom), Image.new("RGB", ramp.size, top), ramp)
    for item in scene.items:
        image.paste(item.tint, mask=_mask(item, size))
    return image


def _mask(item: Item, size: int) -> Image.Image:
    """Coverage of an item, "L" of size x size."""
    side = size * _SUPERSAMPLE
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    x, y, r = item.x * side, item.y * side, item.radius * side
    if item.shape in ("circle", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if item.shape == "ring":
            hole = 0.56 * r
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    elif item.shape == "square":
        half = 0.86 * r
        draw.rectangle((x - half, y - half, x + half, y + half), fill=255)
    elif item.shape == "cross":
        arm = 0.34 * r
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=255)
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=255)
    elif item.shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=255)
    else:
        draw.polygon(_star(x, y, 1.12 * r), fill=255)
    return mask.resize((size, size), Image.Resampling.BOX)


def _star(x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Corners of an upright five-pointed star with outer radius `r` pixels."""
    corners = []
    for i in range(10):
        length = r if i % 2 == 0 else 0.42 * r
        angle = math.pi * (i / 5 - 0.5)
        corners.append((x + length * math.cos(angle), y + length * math.sin(angle)))
    return corners
