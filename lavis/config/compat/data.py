"""Older spellings of the `data` part of a recipe: LAVIS's `datasets.<builder>` with the splits named in `run`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lavis.config.compat.dataset_section import DatasetSection
from lavis.config.compat.outcome import Wrong
from lavis.config.schema import as_list
from lavis.config.typed import Problem, read_dataclass
from lavis.core.errors import did_you_mean
from lavis.core.registries import SOURCES

_SPLITS = {"train": "run.train_splits", "valid": "run.valid_splits", "test": "run.test_splits"}
_RATIOS = "run.train_dataset_ratios"
_MOVED = ("packing", "pack_length", "length_grouping", "num_workers", "max_bad_image_share", "cache_features")
RENAMES: dict[str, str] = {f"run.{key}": f"data.{key}" for key in _MOVED}
"""Old dotted key to new one, value unchanged."""
CONSUMED: tuple[str, ...] = ("datasets", *_SPLITS.values(), _RATIOS)
"""Old dotted keys that `rules` reads; they are removed afterwards."""

FILE_DATASETS = ("minigpt4_instruction", "llava_instruction", "instruction")
"""Names of the old registry whose rows are in files that the recipe names."""
SHAPES_SPLITS = {
    "shapes_instruction": ("train", "interviews", "val", "test"),
    "shapes_caption": ("train",),
    "shapes_text": ("train", "val"),
}
DATASETS = (*FILE_DATASETS, *SHAPES_SPLITS)
"""Every name that a section of `datasets` of this package had."""

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

Outcome = tuple[str, Any, tuple[str, ...]] | Wrong


def rules(values: Mapping[str, Any]) -> Iterator[Outcome]:
    """(new key, value, old keys it follows from) of what more than one old key says, from the merged layers."""
    datasets = values.get("datasets")
    if isinstance(datasets, Mapping):
        yield from _problems(datasets)
        yield from _sections(values, datasets)
    elif _get(values, "data.train") is not None:
        for key in (*_SPLITS.values(), _RATIOS):
            if _get(values, key):
                yield Wrong(key, "says nothing beside data: list the entries under data.train, data.valid, data.test")
    yield from _media(values, datasets if isinstance(datasets, Mapping) else {})


def splits_of(name: str, section: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the splits that the section `datasets.<name>` has."""
    if name in SHAPES_SPLITS:
        return SHAPES_SPLITS[name]
    annotations = _get(section, "build_info.annotations") or {}
    return tuple(
        split for split, source in annotations.items() if isinstance(source, Mapping) and source.get("storage")
    )


def entry_of(name: str, section: Mapping[str, Any], split: str) -> dict[str, Any]:
    """The entry of `data` that a split of the section `datasets.<name>` is."""
    annotation = _get(section, f"build_info.annotations.{split}") or {}
    text = _get(section, f"text_processor.{'train' if split == 'train' else 'eval'}") or {}
    entry = {
        "name": name,
        "source": "files" if name in FILE_DATASETS else name,
        "path": annotation.get("storage"),
        "images": None if section.get("data_type") == "text" else _get(section, "build_info.images.storage"),
        "format": section.get("format"),
        "kind": "caption" if section.get("sample_format") == "caption" else None,
        "supervise": section.get("supervise"),
        "text": {key: text[key] for key in ("name", "max_words", "prompt") if text.get(key) is not None},
        "split": split,
        "url": annotation.get("url"),
        "sha256": annotation.get("sha256"),
        "generate": section.get("generate"),
    }
    return {key: value for key, value in entry.items() if value not in (None, {})}


def _problems(datasets: Mapping[str, Any]) -> Iterator[Wrong]:
    for name, section in datasets.items():
        if name not in DATASETS and name not in SOURCES:
            hint = did_you_mean(str(name), DATASETS).rstrip("?")
            yield Wrong(f"datasets.{name}", f"unknown dataset.{hint or ' Known: ' + ', '.join(DATASETS)}")
        problems: list[Problem] = []
        read_dataclass(DatasetSection, _without_references(section), f"datasets.{name}", problems)
        for problem in problems:
            last = problem.key.rsplit(".", 1)[-1]
            hint = did_you_mean(last, problem.siblings).rstrip("?") if problem.siblings else ""
            yield Wrong(problem.key, f"{problem.message}.{hint}" if hint else problem.message)


