"""Shows samples as the model gets them: which tokens are supervised, which only read, where the images are."""

from __future__ import annotations

from itertools import groupby, islice
from typing import TYPE_CHECKING

from rich.text import Text

from lavis.core.errors import DataError
from lavis.core.types import IGNORE_INDEX, RowError, Sample
from lavis.data.assemble import load_tokenizer, make_builders, make_template

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerFast

    from lavis.config.recipe import Recipe
    from lavis.data.assemble import Template

SUPERVISED, MASKED, IMAGE = "bold green", "dim", "magenta"
LEGEND = Text.assemble(
    ("⟦supervised: learned⟧", SUPERVISED), "  ", ("masked: read only", MASKED), "  ", ("[image ×N file]", IMAGE)
)
"""What the colours and marks mean."""


def show_samples(recipe: Recipe, split: str, count: int) -> Iterator[Text]:
    """A heading and the tokens of the first `count` good rows of each dataset that has the split.

    Raises DataError if none has it.
    """
    tokenizer = load_tokenizer(recipe.model)
    builders = [b for b in make_builders(recipe) if split in b.splits]
    if not builders:
        raise DataError(f"no dataset of the recipe has a split {split!r}. Choose another with --split.")
    for builder in builders:
        template = make_template(recipe.model, builder.config, tokenizer)
        conversations = builder.conversations(split, on_error=lambda error: None)
        encoded = ((c, template.encode_many([c])[0]) for c in conversations)
        good = ((c, sample) for c, sample in encoded if not isinstance(sample, RowError))
        for conversation, sample in islice(good, count):
            size = f"{len(sample)} tokens, {sample.num_tokens} supervised"
            heading = Text(f"── {builder.name} {split} · {conversation.id} · {size}\n", style="bold")
            yield heading + render_sample(sample, tokenizer, template)


def render_sample(sample: Sample, tokenizer: PreTrainedTokenizerFast, template: Template) -> Text:
    """The sample's tokens as text: supervised spans in ⟦⟧ and colour, the rest dim, image runs as one mark each."""
    text, images = Text(), iter(sample.images)
    image_id = template.image_token_id if sample.images else None

    def sort(pair: tuple[int, int]) -> str:
        return "image" if pair[0] == image_id else "masked" if pair[1] == IGNORE_INDEX else "supervised"

    for kind, run in groupby(zip(sample.input_ids, sample.labels, strict=True), key=sort):
        ids = [token for token, _ in run]
        if kind == "image":
            for _ in range(0, len(ids), template.num_query_token):
                text.append(f"[image ×{template.num_query_token} {next(images)}]", IMAGE)
        else:
            decoded = tokenizer.decode(ids)
            text.append(
                f"⟦{decoded}⟧" if kind == "supervised" else decoded, SUPERVISED if kind == "supervised" else MASKED
            )
    for path in images:  # captions: images stand beside the text
        text.append(f"[image {path}]", IMAGE)
    return text
