"""Conversation to Sample: the chat template, the label mask and truncation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from lavis.core.errors import DataError
from lavis.core.types import IGNORE_INDEX, Conversation, ImageRef, Message, RowError, Sample
from lavis.tokens.layout import chat_template_of, render_layout, takes_system
from lavis.tokens.text_encoder import TextEncoder, special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Ids = tuple[int, ...]
IMAGE_TOKENS = (
    "<|extra_0|>",
    "<|image_pad|>",
    "<|vision_pad|>",
    "<image>",
    "<|image|>",
    "<|reserved_special_token_0|>",
    "<|reserved000|>",
    "<|placeholder1|>",
    "<unused0>",
    "[UNUSED_TOKEN_0]",
    "[control_8]",
)
"""Tokens that may hold an image's place: made for it, or reserved and unused."""

_MOST_FRAMES = 256
"""Sequences of roles that are remembered; who chats may invent them."""


_Sort = Literal["markup", "text", "image"]


class _Segment(NamedTuple):
    """Consecutive tokens of one sort. The system message counts as markup, as a prompt is never shortened there."""

    sort: _Sort
    ids: Ids
    labels: Ids


@dataclass(frozen=True)
class _Frame:
    """Tokens and labels around the contents of messages of these roles, with the trims of the contents."""

    roles: tuple[str, ...]
    ids: tuple[Ids, ...]
    labels: tuple[Ids, ...]
    trims: tuple[tuple[bool, bool], ...]


class _Dialogue(NamedTuple):
    """A conversation about to be tokenised: its frame and the parts of each message, trimmed as the template does."""

    frame: _Frame
    contents: list[list[str | ImageRef]]

    @property
    def texts(self) -> list[str]:
        return [part for parts in self.contents for part in parts if isinstance(part, str)]