def _sections(values: Mapping[str, Any], datasets: Mapping[str, Any]) -> Iterator[Outcome]:
    if any(_get(values, f"data.{section}") is not None for section in _SPLITS):
        yield Wrong("datasets", "stands beside data: move it to data.train, data.valid and data.test")
        return
    named = {str(name): section for name, section in datasets.items() if isinstance(section or {}, Mapping)}
    ratios = _get(values, _RATIOS) or {}
    if unknown := sorted(set(ratios) - set(named)):
        yield Wrong(_RATIOS, f"names {', '.join(unknown)}, not among the datasets: {', '.join(named)}")
    for section, key in _SPLITS.items():
        splits = _get(values, key)
        splits = ["train"] if splits is None and section == "train" else as_list(splits)
        yield from _unknown_splits(key, splits, named)
        entries = [
            entry_of(name, config or {}, split)
            | ({"weight": ratios.get(name, 0)} if ratios and section == "train" else {})
            for split in splits
            for name, config in named.items()
            if _has_split(name, config or {}, split)
        ]
        if section == "train" and not splits and not _get(values, "run.evaluate"):
            yield Wrong(key, f"{key} is empty: name a split to train on, or set run.evaluate=true")
        if entries:
            yield f"data.{section}", entries, ("datasets", key, *([_RATIOS] if section == "train" else []))


def _has_split(name: str, section: Mapping[str, Any], split: str) -> bool:
    own_source = name in SOURCES and name not in DATASETS  # which splits it has is known to itself alone
    return own_source or split in splits_of(name, section)


def _unknown_splits(key: str, splits: list[str], datasets: Mapping[str, Any]) -> Iterator[Wrong]:
    known = {split for name, section in datasets.items() for split in splits_of(name, section or {})}
    for split in splits:
        if not any(_has_split(name, section or {}, split) for name, section in datasets.items()):
            names = ", ".join(sorted(known)) or "none"
            yield Wrong(key, f"no dataset has annotations for the split {split!r} (known: {names})")


def _media(values: Mapping[str, Any], datasets: Mapping[str, Any]) -> Iterator[Outcome]:
    """What the datasets, or the `preprocess` section of a model's YAML, say about pictures is the model's to say."""
    if _get(values, "model.arch") in _BLIND:
        return
    sections = [f"datasets.{name}" for name, d in datasets.items() if d and _get(d, "data_type") != "text"]
    yield from _sizes(values, [f"{section}.vis_processor" for section in sections])
    for key, olds in _MEDIA.items():
        given = [f"{section}.vis_processor.{old}" for section in sections for old in olds]
        given = [old for old in given if _get(values, old) is not None]
        given = given or [
            old for old in (f"preprocess.vis_processor.{old}" for old in olds) if _get(values, old) is not None
        ]
        if not given:
            continue
        for other in given[1:]:
            if _get(values, other) != _get(values, given[0]):
                yield Wrong(
                    other, f"differs from {given[0]}: images of one run are processed alike, make them the same"
                )
        if key != "train_processor" or _get(values, given[0]) != _get(values, given[0].replace(".train.", ".eval.")):
            yield f"model.media.{key}", _get(values, given[0]), tuple(given)


def _sizes(values: Mapping[str, Any], processors: list[str]) -> Iterator[Wrong]:
    key = "model.tower.image_size" if _get(values, "model.tower.image_size") else "model.image_size"
    wanted = _get(values, key) or 224
    for processor in processors:
        for kind in ("train", "eval"):
            old = f"{processor}.{kind}.image_size"
            size = _get(values, old)
            if isinstance(size, int) and isinstance(wanted, int) and size != wanted:
                yield Wrong(old, f"{old} is {size} but {key} is {wanted}: set both to the same, or leave the first out")


def _get(values: Mapping[str, Any], key: str) -> Any:
    node: Any = values
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _without_references(value: Any) -> Any:
    """`value` less the `${...}` inside it, whose types are not known yet."""
    if isinstance(value, Mapping):
        kept = {name: _without_references(inner) for name, inner in value.items()}
        return {name: inner for name, inner in kept.items() if not (isinstance(inner, str) and "${" in inner)}
    return value
