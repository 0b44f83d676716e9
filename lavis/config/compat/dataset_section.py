"""The `datasets.<builder>` section of LAVIS and of this program's first version, as it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from lavis.config.schema import ProcessorPair, TextProcessorPair, opt
from lavis.core.registries import SOURCES

SPLITS = {"train": "run.train_splits", "valid": "run.valid_splits", "test": "run.test_splits"}
RATIOS = "run.train_dataset_ratios"
FILE_DATASETS = ("minigpt4_instruction", "llava_instruction", "instruction")
"""Names of the old registry whose rows are in files that the recipe names."""
SHAPES_SPLITS = {
    "shapes_instruction": ("train", "interviews", "val", "test"),
    "shapes_caption": ("train",),
    "shapes_text": ("train", "val"),
}
DATASETS = (*FILE_DATASETS, *SHAPES_SPLITS)
"""Every name that a section of `datasets` of this package had."""


@dataclass
class AnnotationSource:
    """Where the annotations of one split are."""

    url: Optional[Any] = opt(None, "address of the file, or a list")
    sha256: Optional[Any] = opt(None, "SHA-256 of what is at url, or a list")
    storage: Optional[Any] = opt(None, "annotation file, or a list of files")


@dataclass
class ImageSource:
    """Where the images are."""

    storage: Optional[str] = opt(None, "folder that image paths in annotations are relative to")


@dataclass
class BuildInfo:
    """Files of a dataset."""

    annotations: dict[str, AnnotationSource] = opt({}, "split name (train, val, test) to its annotation files")
    images: ImageSource = opt(ImageSource, "image folder")


@dataclass
class DatasetSection:
    """One entry of `datasets`."""

    data_type: str = opt("images", "what the rows refer to", choices=("images", "text"))
    format: str = opt("auto", "annotation dialect")
    sample_format: str = opt("chat", "the conversation, or its last answer alone", choices=("chat", "caption"))
    supervise: str = opt("assistant", "which tokens are learned", choices=("assistant", "markup"))
    build_info: BuildInfo = opt(BuildInfo, "files of the dataset")
    vis_processor: ProcessorPair = opt(ProcessorPair, "image processors")
    text_processor: TextProcessorPair = opt(TextProcessorPair, "text processors")
    generate: dict[str, Any] = opt({}, "arguments of a dataset that generates itself")


def splits_of(name: str, section: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the splits that the section `datasets.<name>` has."""
    if name in SHAPES_SPLITS:
        return SHAPES_SPLITS[name]
    annotations = get(section, "build_info.annotations") or {}
    return tuple(
        split for split, source in annotations.items() if isinstance(source, Mapping) and source.get("storage")
    )


def entry_of(name: str, section: Mapping[str, Any], split: str) -> dict[str, Any]:
    """The entry of `data` that a split of the section `datasets.<name>` is."""
    annotation = get(section, f"build_info.annotations.{split}") or {}
    text = get(section, f"text_processor.{'train' if split == 'train' else 'eval'}") or {}
    entry = {
        "name": name,
        "source": "files" if name in FILE_DATASETS else name,
        "path": annotation.get("storage"),
        "images": None if section.get("data_type") == "text" else get(section, "build_info.images.storage"),
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


def has_split(name: str, section: Mapping[str, Any], split: str) -> bool:
    """Whether the section `datasets.<name>` has a split, so far as the recipe tells."""
    own_source = name in SOURCES and name not in DATASETS  # which splits it has is known to itself alone
    return own_source or split in splits_of(name, section)


def get(values: Mapping[str, Any], key: str) -> Any:
    """The value at the dotted `key`, None where there is none."""
    node: Any = values
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node
