"""Scenes of the shapes world: what is in a picture, how one is drawn at random, and how it is rendered.

A scene holds one to four objects, each in a corner of its own. No two objects share a colour or a shape, so "the red
object", "the circle" and "the object at the top left" each name one thing and every question has one right answer.
"""

import math
import random
from dataclasses import dataclass
from typing import Literal

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
PLACES: dict[str, tuple[float, float]] = {
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
}
"""Centre (x, y) of each corner's cell, as a share of the side; y grows downwards."""

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

_JITTER = 0.045
_RADIUS = (0.145, 0.185)
_COLOUR_JITTER = 12
_SUPERSAMPLE = 4


@dataclass(frozen=True)
class Item:
    """One object. `x`, `y` (centre) and `radius` are shares of the picture's side; `tint` is the drawn colour."""

    shape: str
    colour: str
    place: str
    x: float
    y: float
    radius: float
    tint: Rgb

    @property
    def combo(self) -> tuple[str, str]:
        """The (colour, shape) pair."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """Objects in reading order (top left, top right, bottom left, bottom right) over a vertical two-colour gradient."""

    items: tuple[Item, ...]
    background: tuple[Rgb, Rgb]

    @property
    def combos(self) -> frozenset[tuple[str, str]]:
        """All (colour, shape) pairs in the scene."""
        return frozenset(item.combo for item in self.items)


def sample_scene(key: str, *, combos: Combos = "seen", max_items: int = 3) -> Scene:
    """Draw a scene: a pure function of its arguments.

    Args:
        key: names the scene, e.g. "seed/split/index".
        combos: "seen" excludes held-out pairs, "held_out" puts in at least one, "any" does not look.
        max_items: most objects in a scene, 1 to 4; the count is uniform.

    Raises:
        ValueError: `max_items` or `combos` out of range.
    """
    if not 1 <= max_items <= len(PLACES):
        raise ValueError(f"max_items is {max_items}; it must be 1 to {len(PLACES)}")
    if combos not in ("seen", "held_out", "any"):
        raise ValueError(f"combos is {combos!r}; it must be 'seen', 'held_out' or 'any'")
    rng = random.Random(key)
    count = rng.randint(1, max_items)
    pairs = _sample_pairs(rng, count, combos)
    places = sorted(rng.sample(list(PLACES), count), key=list(PLACES).index)
    items = tuple(_place_item(rng, colour, shape, place) for (colour, shape), place in zip(pairs, places, strict=True))
    return Scene(items=items, background=(_light(rng), _light(rng)))


def _sample_pairs(rng: random.Random, count: int, combos: Combos) -> list[tuple[str, str]]:
    """Pairs without a repeated colour or shape, drawn again until they suit `combos`."""
    while True:
        pairs = list(zip(rng.sample(list(COLOURS), count), rng.sample(SHAPES, count), strict=True))
        if combos == "held_out" and not HELD_OUT.intersection(pairs):
            pairs[rng.randrange(count)] = rng.choice(sorted(HELD_OUT))
            if any(len({pair[i] for pair in pairs}) < count for i in (0, 1)):
                continue
        if combos != "seen" or not HELD_OUT.intersection(pairs):
            return pairs


def _place_item(rng: random.Random, colour: str, shape: str, place: str) -> Item:
    centre_x, centre_y = PLACES[place]
    return Item(
        shape=shape,
        colour=colour,
        place=place,
        x=centre_x + rng.uniform(-_JITTER, _JITTER),
        y=centre_y + rng.uniform(-_JITTER, _JITTER),
        radius=rng.uniform(*_RADIUS),
        tint=tuple(min(255, max(0, c + rng.randint(-_COLOUR_JITTER, _COLOUR_JITTER))) for c in COLOURS[colour]),
    )


def _light(rng: random.Random) -> Rgb:
    return tuple(rng.randint(222, 255) for _ in range(3))


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
