"""The `datasets.<builder>` section of LAVIS and of this program's first version, as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from lavis.config.schema import ProcessorPair, TextProcessorPair, opt


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
