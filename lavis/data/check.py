"""Checks every row and every image of a recipe's datasets without training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from lavis.core.errors import DataError
from lavis.core.types import Example, RowError
from lavis.data.assemble import Portion, load_tokenizer, make_template, portions
from lavis.data.prepare import chosen, encoded
from lavis.data.report import EXAMPLES, PrepareReport

if TYPE_CHECKING:
    from lavis.config.recipe import Recipe
    from lavis.data.fingerprint import Template

_THREADS = 8


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
    """Check all entries of a recipe. Rows are tokenised too, so that rows too long to learn from are found.

    Raises DataError if the tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(recipe.model)
    for portion in portions(recipe):
        yield check_portion(portion, make_template(recipe.model, portion.source.entry, tokenizer))


def check_portion(portion: Portion, template: Template) -> SplitCheck:
    """Check the rows of a portion and the headers of its images. A file that is missing or broken is one problem."""
    source = portion.source
    check = SplitCheck(source.name, portion.split)
    first_use: dict[Path, str] = {}
    try:
        examples = _noted(chosen(source, portion.share, check.report.drop), source.image_root or Path(), first_use)
        for sample, rejected, _ in encoded(examples, template, source.image_root, check.report):
            check.longest = max(check.longest, len(sample), len(rejected or ()))
    except DataError as error:
        check.report.drop(RowError("an annotation file can't be used", f"dataset {source.name}", str(error)))
    check.report.rows = check.report.kept + check.report.num_dropped
    check.images = len(first_use)
    with ThreadPoolExecutor(_THREADS) as pool:
        for problem in pool.map(_image_problem, first_use.items()):
            if problem is not None:
                check.report.drop(problem)
    return check


def _noted(examples: Iterable[Example], root: Path, first_use: dict[Path, str]) -> Iterator[Example]:
    """The examples, while `first_use` learns which row names an image first."""
    for example in examples:
        for ref in example.media:
            first_use.setdefault(root / ref.path, example.id)
        yield example


def _image_problem(use: tuple[Path, str]) -> RowError | None:
    """What is wrong with an image file, by its header and structure; pixels are not decoded."""
    path, where = use
    if not path.is_file():
        return RowError(
            "an image file is missing", where, "Put it there, or correct the path or the image folder.", str(path)
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
