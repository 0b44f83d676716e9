"""The fixed text of a chat template around the contents of a conversation's messages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from jinja2.exceptions import TemplateError

from lavis.core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The template of tokenizers that bring none."""


@dataclass(frozen=True)
class RenderedTemplate:
    """What stands around n contents: n + 1 texts, and for each content whether the template trims its left and right
    end.
    """

    texts: tuple[str, ...]
    trims: tuple[tuple[bool, bool], ...]


def chat_template_of(tokenizer: PreTrainedTokenizerFast) -> str:
    """The tokenizer's own template, else ChatML. Raises DataError if it has neither a template nor ChatML's tokens."""
    if tokenizer.chat_template:
        return tokenizer.get_chat_template()
    missing = [t for t in ("<|im_start|>", "<|im_end|>") if tokenizer.backend_tokenizer.token_to_id(t) is None]
    if missing:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template and lacks ChatML's {' and '.join(missing)}."
            " Use the chat version of the model, or add a chat_template to its tokenizer."
        )
    return CHATML


def render_template(
    tokenizer: PreTrainedTokenizerFast, template: str, roles: tuple[str, ...], *, generation: bool
) -> RenderedTemplate:
    """Render `template` once for a conversation of these roles and cut the contents out.

    `generation` ends it with the header of the assistant's next turn.
    Raises DataError when the template refuses these roles or does not show the contents in order.
    """
    # Each content is a mark that no template has, in white space that a trimming template takes away.
    messages = [{"role": role, "content": f"\v⟪{i}⟫\v"} for i, role in enumerate(roles)]
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=generation, enable_thinking=False
        )
    except TemplateError as error:
        raise DataError(f"the chat template refuses the roles {', '.join(roles)}: {error}.") from None
    pieces = re.split(r"(\v?)⟪(\d+)⟫(\v?)", cast(str, text))
    if pieces[2::4] != [str(i) for i in range(len(roles))]:
        raise DataError(f"the chat template does not show the messages {', '.join(roles)} once each and in order.")
    trims = tuple((left == "", right == "") for left, right in zip(pieces[1::4], pieces[3::4], strict=True))
    return RenderedTemplate(texts=tuple(pieces[0::4]), trims=trims)


def takes_system(tokenizer: PreTrainedTokenizerFast, template: str) -> bool:
    """Whether the template shows a system message, at the beginning also of a longer conversation."""
    try:
        render_template(tokenizer, template, ("system", "user", "assistant", "user"), generation=True)
    except DataError:
        return False
    return True
