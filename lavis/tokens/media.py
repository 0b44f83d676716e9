"""How a picture stands in a turn: the text around it, and how many placeholders hold its vectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

from lavis.core.errors import DataError
from lavis.core.registries import MEDIA_FORMATS
from lavis.core.types import MediaRef

Part = str | MediaRef
Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class MediaFormat:
    """The text a model was trained to find around a picture.

    before, after: on either side of it. gap: between a picture and the text that follows, in place of the one space
    which that text begins with in a Conversation.
    """

    name: str
    before: str
    after: str
    gap: str

    def write(self, parts: Sequence[Part]) -> list[Part]:
        """`parts` of a message with this text around each picture; neighbouring texts are one."""
        written: list[Part] = []
        behind_picture = False
        for part in parts:
            if isinstance(part, MediaRef):
                written += [self.before, part, self.after]
            else:
                written.append(self.gap + part[1:] if behind_picture and part.startswith(" ") else part)
            behind_picture = isinstance(part, MediaRef)
        return joined(written)


MEDIA_FORMATS.register("minigpt4qwen")(MediaFormat("minigpt4qwen", "<Img>", "</Img>", " "))
MEDIA_FORMATS.register("llava")(MediaFormat("llava", "", "", "\n"))


class Tiles(Protocol):
    """What decides how many tiles a picture is cut into: an image processor."""

    @property
    def needs_size(self) -> bool:
        """Whether that depends on the picture's size."""

    def num_tiles(self, size: Size) -> int:
        """Tiles of an upright picture of `size`, the whole picture included where it is one of them."""

    def tiling_key(self) -> tuple[object, ...]:
        """All that num_tiles depends on, for hashes."""


@dataclass(frozen=True)
class MediaSpec:
    """How pictures reach one model. `processor` makes their pixels; without one every picture is one tile."""

    format: MediaFormat
    tokens_per_tile: int
    processor: Tiles | None = None

    @property
    def needs_size(self) -> bool:
        """Whether the length of a picture's span depends on its size."""
        return self.processor is not None and self.processor.needs_size

    def tiles(self, size: Size | None) -> int:
        """Tiles of a picture. Raises DataError where that depends on a size that is not known."""
        if self.processor is None or not self.processor.needs_size:
            return 1
        if size is None:
            raise DataError("how long a picture's span is depends on its size, which is not known here.")
        return self.processor.num_tiles(size)

    def span(self, size: Size | None) -> int:
        """Placeholders of a picture of `size`."""
        return self.tokens_per_tile * self.tiles(size)

    def key(self) -> tuple[object, ...]:
        """All that decides what stands for a picture in a sample, for hashes."""
        return (*astuple(self.format), self.tokens_per_tile, *(self.processor.tiling_key() if self.processor else ()))


def joined(parts: Iterable[Part]) -> list[Part]:
    """Neighbouring texts made one, empty ones left out."""
    found: list[Part] = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        elif part != "":
            found.append(part)
    return found
