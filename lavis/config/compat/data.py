"""Older spellings of the `data` part of a recipe: LAVIS's `datasets.<builder>` with the splits named in `run`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lavis.config.compat.dataset_section import (
    DATASETS,
    RATIOS,
    SPLITS,
    DatasetSection,
    entry_of,
    get,
    has_split,
    splits_of,
)
from lavis.config.compat.old_over_lists import over_lists
from lavis.config.compat.outcome import Outcome, Wrong
from lavis.config.schema import as_list
from lavis.config.typed import Problem, read_dataclass
from lavis.core.errors import did_you_mean
from lavis.core.registries import SOURCES

_MOVED = ("packing", "pack_length", "length_grouping", "num_workers", "max_bad_image_share", "cache_features")
RENAMES: dict[str, str] = {f"run.{key}": f"data.{key}" for key in _MOVED}
"""Old dotted key to new one, value unchanged."""
CONSUMED: tuple[str, ...] = ("datasets", *SPLITS.values(), RATIOS)
"""Old dotted keys that `rules` reads; they are removed afterwards."""

_MEDIA = {
    "processor": ("eval.name",),
    "train_processor": ("train.name",),
    "mean": ("eval.mean", "train.mean"),
    "std": ("eval.std", "train.std"),
    "min_scale": ("train.min_scale",),
    "max_scale": ("train.max_scale",),
}
"""Key of `model.media` to those of a dataset's vis_processor that it follows from."""
_BLIND = ("causal_lm", "byte_level_bpe")
"""Architectures without images."""


def rules(values: Mapping[str, Any]) -> Iterator[Outcome]:
    """(new key, value, old keys it follows from) of what more than one old key says, from the merged layers."""
    datasets = values.get("datasets")
    datasets = datasets if isinstance(datasets, Mapping) else {}
    yield from _problems(datasets)
    if any(isinstance(get(values, f"data.{section}"), list) for section in SPLITS):
        yield from over_lists(values, datasets)
    elif datasets:
        yield from _sections(values, datasets)
    yield from _media(values, datasets)


def _problems(datasets: Mapping[str, Any]) -> Iterator[Wrong]:
    for name, section in datasets.items():
        if name not in DATASETS and name not in SOURCES:
            hint = did_you_mean(str(name), DATASETS) or f" Known: {', '.join(DATASETS)}"
            yield Wrong(f"datasets.{name}", f"unknown dataset.{hint}")
        problems: list[Problem] = []
        read_dataclass(DatasetSection, _without_references(section), f"datasets.{name}", problems)
        for problem in problems:
            last = problem.key.rsplit(".", 1)[-1]
            hint = did_you_mean(last, problem.siblings) if problem.siblings else ""
            yield Wrong(problem.key, f"{problem.message}.{hint}" if hint else problem.message)


def _sections(values: Mapping[str, Any], datasets: Mapping[str, Any]) -> Iterator[Outcome]:
    named = {str(name): section for name, section in datasets.items() if isinstance(section or {}, Mapping)}
    ratios = get(values, RATIOS) or {}
    if unknown := sorted(set(ratios) - set(named)):
        yield Wrong(RATIOS, f"names {', '.join(unknown)}, not among the datasets: {', '.join(named)}")
    for section, key in SPLITS.items():
        splits = get(values, key)
        splits = ["train"] if splits is None and section == "train" else as_list(splits)
        yield from _unknown_splits(key, splits, named)
        entries = [
            entry_of(name, config or {}, split)
            | ({"weight": ratios.get(name, 0)} if ratios and section == "train" else {})
            for split in splits
            for name, config in named.items()
            if has_split(name, config or {}, split)
        ]
        if section == "train" and not splits and not get(values, "run.evaluate"):
            yield Wrong(key, f"{key} is empty: name a split to train on, or set run.evaluate=true")
        if entries:
            yield f"data.{section}", entries, ("datasets", key, *([RATIOS] if section == "train" else []))


def _unknown_splits(key: str, splits: list[str], datasets: Mapping[str, Any]) -> Iterator[Wrong]:
    known = {split for name, section in datasets.items() for split in splits_of(name, section or {})}
    for split in splits:
        if not any(has_split(name, section or {}, split) for name, section in datasets.items()):
            names = ", ".join(sorted(known)) or "none"
            yield Wrong(key, f"no dataset has annotations for the split {split!r} (known: {names})")


def _media(values: Mapping[str, Any], datasets: Mapping[str, Any]) -> Iterator[Outcome]:
    """What the datasets, or the `preprocess` section of a model's YAML, say about pictures is the model's to say."""
    if get(values, "model.arch") in _BLIND:
        return
    sections = [f"datasets.{name}" for name, d in datasets.items() if d and get(d, "data_type") != "text"]
    yield from _sizes(values, [f"{section}.vis_processor" for section in sections])
    for key, olds in _MEDIA.items():
        given = [f"{section}.vis_processor.{old}" for section in sections for old in olds]
        given = [old for old in given if get(values, old) is not None]
        given = given or [
            old for old in (f"preprocess.vis_processor.{old}" for old in olds) if get(values, old) is not None
        ]
        if not given:
            continue
        for other in given[1:]:
            if get(values, other) != get(values, given[0]):
                yield Wrong(
                    other, f"differs from {given[0]}: images of one run are processed alike, make them the same"
                )
        if key != "train_processor" or get(values, given[0]) != get(values, given[0].replace(".train.", ".eval.")):
            yield f"model.media.{key}", get(values, given[0]), tuple(given)


def _sizes(values: Mapping[str, Any], processors: list[str]) -> Iterator[Wrong]:
    key = "model.tower.image_size" if get(values, "model.tower.image_size") else "model.image_size"
    wanted = get(values, key) or 224
    for processor in processors:
        for kind in ("train", "eval"):
            old = f"{processor}.{kind}.image_size"
            size = get(values, old)
            if isinstance(size, int) and isinstance(wanted, int) and size != wanted:
                yield Wrong(old, f"{old} is {size} but {key} is {wanted}: set both to the same, or leave the first out")


def _without_references(value: Any) -> Any:
    """`value` less the `${...}` inside it, whose types are not known yet."""
    if isinstance(value, Mapping):
        kept = {name: _without_references(inner) for name, inner in value.items()}
        return {name: inner for name, inner in kept.items() if not (isinstance(inner, str) and "${" in inner)}
    return value
