"""Older keys, such as those of options in scripts, over a recipe whose data is a list of entries."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Mapping
from typing import Any

from lavis.config.compat.dataset_section import RATIOS, SHAPES_SPLITS, SPLITS, entry_of, get
from lavis.config.compat.outcome import Outcome, Wrong
from lavis.config.schema import as_list

Entry = dict[str, Any]


def over_lists(values: Mapping[str, Any], datasets: Mapping[str, Any]) -> Iterator[Outcome]:
    """What `datasets.<name>`, run.*_splits and run.train_dataset_ratios change of the lists, by the entries' names."""
    lists = {section: get(values, f"data.{section}") for section in SPLITS}
    lists = {section: entries if isinstance(entries, list) else [] for section, entries in lists.items()}
    everything = [entry for entries in lists.values() for entry in entries]
    if not all(isinstance(entry, Mapping) for entry in everything):
        return  # the schema refuses it
    names = list(dict.fromkeys(_name(entry) for entry in everything))
    ratios = get(values, RATIOS) or {}
    known = ", ".join(names) or "none"
    for name in datasets:
        if name not in names:
            message = f"stands beside data, which has no entry {name!r} (there are: {known}): change data"
            yield Wrong(f"datasets.{name}", message)
    if unknown := sorted(set(ratios) - set(names)):
        yield Wrong(RATIOS, f"names {', '.join(unknown)}, not among the entries of data: {known}")
    for section, key in SPLITS.items():
        splits, sources = get(values, key), ["datasets"] if datasets else []
        entries = lists[section]
        if splits is not None:
            sources.append(key)
            entries = yield from _of_splits(key, as_list(splits), everything)
        if section == "train" and splits is not None and not entries and not get(values, "run.evaluate"):
            yield Wrong(key, f"{key} is empty: name a split to train on, or set run.evaluate=true")
        if section == "train" and ratios:
            sources.append(RATIOS)
            entries = [{**entry, "weight": ratios.get(_name(entry), 0)} for entry in entries]
        changed = [_changed(entry, datasets, section) for entry in entries]
        if sources and changed != lists[section]:
            yield f"data.{section}", changed, tuple(sources)


def _of_splits(key: str, splits: list[str], everything: list[Entry]) -> Generator[Outcome, None, list[Entry]]:
    """The entries that `splits` name: those of these names, or other parts of sources that generate their rows."""
    found: list[Entry] = []
    for split in splits:
        of_split = [_part(entry, split) for entry in everything if _has(entry, split)]
        distinct = [entry for i, entry in enumerate(of_split) if entry not in of_split[:i]]
        if not distinct:
            known = dict.fromkeys(str(entry.get("split", "train")) for entry in everything)
            yield Wrong(
                key, f"no dataset has annotations for the split {split!r} (known: {', '.join(known) or 'none'})"
            )
        found += distinct
    return found


def _has(entry: Entry, split: str) -> bool:
    parts = SHAPES_SPLITS.get(str(entry.get("source")))
    return split in parts if parts else split == entry.get("split", "train")


def _part(entry: Entry, split: str) -> Entry:
    return {**{name: value for name, value in entry.items() if name != "weight"}, "split": split}


def _changed(entry: Entry, datasets: Mapping[str, Any], section: str) -> Entry:
    change = datasets.get(_name(entry))
    if not isinstance(change, Mapping):
        return entry
    new = entry_of(_name(entry), change, entry.get("split") or section)
    result = copy.deepcopy(entry)
    for name, value in new.items():
        if name in ("text", "generate") and isinstance(result.get(name), dict):
            result[name] = {**result[name], **value}
        elif name not in ("name", "source", "split"):
            result[name] = value
    return result


def _name(entry: Entry) -> str:
    return str(entry.get("name") or entry.get("source") or "files")
