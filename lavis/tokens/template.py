"""Conversation to Sample: the chat template, the label mask and truncation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from lavis.core.errors import DataError
from lavis.core.types import IGNORE_INDEX, Conversation, MediaRef, MediaSpan, Message, RowError, Sample
from lavis.tokens.chat_templates import system_of
from lavis.tokens.layout import chat_template_of, render_template, takes_system
from lavis.tokens.media import MediaSpec, Part
from lavis.tokens.text_encoder import TextEncoder, digest, special_ids

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


class _Segment(NamedTuple):
    """Consecutive tokens of one sort. The system message counts as markup, as a prompt is never shortened there."""

    sort: Literal["markup", "text", "image"]
    ids: Ids
    labels: Ids
    ref: MediaRef | None = None


@dataclass(frozen=True)
class _Frame:
    """Tokens and labels around the contents of messages of these roles, with the trims of the contents.

    before_text: tokens and labels where a text follows, which brings the space between itself and a header.
    """

    roles: tuple[str, ...]
    ids: tuple[Ids, ...]
    labels: tuple[Ids, ...]
    before_text: tuple[tuple[Ids, Ids], ...]
    trims: tuple[tuple[bool, bool], ...]


class _Dialogue(NamedTuple):
    """A conversation about to be tokenised: its frame and the parts of each message, trimmed as the template does."""

    frame: _Frame
    contents: list[list[Part]]

    @property
    def texts(self) -> list[str]:
        return [part for parts in self.contents for part in parts if isinstance(part, str)]


class ChatTemplate:
    """Encodes conversations with the chat template of `tokenizer` (ChatML if it has none).

    The template is rendered once for each sequence of roles; only what it writes itself can become a control token.
    Contents are tokenised by themselves; a picture is a run of placeholder ids, as many as `media` says, in the text of
    the model's media format.

    media: None for a text-only model, which refuses pictures.
    supervise: "assistant" supervises answers and the first token of what the template puts behind them (its end token);
        "markup" also every special token of the template and the newline behind an end token, in every turn, as the
        original did.
    max_length: tokens, images included; what is longer is cut.
    system: system message of conversations without one; none if it is empty or the template takes none. None: the one
        that the template was made for.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        media: MediaSpec | None,
        supervise: str = "assistant",
        max_length: int = 512,
        system: str | None = None,
    ) -> None:
        self.tokenizer, self.media, self.supervise = tokenizer, media, supervise
        self._template = chat_template_of(tokenizer)
        self.max_length, self.system = max_length, system_of(self._template) if system is None else system
        self._takes_system = takes_system(tokenizer, self._template)
        self._special = special_ids(tokenizer)
        self._frames: dict[tuple[tuple[str, ...], bool], _Frame] = {}
        self._encoder = TextEncoder(tokenizer, self._forbidden())

    # ---- tokens the rest of the program asks for

    @cached_property
    def image_token_id(self) -> int:
        """Id that holds the place of an image vector. Raises DataError if there can be none."""
        if self.media is None:
            raise DataError(
                "a row has an image but the model reads text only. Train a model that sees, or drop the images."
            )
        return image_token_id(self.tokenizer)

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
        settings = (self.media and self.media.key(), self.supervise, self.max_length, self.system, self._template)
        bare = ("bare headers",) * self._begins_with_space
        return digest("chat-2", self.tokenizer, *settings, *bare)

    # ---- encoding

    def encode(self, conversation: Conversation) -> Sample:
        """The sample that trains on the answers. Raises RowError if truncation leaves no supervised token."""
        sample = self.encode_many([conversation])[0]
        if isinstance(sample, RowError):
            raise sample
        return sample

    def encode_many(
        self, conversations: Sequence[Conversation], *, last_answer_only: bool = False
    ) -> list[Sample | RowError]:
        """`encode` for many conversations at once, which is faster; a failure stands in its conversation's place.

        `last_answer_only` supervises no earlier answer.
        """
        samples: list[Sample | RowError] = []
        dialogues = [self._dialogue(c, generation=False) for c in conversations]
        encoded = self._encoder.encode_all(text for dialogue in dialogues for text in dialogue.texts)
        for conversation, dialogue in zip(conversations, dialogues, strict=True):
            try:
                segments = self._segments(dialogue, encoded)
                if last_answer_only:
                    segments = _only_last_answer(segments)
                samples.append(self._truncated(segments, conversation))
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
        spans: list[MediaSpan] = []
        for segment in segments:
            cut = min(max(excess, 0), len(segment.ids)) if segment.sort == "text" else 0
            if segment.ref is not None:
                spans.append(self._span(segment, len(ids)))
            ids.extend(segment.ids[: len(segment.ids) - cut])
            excess -= cut
        if excess > 0:
            raise self._too_long(conversation, len(ids))
        return Sample(tuple(ids), (IGNORE_INDEX,) * len(ids), tuple(spans))

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
        contents = [self._content(m.parts, trim) for m, trim in zip(messages, frame.trims, strict=True)]
        return _Dialogue(frame, contents)

    def _content(self, parts: Sequence[Part], trim: tuple[bool, bool]) -> list[Part]:
        return _trimmed(self.media.format.write(parts) if self.media else parts, *trim)

    def _segments(self, dialogue: _Dialogue, encoded: dict[str, list[int]]) -> list[_Segment]:
        frame, segments = dialogue.frame, []
        for i, parts in enumerate(dialogue.contents):
            text_follows = bool(parts) and isinstance(parts[0], str)
            header = frame.before_text[i] if text_follows else (frame.ids[i], frame.labels[i])
            segments.append(_Segment("markup", *header))
            for part in parts:
                if isinstance(part, MediaRef):
                    segments.append(self._picture(part))
                    continue
                ids = tuple(encoded[part])
                labels = ids if frame.roles[i] == "assistant" else (IGNORE_INDEX,) * len(ids)
                segments.append(_Segment("markup" if frame.roles[i] == "system" else "text", ids, labels))
        return [*segments, _Segment("markup", frame.ids[-1], frame.labels[-1])]

    def _picture(self, ref: MediaRef) -> _Segment:
        token = self.image_token_id  # raises where the model reads text only
        assert self.media
        length = self.media.span(ref.size)
        return _Segment("image", (token,) * length, (IGNORE_INDEX,) * length, ref)

    def _span(self, segment: _Segment, start: int) -> MediaSpan:
        assert self.media and segment.ref
        return MediaSpan(segment.ref, start, len(segment.ids), self.media.tiles(segment.ref.size))

    def _truncated(self, segments: Sequence[_Segment], conversation: Conversation) -> Sample:
        """Cut at max_length; if that falls into an image, cut where the image's turn begins."""
        ids: list[int] = []
        labels: list[int] = []
        cut, border = self.max_length, 0
        spans: list[MediaSpan] = []
        for segment in segments:
            end = len(ids) + len(segment.ids)
            if segment.sort == "markup":  # its first token ends a turn, the rest begins the next
                border = min(len(ids), 1) + len(ids)
            elif segment.ref is not None:
                spans.append(self._span(segment, len(ids)))
                cut = border if len(ids) < cut < end else cut
            ids.extend(segment.ids)
            labels.extend(segment.labels)
        labels[0] = IGNORE_INDEX  # nothing predicts the first token
        whole = tuple(span for span in spans if span.start + span.length <= cut)
        sample = Sample(tuple(ids[:cut]), tuple(labels[:cut]), whole)
        if not sample.supervised_tokens:
            raise self._too_long(conversation, len(ids))
        return sample

    def _too_long(self, conversation: Conversation, length: int) -> RowError:
        detail = f"{length} tokens, model.max_length is {self.max_length}"
        fix = "Raise model.max_length or shorten the row."
        return RowError("no supervised token left after truncation", conversation.id, fix, detail)

    # ---- the template's own tokens

    def _frame(self, roles: tuple[str, ...], generation: bool) -> _Frame:
        key = (roles, generation)
        if key not in self._frames:
            layout = render_template(self.tokenizer, self._template, roles, generation=generation)
            ids = self._markup_ids(layout.texts)
            # "USER: " and "Hello", encoded apart, would have two spaces where every text begins with one
            bare = self._markup_ids([t.removesuffix(" ") for t in layout.texts]) if self._begins_with_space else ids
            if roles[-1] == "assistant" and not ids[-1]:  # the template leaves the end to the end-of-sequence token
                ids[-1] = (self.tokenizer.eos_token_id,)
            before = ("", *roles)
            labels, bare_labels = (tuple(map(self._markup_labels, pieces, before)) for pieces in (ids, bare))
            if len(self._frames) >= _MOST_FRAMES:
                self._frames.clear()
            self._frames[key] = _Frame(
                roles, tuple(ids), labels, tuple(zip(bare, bare_labels, strict=True)), layout.trims
            )
        return self._frames[key]

    def _markup_ids(self, texts: Sequence[str]) -> list[Ids]:
        pieces = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=False)
        return [tuple(piece) for piece in pieces["input_ids"]]

    @cached_property
    def _begins_with_space(self) -> bool:
        """Whether the tokenizer reads `word` as ` word`, as those of SentencePiece do."""
        return len(set(self._markup_ids(["word", " word"]))) == 1

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
        image = find_image_token(self.tokenizer)
        return self._special | added | ({image} if image is not None else set())


