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
from lavis.core.types import Conversation, ImageRef, Message
from lavis.data.image import EvalImage
from lavis.generation.pictures import Picture
from lavis.generation.settings import GenerationSettings
from lavis.models.llm import context_length
from lavis.tokens.template import ChatTemplate

Pictures = Mapping[str, Picture]


@dataclass(frozen=True)
class Prompt:
    """What the model reads. `keys`: for each token what makes it up, its id or the picture and the place in it; equal
    keys, equal values.

    `pictures` are in reading order.
    """

    ids: tuple[int, ...]
    keys: tuple[Hashable, ...]
    pictures: tuple[Picture, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class ChatModel:
    """`model` in eval mode on its devices, with what turns messages and pictures into its input.

    `name` is what users are shown.
    """

    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerFast
    num_query_token: int
    processor: EvalImage
    device: torch.device

    @property
    def llm(self) -> PreTrainedModel:
        """The LLM in it."""
        return cast(PreTrainedModel, self.model.llm_model)

    @property
    def sees(self) -> bool:
        """Whether it reads images."""
        return self.num_query_token > 0

    @cached_property
    def template(self) -> ChatTemplate:
        """Never cuts: a prompt that is too long is refused."""
        return ChatTemplate(self.tokenizer, self.num_query_token, max_length=1 << 40)

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
        """The prompt that asks for an answer to `messages`, whose ImageRefs name `pictures`.

        Raises ChatError if there are images and the model reads none, or the template refuses the order of roles.
        """
        if not messages or messages[-1].role != "user":
            raise ChatError("the last message has to be the user's.")
        conversation = Conversation(tuple(messages))
        if conversation.images and not self.sees:
            raise ChatError(f"{self.name} reads text only: leave the images out.")
        try:
            sample = self.template.encode_prompt(conversation)
        except DataError as error:
            raise ChatError(str(error)) from error
        shown = tuple(pictures[key] for key in sample.images)
        places = ((picture.key, i) for picture in shown for i in range(self.num_query_token))
        image = self.template.image_token_id if shown else None
        keys = tuple(next(places) if token == image else token for token in sample.input_ids)
        return Prompt(sample.input_ids, keys, shown)

    def pixels(self, picture: Picture) -> torch.Tensor:
        """The picture as the tower takes it, [1, 3, S, S]."""
        pixels = self._processed(picture) if picture.pixels is None else picture.pixels
        return pixels[None].to(self.device)

    def _processed(self, picture: Picture) -> torch.Tensor:
        assert picture.image is not None  # it is left out only where its pixels are kept
        return self.processor(picture.image)

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
        """Input embeddings [1, n, D] of `ids`; features: [Q, D_qformer] for each picture among them."""
        model: Any = self.model
        return model.embed_parts(
            torch.tensor([ids], device=self.device), torch.stack(list(features)) if features else None
        )


def user_message(text: str, pictures: Sequence[Picture] = ()) -> Message:
    """A user's turn: the pictures, then the text, as in the training data."""
    images = [part for p in pictures for part in ("<Img>", ImageRef(p.key), "</Img>")]
    return Message("user", (*images[:-1], f"</Img> {text}") if images else (text,))
