"""Combinations of values of the `data` section, and of how pictures reach the model, that cannot work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lavis.config.schema import DataEntry, as_list
from lavis.core.errors import did_you_mean
from lavis.core.registries import DIALECTS

if TYPE_CHECKING:
    from lavis.config.resolved import Recipe

RANDOM_PROCESSORS = frozenset({"blip2_image_train"})
"""Image processors that give another tensor each time (random crops)."""


def sections(recipe: Recipe) -> Iterator[str]:
    """Something to train on, or to evaluate on."""
    data = recipe.data
    if not recipe.run.evaluate and not data.train:
        yield "data.train is empty: list what to train on, or set run.evaluate=true."
    if recipe.run.evaluate and not (data.test or data.valid):
        yield "run.evaluate is true but there is nothing to evaluate on: list it under data.test or data.valid."
    if recipe.run.evaluate and any(e.fraction is not None for e in [*data.test, *data.valid]) and not data.train:
        yield "data.test takes a fraction of data.train, which is empty: list the entries it is a fraction of."


def entries(recipe: Recipe) -> Iterator[str]:
    """Each entry by itself."""
    for key, entry in recipe.data.entries():
        if entry.fraction is None:
            yield from _entry(key, entry)
        if entry.format != "auto" and entry.format not in DIALECTS:
            known = ["auto", *DIALECTS.list()]
            hint = did_you_mean(entry.format, known)
            yield f"{key}.format {entry.format!r} is no dialect.{hint} Known: {', '.join(known)}."


def _entry(key: str, entry: DataEntry) -> Iterator[str]:
    if not all(isinstance(path, str) for path in as_list(entry.path)):
        yield f"{key}.path is {entry.path!r}: give the annotation file, or a list of files, as text."
    files = len(as_list(entry.path))
    if entry.source == "files" and not files:
        yield f"{key}.path is empty: name the annotation file, or a source that generates its rows."
    for field in ("url", "sha256"):
        given = len(as_list(getattr(entry, field)))
        if given not in (0, files):
            yield f"{key}.{field} has {given} for the {files} of {key}.path: give one for each file."


def weights(recipe: Recipe) -> Iterator[str]:
    """Weights of all training entries, or of none."""
    given = [entry.weight for entry in recipe.data.train]
    missing = [f"data.train.{i}" for i, weight in enumerate(given) if weight is None]
    if missing and len(missing) < len(given):
        yield f"{', '.join(missing)} has no weight but others have: give each entry of data.train one, or none."
    if given and not missing and not sum(w or 0 for w in given):
        yield "the weights of data.train are all 0: give one of them more."


def fractions(recipe: Recipe) -> Iterator[str]:
    """Fractions leave something to train on, and are taken from something."""
    taken: Counter[int] = Counter()
    for key, entry in recipe.data.entries():
        if entry.fraction is None:
            continue
        if key.startswith("data.train"):
            yield f"{key}.fraction: a fraction is taken out of data.train: move it to data.valid or data.test."
            continue
        if not 0 < entry.fraction < 1:
            yield f"{key}.fraction is {entry.fraction:g}: it is above 0 and below 1."
        of = [i for i, e in enumerate(recipe.data.train) if entry.name in (None, e.name, e.source)]
        if not of:
            names = ", ".join(e.name or e.source for e in recipe.data.train) or "none"
            yield f"{key}.name {entry.name!r} is no entry of data.train (there are: {names})."
        for i in of:
            taken[i] += entry.fraction  # type: ignore[assignment]
    for i, share in taken.items():
        if share >= 1:
            yield f"the fractions of data.train.{i} under data.valid and data.test sum to {share:g}: leave some rows."


def kinds(recipe: Recipe) -> Iterator[str]:
    """Rows that the architecture can read, and in `test` such as have an answer."""
    arch, form = recipe.model.arch, recipe.model.row_format
    for i, entry in enumerate(recipe.data.test):
        if entry.kind == "document":
            yield f"data.test.{i} holds documents, which nobody answers: list it under data.valid to have its loss."
    for key, entry in recipe.data.entries():
        if form is None or entry.fraction is not None or (entry.kind == "caption") == (form == "caption"):
            continue
        wanted = "caption" if form == "caption" else "conversation, document, pair or prompt"
        yield f"{key}.kind is {entry.kind}, but model.arch {arch!r} takes {wanted}."
    if form == "caption" and recipe.data.packing:
        yield (
            f"data.packing does not go with {arch}, which compares images with captions row by row: set it to false."
        )


def media(recipe: Recipe) -> Iterator[str]:
    """How pictures are cut, padded and cropped."""
    settings: Any = getattr(recipe.model, "media", None)
    if settings is None:
        return
    names = {key: getattr(settings, key) for key in ("processor", "train_processor")}
    random = [f"model.media.{key} {name}" for key, name in names.items() if name in RANDOM_PROCESSORS]
    if settings.tiling != "none":
        cut = f"model.media.tiling {settings.tiling}"
        for name in random:
            yield f"{name} crops at random, which does not go with {cut}: use blip2_image_eval, or tiling none."
        if settings.resize != "square":
            yield f"model.media.resize {settings.resize} does not go with {cut}, which pads by itself: use square."
        if recipe.model.row_format == "caption":
            arch = recipe.model.arch
            yield f"{cut} does not go with {arch}, which compares whole pictures with captions: set it to none."
    if recipe.data.cache_features is True:
        for name in random:
            yield f"data.cache_features keeps one view, but {name} crops at random: use blip2_image_eval."


RULES = (sections, entries, weights, fractions, kinds, media)