def without_images(conversation: Conversation) -> Conversation:
    """The conversation with its pictures taken out: what a blind model is asked."""

    def blind(message: Message) -> Message:
        return replace(message, parts=(message.words.lstrip(),))

    return replace(conversation, messages=tuple(map(blind, conversation.messages)))


def _only_last_answer(segments: Sequence[_Segment]) -> list[_Segment]:
    """Without the labels of what stands before the last message; its contents follow the last markup but one."""
    last = max(i for i, segment in enumerate(segments[:-1]) if segment.sort == "markup")
    masked = [s._replace(labels=(IGNORE_INDEX,) * len(s.ids)) for s in segments[: last + 1]]
    return [*masked, *segments[last + 1 :]]


def _trimmed(parts: Sequence[Part], left: bool, right: bool) -> list[Part]:
    parts = list(parts)
    if left and parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if right and parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return parts


def find_image_token(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Id of the first of IMAGE_TOKENS that the tokenizer has."""
    ids = map(tokenizer.backend_tokenizer.token_to_id, IMAGE_TOKENS)
    return next((i for i in ids if i is not None), None)


def image_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Id of the token that holds the place of an image vector. Raises DataError if the tokenizer has none."""
    token = find_image_token(tokenizer)
    if token is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has none of the tokens that can hold an image's place: "
            f"{', '.join(IMAGE_TOKENS)}. Add one of them to its special tokens."
        )
    return token


def ensure_image_token(tokenizer: PreTrainedTokenizerFast) -> None:
    """Add a token for image places if the tokenizer has none.

    It needs no row in the LLM's embedding, as its vectors are replaced.
    """
    if find_image_token(tokenizer) is None:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<|image_pad|>"]}, replace_extra_special_tokens=False
        )
