"""Checks every row and every image of a recipe's datasets without training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from lavis.core.errors import DataError
from lavis.core.types import RowError
from lavis.data.assemble import load_tokenizer, make_builders, make_template
from lavis.data.builders import InstructionBuilder
from lavis.data.prepare import EXAMPLES, PrepareReport

if TYPE_CHECKING:
    from lavis.config.recipe import Recipe
    from lavis.data.assemble import Template

_THREADS = 8
_CHUNK = 1000


@dataclass
class SplitCheck:
    """Findings about one split. `images` counts distinct image files, `longest` the tokens of the longest sample."""

    dataset: str
    split: str
    report: PrepareReport = field(default_factory=PrepareReport)
    images: int = 0
    longest: int = 0

    @property
    def num_problems(self) -> int:
        """Rows and images with a problem."""
        return self.report.num_dropped


def check_recipe(recipe: Recipe) -> Iterator[SplitCheck]:
    """Check all splits of all datasets. Rows are tokenised too, so that rows too long to learn from are found.

    Raises DataError if the tokenizer can't be loaded.
    """
    tokenizer = load_tokenizer(recipe.model)
    for builder in make_builders(recipe):
        template = make_template(recipe.model, builder.config, tokenizer)
        for split in builder.splits:
            yield check_split(builder, split, template)


def check_split(builder: InstructionBuilder, split: str, template: Template) -> SplitCheck:
    """Check the rows of a split and the headers of its images. A file that is missing or broken is one problem."""
    check = SplitCheck(builder.name, split)
    first_use: dict[Path, str] = {}
    try:
        _check_rows(check, builder, split, template, first_use)
    except DataError as error:
        check.report.drop(RowError("an annotation file can't be used", f"dataset {builder.name}", str(error)))
    check.report.rows = check.report.kept + check.report.num_dropped
    check.images = len(first_use)
    with ThreadPoolExecutor(_THREADS) as pool:
        for error in pool.map(_image_problem, first_use.items()):
            if error is not None:
                check.report.drop(error)
    return check


def _check_rows(
    check: SplitCheck, builder: InstructionBuilder, split: str, template: Template, first_use: dict[Path, str]
) -> None:
    root = builder.image_root or Path()
    conversations = builder.conversations(split, check.report.drop)
    while chunk := list(islice(conversations, _CHUNK)):
        for conversation, sample in zip(chunk, template.encode_many(chunk), strict=True):
            for path in conversation.images:
                first_use.setdefault(root / path, conversation.id)
            if isinstance(sample, RowError):
                check.report.drop(sample)
            else:
                check.report.kept += 1
                check.longest = max(check.longest, len(sample))


def _image_problem(use: tuple[Path, str]) -> RowError | None:
    """What is wrong with an image file, by its header and structure; pixels are not decoded."""
    path, where = use
    if not path.is_file():
        return RowError(
            "an image file is missing", where, "Put it there, or mend the path or the image folder.", str(path)
        )
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            image.verify()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return RowError("an image file can't be read", where, "Replace the file or drop the row.", f"{path}: {error}")
    return None


def format_check(check: SplitCheck) -> str:
    """A few lines about a split: its size, then each kind of problem with its first examples."""
    report = check.report
    lines = [
        f"{check.dataset} {check.split}: {report.rows} rows, {check.images} images, longest sample {check.longest}"
        " tokens"
    ]
    if not report.dropped:
        return f"{lines[0]}: no problem"
    for reason, problems in sorted(report.dropped.items(), key=lambda item: -item[1].count):
        lines.append(f"  {problems.count} x {reason}")
        lines.extend(f"    {example}" for example in problems.examples)
        if problems.count > EXAMPLES:
            lines.append(f"    ... and {problems.count - EXAMPLES} more")
    return "\n".join(lines)