class ChatTemplate:
    """Encodes conversations with the chat template of `tokenizer` (ChatML if it has none).

    The template is rendered once for each sequence of roles; only what it writes itself can become a control token.
    Contents are tokenised by themselves, and an image is a run of `num_query_token` placeholder ids in its turn.

    supervise: "assistant" supervises answers and the first token of what the template puts behind them (its end token);
        "markup" also every special token of the template and the newline behind an end token, in every turn, as the
        original did.
    max_length: tokens, images included; what is longer is cut.
    system: system message of conversations without one; none if it is empty or the template takes none.
    num_query_token: 0 for a text-only model, which refuses images.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        num_query_token: int,
        supervise: str = "assistant",
        max_length: int = 512,
        system: str = "You are a helpful assistant.",
    ) -> None:
        self.tokenizer, self.num_query_token, self.supervise = tokenizer, num_query_token, supervise
        self.max_length, self.system = max_length, system
        self._template = chat_template_of(tokenizer)
        self._takes_system = takes_system(tokenizer, self._template)
        self._special = special_ids(tokenizer)
        self._frames: dict[tuple[tuple[str, ...], bool], _Frame] = {}
        self._encoder = TextEncoder(tokenizer, self._forbidden())

    # ---- tokens the rest of the program asks for

    @cached_property
    def image_token_id(self) -> int:
        """Id that holds the place of an image vector. Raises DataError if there can be none."""
        if not self.num_query_token:
            raise DataError(
                "a row has an image but the model reads text only. Train a model that sees, or drop the images."
            )
        token = self._find_image_token()
        if token is None:
            raise DataError(
                f"the tokenizer {self.tokenizer.name_or_path!r} has none of the tokens that can hold an image's place: "
                f"{', '.join(IMAGE_TOKENS)}. Add one of them to its special tokens."
            )
        return token

    @cached_property
    def pad_token_id(self) -> int:
        """Id of padding: the pad token, else `<|endoftext|>`, else the end-of-sequence token, else 0."""
        candidates = (
            self.tokenizer.pad_token_id,
            self.tokenizer.backend_tokenizer.token_to_id("<|endoftext|>"),
            self.tokenizer.eos_token_id,
        )
        return next((i for i in candidates if i is not None), 0)

    @cached_property
    def stop_token_ids(self) -> Ids:
        """Ids at which generation ends: the end token, the special tokens of a turn's header, end of sequence."""
        header = self._frame(("user",), generation=True).ids[-1]
        end = self._frame(("user", "assistant"), generation=False).ids[-1][:1]
        eos = self.tokenizer.eos_token_id
        return tuple(sorted({*end, *self._special.intersection(header), *([] if eos is None else [eos])}))

    def fingerprint(self) -> str:
        """Hex digest of all that decides how a conversation is encoded."""
        settings = (self.num_query_token, self.supervise, self.max_length, self.system, self._template)
        return _digest("chat-1", self.tokenizer, *settings)

    # ---- encoding

    def encode(self, conversation: Conversation) -> Sample:
        """The sample that trains on the answers. Raises RowError if truncation leaves no supervised token."""
        sample = self.encode_many([conversation])[0]
        if isinstance(sample, RowError):
            raise sample
        return sample

    def encode_many(self, conversations: Sequence[Conversation]) -> list[Sample | RowError]:
        """`encode` for many conversations at once, which is faster; a failure stands in its conversation's place."""
        samples: list[Sample | RowError] = []
        dialogues = [self._dialogue(c, generation=False) for c in conversations]
        encoded = self._encoder.encode_all(text for dialogue in dialogues for text in dialogue.texts)
        for conversation, dialogue in zip(conversations, dialogues, strict=True):
            try:
                samples.append(self._truncated(self._segments(dialogue, encoded), conversation))
            except RowError as error:
                samples.append(error)
        return samples

    def encode_prompt(self, conversation: Conversation) -> Sample:
        """The sample that asks for the next answer: it ends with the assistant's header and has no labels.

        A last assistant turn is dropped. A prompt longer than max_length loses text from its first question on, never
        an image.
        """
        dialogue = self._dialogue(conversation, generation=True)
        segments = self._segments(dialogue, self._encoder.encode_all(dialogue.texts))
        excess = sum(len(s.ids) for s in segments) - self.max_length
        ids: list[int] = []
        for segment in segments:
            cut = min(max(excess, 0), len(segment.ids)) if segment.sort == "text" else 0
            ids.extend(segment.ids[: len(segment.ids) - cut])
            excess -= cut
        if excess > 0:
            raise self._too_long(conversation, len(ids))
        return Sample(tuple(ids), (IGNORE_INDEX,) * len(ids), conversation.images)

    # ---- parts

    def _dialogue(self, conversation: Conversation, generation: bool) -> _Dialogue:
        """The messages with the system message that the template takes; for `generation` without a last answer."""
        messages = conversation.messages
        if generation and messages[-1].role == "assistant":
            messages = messages[:-1]
        if messages[0].role == "system":
            messages = messages if self._takes_system else messages[1:]
        elif self.system and self._takes_system:
            messages = (Message("system", (self.system,)), *messages)
        frame = self._frame(tuple(m.role for m in messages), generation)
        return _Dialogue(frame, [_trimmed(m.parts, *trim) for m, trim in zip(messages, frame.trims, strict=True)])

    def _segments(self, dialogue: _Dialogue, encoded: dict[str, list[int]]) -> list[_Segment]:
        frame, segments = dialogue.frame, []
        for i, parts in enumerate(dialogue.contents):
            segments.append(_Segment("markup", frame.ids[i], frame.labels[i]))
            for part in parts:
                ids = tuple(encoded[part]) if isinstance(part, str) else (self.image_token_id,) * self.num_query_token
                labels = ids if frame.roles[i] == "assistant" else (IGNORE_INDEX,) * len(ids)
                sort: _Sort = "text" if isinstance(part, str) else "image"
                segments.append(_Segment("markup" if frame.roles[i] == "system" else sort, ids, labels))
        return [*segments, _Segment("markup", frame.ids[-1], frame.labels[-1])]

    def _truncated(self, segments: Sequence[_Segment], conversation: Conversation) -> Sample:
        """Cut at max_length; if that falls into an image, cut where the image's turn begins."""
        ids: list[int] = []
        labels: list[int] = []
        cut, border, image_ends = self.max_length, 0, []
        for segment in segments:
            end = len(ids) + len(segment.ids)
            if segment.sort == "markup":  # its first token ends a turn, the rest begins the next
                border = min(len(ids), 1) + len(ids)
            elif segment.sort == "image":
                image_ends.append(end)
                cut = border if len(ids) < cut < end else cut
            ids.extend(segment.ids)
            labels.extend(segment.labels)
        labels[0] = IGNORE_INDEX  # nothing predicts the first token
        num_images = sum(end <= cut for end in image_ends)
        sample = Sample(tuple(ids[:cut]), tuple(labels[:cut]), conversation.images[:num_images])
        if not sample.num_tokens:
            raise self._too_long(conversation, len(ids))
        return sample

    def _too_long(self, conversation: Conversation, length: int) -> RowError:
        detail = f"{length} tokens, model.max_txt_len is {self.max_length}"
        mend = "Raise model.max_txt_len or shorten the row."
        return RowError("no supervised token left after truncation", conversation.id, mend, detail)

    # ---- the template's own tokens

    def _frame(self, roles: tuple[str, ...], generation: bool) -> _Frame:
        key = (roles, generation)
        if key not in self._frames:
            layout = render_layout(self.tokenizer, self._template, roles, generation=generation)
            pieces = self.tokenizer(list(layout.texts), add_special_tokens=False, split_special_tokens=False)
            ids = [tuple(piece) for piece in pieces["input_ids"]]
            if roles[-1] == "assistant" and not ids[-1]:  # the template leaves the end to the end-of-sequence token
                ids[-1] = (self.tokenizer.eos_token_id,)
            labels = tuple(self._markup_labels(piece, before) for piece, before in zip(ids, ("", *roles), strict=True))
            if len(self._frames) >= _MOST_FRAMES:
                self._frames.clear()
            self._frames[key] = _Frame(roles, tuple(ids), labels, layout.trims)
        return self._frames[key]

    def _markup_labels(self, ids: Ids, role_before: str) -> Ids:
        """Labels of what the template puts behind a content of `role_before`."""
        if self.supervise == "assistant":
            learned = [role_before == "assistant" and i == 0 for i in range(len(ids))]
        else:
            learned = [token in self._special or (i == 0 and role_before != "") for i, token in enumerate(ids)]
            if role_before and len(ids) > 1 and not cast(str, self.tokenizer.decode([ids[1]])).strip("\n"):
                learned[1] = True
        return tuple(token if learn else IGNORE_INDEX for token, learn in zip(ids, learned, strict=True))

    def _forbidden(self) -> frozenset[int]:
        """Ids that no content may become: special tokens, the placeholder, added tokens of the template's headers."""
        turns = self._frame(("user", "assistant", "user"), generation=False).ids
        header = {*turns[0], *turns[2], *self._frame(("user",), generation=True).ids[-1]}
        added = header.intersection(self.tokenizer.added_tokens_decoder)
        image = self._find_image_token()
        return self._special | added | ({image} if image is not None else set())

    def _find_image_token(self) -> int | None:
        ids = map(self.tokenizer.backend_tokenizer.token_to_id, IMAGE_TOKENS)
        return next((i for i in ids if i is not None), None)


