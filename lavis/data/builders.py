"""Dataset builders: a section of `datasets` in a recipe to conversations and image paths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lavis.config.schema import DatasetConfig
from lavis.core.errors import ConfigError, DataError, did_you_mean
from lavis.core.paths import cache_root, resolve
from lavis.core.registries import DATASETS
from lavis.core.types import Conversation, Message, RowError
from lavis.data.formats import OnError, Row, detect_format, read_rows, to_conversation, where_of
from lavis.data.text import text_processor

if TYPE_CHECKING:
    from lavis.data.shapes.build import ShapesSpec


@DATASETS.register("minigpt4_instruction")
@DATASETS.register("llava_instruction")
@DATASETS.register("instruction")
class InstructionBuilder:
    """Annotation files of any dialect with an image folder. `name` is that of the recipe's section, for messages."""

    def __init__(self, name: str, config: DatasetConfig) -> None:
        self.name, self.config = name, config

    @property
    def splits(self) -> list[str]:
        """Names of the splits that have annotations."""
        return [split for split, source in self.config.build_info.annotations.items() if source.storage]

    @property
    def image_root(self) -> Path | None:
        """Folder that relative image paths are under; None for a text dataset."""
        storage = self.config.build_info.images.storage
        return resolve(storage) if storage else None

    def annotation_files(self, split: str) -> list[Path]:
        """Files of a split. Raises DataError for an unknown split or a missing file, saying where it belongs."""
        if split not in self.splits:
            hint = did_you_mean(split, self.splits)
            raise DataError(
                f"dataset {self.name!r} has no split {split!r}.{hint} It has: {', '.join(self.splits) or 'none'}."
            )
        files = self.config.build_info.annotations[split].files()
        for path, url, _ in files:
            if not resolve(path).is_file():
                get = (
                    f"`lavis weights RECIPE --download` fetches it from {url}; else put it there"
                    if url
                    else "Put it there"
                )
                key = f"datasets.{self.name}.build_info.annotations.{split}.storage"
                raise DataError(f"annotation file {resolve(path)} does not exist. {get}, or set {key}.")
        return [resolve(path) for path, _, _ in files]

    def rows(self, split: str, on_error: OnError | None = None) -> Iterator[tuple[str, Row]]:
        """Rows of a split, each with the name by which messages call it. `on_error`: see read_rows."""
        for file in self.annotation_files(split):
            for number, row in read_rows(file, on_error):
                yield where_of(file, number), row

    def conversations(self, split: str, on_error: OnError | None = None) -> Iterator[Conversation]:
        """Conversations of a split after the text processor (that of training if the split is `train`).

        Bad rows go to `on_error`; without one, the first is raised as a RowError.
        """
        pair = self.config.text_processor
        config = pair.train if split == "train" else pair.eval
        process = text_processor(config)
        for where, row in self.rows(split, on_error):
            try:
                dialect = _detect(row, where) if self.config.format == "auto" else self.config.format
                yield self._processed(to_conversation(row, dialect, where=where), process)
            except RowError as error:
                if on_error is None:
                    raise
                on_error(error)

    def _processed(self, conversation: Conversation, process: Callable[[str], str]) -> Conversation:
        """With the processor applied to questions (chat) or captions; a question's prompt stands before its text."""
        role = "assistant" if self.config.sample_format == "caption" else "user"
        return replace(
            conversation, messages=tuple(_map_text(m, process) if m.role == role else m for m in conversation.messages)
        )


def _detect(row: Row, where: str) -> str:
    try:
        return detect_format(row)
    except DataError as error:
        raise RowError("unknown annotation dialect", where, "Set the dataset's `format`.", str(error)) from None


def _map_text(message: Message, process: Callable[[str], str]) -> Message:
    """`process` applied to the last text of a message, behind the `</Img> ` that may begin it."""
    last = max((i for i, part in enumerate(message.parts) if isinstance(part, str)), default=None)
    if last is None:
        return message
    head, tag, text = message.parts[last].rpartition("</Img> ")
    return replace(message, parts=(*message.parts[:last], head + tag + process(text), *message.parts[last + 1 :]))


class ShapesBuilder(InstructionBuilder):
    """A part of the shapes world, generated under cache/dataset/shapes when first asked for its files."""

    files: ClassVar[dict[str, str]]

    def __init__(self, name: str, config: DatasetConfig) -> None:
        super().__init__(name, config)
        self.root = cache_root() / "dataset" / "shapes"
        self._spec = _shapes_spec(name, config.generate)

    @property
    def splits(self) -> list[str]:
        """Names of the splits that the shapes world has."""
        return list(self.files)

    @property
    def image_root(self) -> Path | None:
        """The folder of the pictures."""
        return self.root / "images"

    def annotation_files(self, split: str) -> list[Path]:
        """The file of a split, generated if need be. Raises DataError for an unknown split."""
        from lavis.data.shapes.build import ensure_shapes

        if split not in self.files:
            hint = did_you_mean(split, self.files)
            raise DataError(f"dataset {self.name!r} has no split {split!r}.{hint} It has: {', '.join(self.files)}.")
        return [ensure_shapes(self.root, self._spec) / self.files[split]]


@DATASETS.register("shapes_instruction")
class ShapesInstruction(ShapesBuilder):
    """Captions, questions and dialogues about pictures; the pictures of `test` show held-out combinations.

    `interviews` are those of `train`, each with a question of every kind in one dialogue: most answers for the compute.
    """

    files: ClassVar = {"train": "train.json", "interviews": "interviews.json", "val": "val.json", "test": "test.json"}


@DATASETS.register("shapes_caption")
class ShapesCaption(ShapesBuilder):
    """Pictures with a caption in either language."""

    files: ClassVar = {"train": "captions.json"}


@DATASETS.register("shapes_text")
class ShapesText(ShapesBuilder):
    """Dialogues about scenes described in words."""

    files: ClassVar = {"train": "text_train.json", "val": "text_val.json"}

    @property
    def image_root(self) -> Path | None:
        """None: there are no images."""
        return None


def _shapes_spec(name: str, generate: dict[str, Any]) -> ShapesSpec:
    from lavis.data.shapes.build import ShapesSpec

    known = [field.name for field in fields(ShapesSpec)]
    for key in generate:
        if key not in known:
            hint = did_you_mean(key, known)
            raise ConfigError(f"datasets.{name}.generate has no key {key!r}.{hint} Known: {', '.join(known)}.")
    return ShapesSpec(**generate)
