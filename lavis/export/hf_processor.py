"""The processor of an export: what makes stock transformers ask its model what this program asks its own.

The chat template writes a picture's tokens where they belong: in the turn they were given in, with the text of the
model's media format around them. It is the tokenizer's, as some processors forget theirs when they are loaded: they are
called with `chat_template=processor.tokenizer.chat_template`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from PIL import Image
from transformers import AutoTokenizer, Blip2Processor, BlipImageProcessorPil, PreTrainedTokenizerFast

from lavis.data.dialects import to_conversation
from lavis.data.image import EvalImage
from lavis.tokens.layout import chat_template_of, takes_system
from lavis.tokens.template import ChatTemplate

_FLATTEN = """\
{{#- Written by `lavis export hf`: texts and images become the strings that the language model's own \
template, below, expects. -#}}
{{%- set enable_thinking = false -%}}
{system}
{{%- set flat = namespace(messages=[], text='') -%}}
{{%- for message in messages -%}}
  {{%- set flat.text = '' -%}}
  {{%- set boundary = {system_boundary} if message['role'] == 'system' else {boundary} -%}}
  {{%- if message['content'] is string -%}}
    {{%- set flat.text = boundary + message['content'] -%}}
  {{%- else -%}}
    {{%- for part in message['content'] -%}}
      {{%- if loop.first -%}}
        {{%- set flat.text = {image_boundary} if part['type'] == 'image' else boundary -%}}
      {{%- endif -%}}
      {{%- if part['type'] == 'image' -%}}
        {{%- set flat.text = flat.text + {before} + {image} * {count} + {after} -%}}
      {{%- else -%}}
        {{%- set behind_image = loop.previtem is defined and loop.previtem['type'] == 'image' -%}}
        {{%- set gap = {gap} if behind_image and not part['text'][:1].isspace() else '' -%}}
        {{%- set flat.text = flat.text + gap + part['text'] -%}}
      {{%- endif -%}}
    {{%- endfor -%}}
  {{%- endif -%}}
  {{%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}}
{{%- endfor -%}}
{{%- set messages = flat.messages %}}
"""
_LAST_LINE = "{%- set messages = flat.messages %}\n"
_ADD_SYSTEM = """\
{{%- if messages[0]['role'] != 'system' -%}}
  {{%- set messages = [{{'role': 'system', 'content': {system}}}] + messages -%}}
{{%- endif -%}}"""
_DROP_SYSTEM = """\
{%- if messages[0]['role'] == 'system' -%}
  {%- set messages = messages[1:] -%}
{%- endif -%}"""

_IMAGE, _TEXT = {"type": "image"}, {"type": "text", "text": "How many red circles are there?"}
PROBES: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "Hello, who are you?"}],
    [{"role": "user", "content": [_IMAGE, _TEXT]}],
    [{"role": "user", "content": [_TEXT, _IMAGE, {"type": "text", "text": "和"}, _IMAGE]}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [_IMAGE, _IMAGE, {"type": "text", "text": "图里有什么？"}]},
        {"role": "assistant", "content": "两个圆形。"},
        {"role": "user", "content": "Which one is larger?\nName it."},
    ],
)
"""Conversations in transformers' form that are encoded both ways: no image, one, several, several turns, two languages.
"""


def write_blip2_processor(folder: Path, template: ChatTemplate, image: EvalImage) -> list[str]:
    """As write_processor, a Blip2Processor.

    It puts a picture's tokens before everything else, unless its number of query tokens is null: so the chat template
    writes all of them.
    """
    size = {"height": image.image_size, "width": image.image_size}
    pictures = BlipImageProcessorPil(size=size, image_mean=list(image.mean), image_std=list(image.std))
    assert template.media
    count = template.media.tokens_per_tile
    return write_processor(folder, template, partial(Blip2Processor, pictures, num_query_tokens=None), count)


def write_processor(
    folder: Path, template: ChatTemplate, processor_of: Callable[[PreTrainedTokenizerFast], Any], count: int
) -> list[str]:
    """Write tokenizer, chat template and image processor to `folder`.

    processor_of: a tokenizer to the processor of transformers. count: of image tokens that it wants a picture to be in
    the text. Returns what stock transformers encodes otherwise than this program: one line for each such probe,
    normally none.
    """
    tokenizer = template.tokenizer
    tokenizer.save_pretrained(folder)
    token = cast(str, tokenizer.convert_ids_to_tokens(template.image_token_id))
    # image_token keeps a processor from adding a token of its own; generation wants its padding on the left.
    saved: Any = AutoTokenizer.from_pretrained(folder, image_token=token, padding_side="left")
    saved.pad_token = tokenizer.convert_ids_to_tokens(template.pad_token_id)
    processor = processor_of(saved)
    saved.chat_template, differences = _fitting_template(processor, template, token, count)
    processor.save_pretrained(folder)
    return differences


def _fitting_template(processor: Any, template: ChatTemplate, token: str, count: int) -> tuple[str, list[str]]:
    """The chat template with the fewest differences, and these.

    A tokenizer that begins every text with a space may do so once where texts are encoded apart here: those of a turn's
    header and content, or on both sides of a picture. A space in the string makes up for it.
    """
    found = []
    for spaces in itertools.product((" ", ""), repeat=3):
        jinja = chat_template(template, token, Boundaries(*spaces), count)
        processor.tokenizer.chat_template = jinja
        differences = probe(processor, template)
        if not differences:
            return jinja, []
        found.append((len(differences), jinja, differences))
    _, jinja, differences = min(found, key=lambda candidate: candidate[0])
    return jinja, differences


def exported_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that `write_processor` wrote to `folder`, with the chat template it had before."""
    tokenizer = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(folder))
    if tokenizer.chat_template:
        tokenizer.chat_template = tokenizer.chat_template.rpartition(_LAST_LINE)[2]
    return tokenizer


class Boundaries(NamedTuple):
    """What a string needs before a text that is encoded apart here: a system message, a content, behind a picture."""

    system: str
    content: str
    picture: str


def chat_template(template: ChatTemplate, image_token: str, boundaries: Boundaries, count: int) -> str:
    """A Jinja template that takes messages with images and gives the prompt of `template`; `count` image tokens stand
    for a picture.
    """
    source, media = chat_template_of(template.tokenizer), template.media
    assert media  # text alone is exported otherwise
    add_system = _ADD_SYSTEM.format(system=json.dumps(template.system, ensure_ascii=False))
    flatten = _FLATTEN.format(
        system=add_system if takes_system(template.tokenizer, source) else _DROP_SYSTEM,
        system_boundary=json.dumps(boundaries.system),
        boundary=json.dumps(boundaries.content),
        image_boundary=json.dumps(boundaries.content if media.format.before else ""),
        image=json.dumps(image_token),
        count=count,
        before=json.dumps(media.format.before),
        after=json.dumps(media.format.after),
        gap=json.dumps(("" if media.format.after else boundaries.picture) + media.format.gap),
    )
    return flatten + source


def probe(processor: Any, template: ChatTemplate) -> list[str]:
    """The probes whose ids differ, in a line each."""
    found = []
    # probes are not cut
    template = ChatTemplate(template.tokenizer, template.media, max_length=1 << 20, system=template.system)
    for number, messages in enumerate(PROBES, start=1):
        row = {"messages": [*_with_images(messages, path="probe.png"), {"role": "assistant", "content": "."}]}
        ours = list(template.encode_prompt(to_conversation(row, "messages", where="probe")).input_ids)
        theirs = stock_ids(processor, messages)
        if ours != theirs:
            at = next(i for i, pair in enumerate(itertools.zip_longest(ours, theirs)) if len(set(pair)) > 1)
            there, here = (template.tokenizer.convert_ids_to_tokens(ids[at : at + 3]) for ids in (theirs, ours))
            found.append(
                f"probe {number}, token {at + 1}: {' '.join(here)!r} here, {' '.join(there)!r} in transformers"
            )
    return found


def stock_ids(processor: Any, messages: list[dict[str, Any]]) -> list[int]:
    """Ids of the prompt that asks for the next answer, as the model card says to get them."""
    encoded: Any = processor.apply_chat_template(
        _with_images(messages, image=Image.new("RGB", (40, 30))),  # some processors count tokens by the pixels
        chat_template=processor.tokenizer.chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        sanitize_control_tokens=True,
        processor_kwargs={"add_special_tokens": False},
    )
    return list(encoded["input_ids"][0])


def _with_images(messages: list[dict[str, Any]], **values: Any) -> list[dict[str, Any]]:
    """The messages with something to look at in every image part."""
    return [
        (
            m
            if isinstance(m["content"], str)
            else {**m, "content": [p | values if p["type"] == "image" else p for p in m["content"]]}
        )
        for m in messages
    ]
