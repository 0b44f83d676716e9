"""Which parts of a picture a vision tower is shown: pure functions of the picture's size.

A picture is shown as one or more views: a resized copy, from which square tiles are cut in reading order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Size = tuple[int, int]
"""Width and height in pixels."""
Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""
TILINGS = ("none", "tiles", "anyres")


@dataclass(frozen=True)
class View:
    """A copy of the picture and the tiles cut from it.

    scaled: size of the whole picture in the copy. canvas: size of the copy; the picture is in its middle, on black.
    """

    scaled: Size
    canvas: Size
    boxes: tuple[Box, ...]

    @property
    def offset(self) -> Size:
        """Left and top border of the picture on the canvas."""
        return (self.canvas[0] - self.scaled[0]) // 2, (self.canvas[1] - self.scaled[1]) // 2


@dataclass(frozen=True)
class Tiling:
    """How a picture is cut into tiles of `side` x `side` pixels.

    kind: `none` is the whole picture stretched to one tile; `tiles` and `anyres` are the functions of that name.
    max_tiles: most tiles of a view that is cut, the whole picture not counted.
    """

    kind: str
    side: int
    max_tiles: int

    def views(self, size: Size) -> tuple[View, ...]:
        """What the tower is shown of a picture of `size`, in order."""
        if self.kind == "tiles":
            return tiles(size, self.side, self.max_tiles)
        if self.kind == "anyres":
            return anyres(size, self.side, self.max_tiles)
        return (whole(self.side),)

    def count(self, size: Size) -> int:
        """Tiles of a picture of `size`."""
        return sum(len(view.boxes) for view in self.views(size))


def whole(side: int) -> View:
    """The whole picture as one tile, whatever its shape."""
    return _grid((side, side), side, 1, 1)


def tiles(size: Size, side: int, max_tiles: int) -> tuple[View, ...]:
    """InternVL's: the picture stretched to the grid nearest to its shape, then the whole picture if there is a cut."""
    columns, rows = _nearest_grid(size, side, max_tiles)
    cut = _grid((side * columns, side * rows), side, columns, rows)
    return (cut,) if columns * rows == 1 else (cut, whole(side))


def anyres(size: Size, side: int, max_tiles: int) -> tuple[View, ...]:
    """LLaVA-NeXT's: the whole picture, then the grid that keeps most of its pixels, the picture in its true shape."""
    columns, rows = _fullest_grid(size, side, max_tiles)
    canvas = (side * columns, side * rows)
    return whole(side), _grid(_fitted(size, canvas), side, columns, rows)


def grids(max_tiles: int) -> list[tuple[int, int]]:
    """(columns, rows) of every grid of at most `max_tiles` tiles, small ones first."""
    numbers = range(1, max_tiles + 1)
    return sorted(((c, r) for c in numbers for r in numbers if c * r <= max_tiles), key=math.prod)


def anyres_grids(max_tiles: int) -> list[tuple[int, int]]:
    """(columns, rows) that `anyres` chooses from: one tile more than the whole picture would show nothing more."""
    return [grid for grid in grids(max_tiles) if grid != (1, 1)] or [(1, 1)]


def _grid(scaled: Size, side: int, columns: int, rows: int) -> View:
    boxes = tuple((side * c, side * r, side * (c + 1), side * (r + 1)) for r in range(rows) for c in range(columns))
    return View(scaled, (side * columns, side * rows), boxes)


def _nearest_grid(size: Size, side: int, max_tiles: int) -> tuple[int, int]:
    """The grid of the nearest aspect ratio; of two that are equally near the larger one, if the picture has more than
    half the pixels of it.
    """
    width, height = size
    best, least = (1, 1), math.inf
    for columns, rows in grids(max_tiles):
        difference = abs(width / height - columns / rows)
        fills = width * height > 0.5 * side * side * columns * rows
        if difference < least or (difference == least and fills):
            best, least = (columns, rows), difference
    return best


def _fullest_grid(size: Size, side: int, max_tiles: int) -> tuple[int, int]:
    """The grid in which most of the picture's own pixels are shown; of equal ones that which wastes least."""
    width, height = size

    def worth(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(side * grid[0] / width, side * grid[1] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - side * side * math.prod(grid)

    return max(anyres_grids(max_tiles), key=worth)


def _fitted(size: Size, canvas: Size) -> Size:
    """The largest size of the picture's shape that fits."""
    (width, height), (most_width, most_height) = size, canvas
    if most_width / width < most_height / height:
        return most_width, min(math.ceil(height * (most_width / width)), most_height)
    return min(math.ceil(width * (most_height / height)), most_width), most_height
