"""Pictures that strangers send: limits, allowed types, and one key for one content."""

from __future__ import annotations

import base64
import hashlib
import io
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from lavis.core.errors import ChatError, DataError
from lavis.data.image import to_rgb

MAX_BYTES = 20 << 20
"""Largest file."""
MAX_PIXELS = 50_000_000
"""Largest picture; counted before it is decoded, as a small file can unfold to gigabytes."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


@dataclass(frozen=True)
class Picture:
    """A decoded picture: upright, in RGB. `key` is the SHA-256 of its file, by which what was computed from it is found
    again.

    size: its width and height.
    pixels: float32 [T, 3, S, S], what a model's processor made of it; then `image` and `data`, the file, may have been
    left out to save memory.
    """

    key: str
    image: Image.Image | None = field(repr=False, compare=False)
    name: str = field(default="", compare=False)
    data: bytes = field(default=b"", repr=False, compare=False)
    pixels: torch.Tensor | None = field(default=None, repr=False, compare=False)
    size: tuple[int, int] = field(default=(1, 1), compare=False)


def read_picture(data: bytes, name: str = "the image") -> Picture:
    """The picture in a file's bytes. Raises ChatError if it is too large, of another type, or damaged."""
    if len(data) > MAX_BYTES:
        raise ChatError(f"{name} has {len(data) / 2**20:.1f} MiB, more than {MAX_BYTES >> 20}. Make it smaller.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = opened.size
        if width * height > MAX_PIXELS:
            raise ChatError(f"{name} has {width} x {height} pixels, more than {MAX_PIXELS:,}. Make it smaller.")
        image = to_rgb(opened)
        image.load()
    except (ChatError, DataError):
        raise
    except Exception as error:
        raise ChatError(
            f"{name} can't be read as an image ({type(error).__name__}): give a whole file of one of"
            f" {', '.join(FORMATS)}."
        ) from error
    return Picture(hashlib.sha256(data).hexdigest(), image, name, data, size=image.size)


def open_picture(path: str | Path) -> Picture:
    """The picture in a file. Raises ChatError if there is none, or as `read_picture`."""
    file = Path(path).expanduser()
    try:
        if not file.is_file():
            raise ChatError(f"there is no image file {str(path)!r}.")
        if file.stat().st_size > MAX_BYTES:
            raise ChatError(
                f"{path} has {file.stat().st_size / 2**20:.1f} MiB, more than {MAX_BYTES >> 20}. Make it smaller."
            )
        return read_picture(file.read_bytes(), str(path))
    except (OSError, ValueError) as error:
        raise ChatError(f"{str(path)[:200]!r} can't be read: {error}.") from error


def picture_from_url(url: str) -> Picture:
    """The picture in a `data:image/...;base64,` address. Raises ChatError for any other address or wrong content."""
    head, comma, body = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64") or not comma:
        raise ChatError(
            "an image has to be given as a data URL, data:image/png;base64,...; other addresses are not fetched."
        )
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise ChatError(f"an image has more than {MAX_BYTES >> 20} MiB. Make it smaller.")
    try:
        return read_picture(base64.b64decode(body, validate=True))
    except ValueError as error:
        raise ChatError("the data URL of an image is no base64.") from error
