"""Shows samples as the model gets them: which tokens are supervised, which only read, where the images are."""

from __future__ import annotations

from itertools import groupby, islice
from typing import TYPE_CHECKING, cast

from rich.text import Text

from lavis.core.types import IGNORE_INDEX, Example, MediaSpan, Sample
from lavis.data.assemble import load_tokenizer, make_template, named_portions
from lavis.data.prepare import chosen, encoded
from lavis.data.report import PrepareReport

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerFast

    from lavis.config.recipe import Recipe
    from lavis.data.fingerprint import Template

SUPERVISED, MASKED, IMAGE = "bold green", "dim", "magenta"
LEGEND = Text.assemble(
    ("⟦supervised: learned⟧", SUPERVISED), "  ", ("masked: read only", MASKED), "  ", ("[image ×N file]", IMAGE)
)
"""What the colours and marks mean."""


def show_samples(recipe: Recipe, split: str, count: int) -> Iterator[Text]:
    """A heading and the tokens of the first `count` good rows of each entry of a section, or of a split.

    Raises DataError if there is none.
    """
    tokenizer = load_tokenizer(recipe.model)
    for portion in named_portions(recipe, split):
        template = make_template(recipe.model, portion.source.entry, tokenizer)
        examples = chosen(portion.source, portion.share, on_error=lambda error: None)
        rows = encoded(examples, template, portion.source.image_root, PrepareReport())
        for sample, rejected, example in islice(rows, count):
            name = f"{portion.source.name} {portion.split} · {_name(example)}"
            yield _titled(name, sample, tokenizer, template)
            if rejected is not None:
                yield _titled(f"{name} · rejected", rejected, tokenizer, template)


def _name(example: Example | list[str]) -> str:
    """The row's name; of a block, those of its documents."""
    if not isinstance(example, list):
        return example.id
    return example[0] if len(example) == 1 else f"{example[0]} to {example[-1]} ({len(example)} documents)"


def _titled(name: str, sample: Sample, tokenizer: PreTrainedTokenizerFast, template: Template) -> Text:
    size = f"{len(sample)} tokens, {sample.supervised_tokens} supervised"
    return Text(f"── {name} · {size}\n", style="bold") + render_sample(sample, tokenizer, template)


def render_sample(sample: Sample, tokenizer: PreTrainedTokenizerFast, template: Template) -> Text:
    """The sample's tokens as text: supervised spans in ⟦⟧ and colour, the rest dim, image runs as one mark each."""
    text, images = Text(), iter(sample.media)
    image_id = template.image_token_id if sample.media else None

    def sort(pair: tuple[int, int]) -> str:
        return "image" if pair[0] == image_id else "masked" if pair[1] == IGNORE_INDEX else "supervised"

    for kind, run in groupby(zip(sample.input_ids, sample.labels, strict=True), key=sort):
        ids = [token for token, _ in run]
        if kind == "image":
            shown = 0
            while shown < len(ids):  # pictures with nothing between them are one run
                span = next(images)
                text.append(f"[image ×{span.length}{_tiles(span)} {span.ref.path}]", IMAGE)
                shown += span.length
        else:
            decoded = cast("str", tokenizer.decode(ids))
            text.append(
                f"⟦{decoded}⟧" if kind == "supervised" else decoded, SUPERVISED if kind == "supervised" else MASKED
            )
    for span in images:  # captions: images stand beside the text
        text.append(f"[image {span.ref.path}]", IMAGE)
    return text


def _tiles(span: MediaSpan) -> str:
    return f" in {span.tiles} tiles" if span.tiles > 1 else ""
