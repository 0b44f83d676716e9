"""Requests of OpenAI's chat API: what may stand in them, and what they mean here."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lavis.core.errors import ChatError
from lavis.core.types import MediaRef, Message
from lavis.generation.engine import Answer
from lavis.generation.model import ChatModel, Prompt
from lavis.generation.pictures import Picture
from lavis.generation.settings import LIMITS, GenerationSettings
from lavis.tokens.media import Part, joined

MAX_MESSAGES = 1024
MAX_PARTS = 256
"""Of one message."""
MAX_IMAGES = 32
MAX_CHARACTERS = 1_000_000
"""Of all texts together."""

Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
Zero = Annotated[float, Field(ge=0, le=0)]


class TextPart(BaseModel):
    type: Literal["text"]
    text: Text


class ImageUrl(BaseModel):
    """Where an image is: a data URL."""

    url: str
    detail: str | None = None


class ImagePart(BaseModel):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: (
        Text
        | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(max_length=MAX_PARTS)]
    )

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """The content in parts."""
        return self.content if isinstance(self.content, list) else [TextPart(type="text", text=self.content)]


class StreamOptions(BaseModel):
    """include_usage: a last chunk with the number of tokens."""

    include_usage: bool = False


class TextFormat(BaseModel):
    """The one format of answers there is."""

    type: Literal["text"]


class ChatRequest(BaseModel):
    """Body of /v1/chat/completions.

    Without temperature and top_p answers are greedy; a temperature of 0 is greedy too.
    """

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict, Field(max_length=0)] | None = None
    tools: Annotated[list, Field(max_length=0)] | None = None
    functions: Annotated[list, Field(max_length=0)] | None = None
    response_format: TextFormat | None = None

    def settings(self, defaults: GenerationSettings) -> GenerationSettings:
        """As settings of ours. Raises ChatError for a value out of its limits."""
        values: dict[str, Any] = {
            name: v for name in ("top_p", "top_k", "repetition_penalty") if (v := getattr(self, name)) is not None
        }
        if most := self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens:
            values["max_new_tokens"] = min(most, int(LIMITS["max_new_tokens"][1]))
        elif most == 0:
            raise ChatError("max_tokens=0: give at least 1.")
        if self.temperature is not None or self.top_p is not None:
            values["do_sample"] = self.temperature != 0
        if self.temperature:
            values["temperature"] = self.temperature
        return defaults.with_values(values)

    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer. Raises ChatError for more than four, or long ones."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > 4 or any(not 0 < len(s) <= 200 for s in stops):
            raise ChatError("stop: give at most four texts of 1 to 200 characters.")
        return stops

    def urls(self, chat: ChatModel) -> list[str]:
        """Addresses of the images, each once.

        Raises ChatError if there are more than the model, or this program, reads, or too much text.
        """
        parts = [part for message in self.messages for part in message.parts]
        images = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        if images and not chat.sees:
            raise ChatError(f"{chat.name} reads text only: leave the images out.")
        most = min(MAX_IMAGES, chat.window // (chat.media.tokens_per_tile if chat.media else 1))
        if len(images) > most:
            raise ChatError(f"the request has {len(images)} images; {chat.name} is shown {most} at most.")
        characters = sum(len(part.text) for part in parts if isinstance(part, TextPart))
        if characters > MAX_CHARACTERS:
            raise ChatError(f"the request has {characters:,} characters, more than {MAX_CHARACTERS:,}.")
        return list(dict.fromkeys(images))

    def prompt(self, chat: ChatModel, pictures: Mapping[str, Picture]) -> Prompt:
        """The prompt; pictures: by address.

        Raises ChatError if an image is not the user's, or the order of roles is wrong.
        """
        messages = [_message(message, pictures) for message in self.messages]
        return chat.encode(messages, {picture.key: picture for picture in pictures.values()})


def _message(message: ChatMessage, pictures: Mapping[str, Picture]) -> Message:
    role: Any = "system" if message.role == "developer" else message.role
    pieces: list[Part] = []
    behind_image = False
    for part in message.parts:
        if isinstance(part, TextPart):
            pieces.append(" " + part.text if behind_image and not part.text[:1].isspace() else part.text)
        elif role != "user":
            raise ChatError(f"an image stands in a message of the {role}: only the user can show images.")
        else:
            pieces.append(MediaRef(pictures[part.image_url.url].key))
        behind_image = isinstance(part, ImagePart)
    # texts that follow each other are one, as they are tokenised in training
    return Message(role, tuple(joined(pieces)) or ("",))


class Completion:
    """The answers' envelopes, of one request."""

    def __init__(self, model: str) -> None:
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, reason: str, answer: Answer) -> dict[str, Any]:
        """The one answer of a request that does not stream."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": reason,
            "logprobs": None,
        }
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": usage(answer)}

    def chunk(self, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        """A piece of a stream."""
        return {
            **self.head,
            "object": "chat.completion.chunk",
            "choices": [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}],
        }

    def last_chunk(self, answer: Answer) -> dict[str, Any]:
        """The one with the number of tokens."""
        return {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage(answer)}


def usage(answer: Answer) -> dict[str, Any]:
    """Tokens read and made."""
    read, made = len(answer.prompt), len(answer.ids)
    return {
        "prompt_tokens": read,
        "completion_tokens": made,
        "total_tokens": read + made,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }
