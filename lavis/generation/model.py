"""A model one can talk to: weights, tokenizer, template and image processor together."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lavis.core.errors import ChatError, DataError
from lavis.core.types import Conversation, MediaRef, Message
from lavis.data.image import EvalImage
from lavis.generation.pictures import Picture
from lavis.generation.settings import GenerationSettings
from lavis.models.llm import context_length
from lavis.tokens.media import MediaSpec
from lavis.tokens.template import ChatTemplate

Pictures = Mapping[str, Picture]


@dataclass(frozen=True)
class Prompt:
    """What the model reads. `keys`: for each token what makes it up, its id or the picture and the place in it; equal
    keys, equal values.

    `pictures` are in reading order; `ends` says for each how many tokens there are up to its last.
    """

    ids: tuple[int, ...]
    keys: tuple[Hashable, ...]
    pictures: tuple[Picture, ...]
    ends: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def pictures_from(self, start: int) -> tuple[Picture, ...]:
        """Those whose tokens are not among the first `start`."""
        return tuple(p for p, end in zip(self.pictures, self.ends, strict=True) if end > start)


@dataclass(frozen=True)
class ChatModel:
    """`model` in eval mode on its devices, with what turns messages and pictures into its input.

    `name` is shown to users. `media` is None for a model that reads text alone.
    """

    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerFast
    media: MediaSpec | None
    device: torch.device

    @property
    def llm(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.model.llm_model)

    @property
    def sees(self) -> bool:
        return self.media is not None

    @property
    def processor(self) -> EvalImage | None:
        """What makes pixels of pictures."""
        return cast("EvalImage | None", self.media and self.media.processor)

    @cached_property
    def template(self) -> ChatTemplate:
        """Never cuts: a prompt that is too long is refused."""
        return ChatTemplate(self.tokenizer, self.media, max_length=1 << 40)

    @cached_property
    def stop_token_ids(self) -> frozenset[int]:
        """Ids that end an answer: the template's, and those that the LLM's makers name."""
        eos = self.llm.generation_config.eos_token_id
        return frozenset(
            {*self.template.stop_token_ids, *(eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos])}
        )

    @cached_property
    def window(self) -> int:
        """Tokens that prompt and answer have together at most."""
        return min(context_length(self.llm), 1 << 20)

    @cached_property
    def defaults(self) -> GenerationSettings:
        """Settings that suit the LLM."""
        return GenerationSettings.of_model(self.llm.generation_config)

    def encode(self, messages: Sequence[Message], pictures: Pictures) -> Prompt:
        """The prompt that asks for an answer to `messages`, whose MediaRefs name `pictures`.

        Raises ChatError if there are images and the model reads none, or the template refuses the order of roles.
        """
        if not messages or messages[-1].role != "user":
            raise ChatError("the last message has to be the user's.")
        conversation = Conversation(tuple(_sized(message, pictures) for message in messages))
        if conversation.images and not self.sees:
            raise ChatError(f"{self.name} reads text only: leave the images out.")
        try:
            sample = self.template.encode_prompt(conversation)
        except DataError as error:
            raise ChatError(str(error)) from error
        keys: list[Hashable] = list(sample.input_ids)
        for span in sample.media:
            key = pictures[span.ref.path].key
            keys[span.start : span.start + span.length] = [(key, i) for i in range(span.length)]
        shown = tuple(pictures[path] for path in sample.images)
        return Prompt(sample.input_ids, tuple(keys), shown, tuple(s.start + s.length for s in sample.media))

    def pixels(self, picture: Picture) -> torch.Tensor:
        """The picture as the tower takes it, [T, 3, S, S]."""
        pixels = self._processed(picture) if picture.pixels is None else picture.pixels
        return pixels.to(self.device)

    def _processed(self, picture: Picture) -> torch.Tensor:
        assert picture.image is not None  # it is left out only where its pixels are kept
        assert self.processor is not None
        return self.processor.tiles(picture.image)

    def prepared(self, picture: Picture) -> Picture:
        """The picture with its pixels, so that the engine's thread need not make them."""
        return (
            picture
            if picture.pixels is not None or not self.sees
            else replace(picture, pixels=self._processed(picture))
        )

    def compact(self, picture: Picture) -> Picture:
        """As `prepared`, without the file and the large image."""
        return replace(self.prepared(picture), image=None, data=b"")

    def embed(self, ids: Sequence[int], features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Input embeddings [1, n, D] of `ids`; features: [T, Q, D] for each picture among them, or [Q, D]."""
        model: Any = self.model
        return model.embed_parts(torch.tensor([ids], device=self.device), _tiles(features) if features else None)


def user_message(text: str, pictures: Sequence[Picture] = ()) -> Message:
    """A user's turn: the pictures, then the text, as in the training data."""
    refs = [MediaRef(p.key, p.size) for p in pictures]
    return Message("user", (*refs, f" {text}") if refs else (text,))


def _sized(message: Message, pictures: Pictures) -> Message:
    parts = (p if isinstance(p, str) else replace(p, size=pictures[p.path].size) for p in message.parts)
    return replace(message, parts=tuple(parts))


def _tiles(features: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([f if f.ndim == 3 else f[None] for f in features])