class CaptionTemplate:
    """Encodes the last answer of a conversation alone: start token, caption, end token; the images stay beside it.

    Start and end are bos (or cls) and eos (or sep); a tokenizer with neither bos nor cls starts with `<|im_start|>` and
    ends with `<|im_end|>`. The caption and the end token are supervised. There are no image placeholders.
    """

    image_token_id: int | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.start_token_id, self.end_token_id = _caption_ends(tokenizer)
        pad = tokenizer.pad_token_id
        self.pad_token_id = self.end_token_id if pad is None else pad
        self.stop_token_ids = (self.end_token_id,)
        forbidden = special_ids(tokenizer) | {self.start_token_id, self.end_token_id}
        self._encoder = TextEncoder(tokenizer, forbidden)

    def fingerprint(self) -> str:
        """Hex digest of all that decides how a conversation is encoded."""
        return _digest("caption-1", self.tokenizer, self.max_length)

    def encode(self, conversation: Conversation) -> Sample:
        """The caption, cut to max_length tokens with its start and end. Raises RowError if there is not one image."""
        sample = self.encode_many([conversation])[0]
        if isinstance(sample, RowError):
            raise sample
        return sample

    def encode_many(self, conversations: Sequence[Conversation]) -> list[Sample | RowError]:
        """`encode` for many conversations at once; a failure stands in its conversation's place."""
        texts = [c.messages[-1].text for c in conversations]
        encoded = self._encoder.encode_all(texts)
        samples: list[Sample | RowError] = []
        for conversation, text in zip(conversations, texts, strict=True):
            if len(conversation.images) != 1:
                have = f"{len(conversation.images)} images"
                samples.append(
                    RowError(
                        "a caption without its one image",
                        conversation.id,
                        "Give the row one image, or take it out.",
                        have,
                    )
                )
                continue
            caption = (*encoded[text][: self.max_length - 2], self.end_token_id)
            samples.append(Sample((self.start_token_id, *caption), (IGNORE_INDEX, *caption), conversation.images))
        return samples

    def encode_prompt(self, conversation: Conversation) -> Sample:
        """The start token and the images."""
        return Sample((self.start_token_id,), (IGNORE_INDEX,), conversation.images)


def without_images(conversation: Conversation) -> Conversation:
    """The conversation with its images, and the `<Img></Img>` around them, taken out: what a blind model is asked."""

    def blind(message: Message) -> Message:
        text = "".join(p for p in message.parts if isinstance(p, str))
        return replace(message, parts=(text.replace("<Img></Img>", "").lstrip(),))

    return replace(conversation, messages=tuple(map(blind, conversation.messages)))


def _trimmed(parts: Sequence[str | ImageRef], left: bool, right: bool) -> list[str | ImageRef]:
    parts = list(parts)
    if left and parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if right and parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return parts


def _caption_ends(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    start = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if start is None:
        start, end = map(tokenizer.backend_tokenizer.token_to_id, ("<|im_start|>", "<|im_end|>"))
    if start is None or end is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no tokens that begin and end a caption: bos and eos, cls and"
            " sep, or <|im_start|> and <|im_end|>. Choose another tokenizer."
        )
    return start, end


def _digest(version: str, tokenizer: PreTrainedTokenizerFast, *settings: object) -> str:
    named = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    content = repr((version, settings, named)) + tokenizer.backend_tokenizer.to_str()
    return hashlib.sha256(content.encode()).hexdigest()


def ensure_image_token(tokenizer: PreTrainedTokenizerFast) -> None:
    """Add a token for image places if the tokenizer has none.

    It needs no row in the LLM's embedding, as its vectors are replaced.
    """
    if all(tokenizer.backend_tokenizer.token_to_id(token) is None for token in IMAGE_TOKENS):
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<|image_pad|>"]}, replace_extra_special_tokens=False
        )


def image_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Id of the token that holds the place of an image vector.

    Raises DataError if the tokenizer has none that could.
    """
    return ChatTemplate(tokenizer, num_query_token=1).image_token_id
