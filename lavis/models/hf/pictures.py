"""What the image processor in a folder of transformers' own makes of a picture, as a `media` section."""

from __future__ import annotations

from pathlib import Path

from lavis.core.json_file import read_json
from lavis.models.parts import MediaConfig


def media_of(folder: Path, format: str, *, cropped: str = "square") -> MediaConfig:
    """The section for the processor in `folder`, or the defaults if there is none.

    cropped: `resize` in place of a central crop, which this program does not make.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            values = read_json(folder / name)
            values = values.get("image_processor", values)
            stretched = "height" in (values.get("size") or {})
            resize = "pad" if values.get("do_pad") else "square" if stretched else cropped
            return MediaConfig(format=format, resize=resize, mean=values.get("image_mean"), std=values.get("image_std"))
    return MediaConfig(format=format)
