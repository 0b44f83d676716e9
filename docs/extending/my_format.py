"""A media format of one's own: what a model finds in the text around a picture."""

from __future__ import annotations

from lavis.extend import MEDIA_FORMATS, MediaFormat

MEDIA_FORMATS.register("tagged")(MediaFormat("tagged", before="<picture>", after="</picture>", gap="\n"))
