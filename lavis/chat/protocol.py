"""Requests of OpenAI's chat API: what may stand in them, and what they mean here."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lavis.chat.engine import Answer
from lavis.chat.model import ChatModel, Prompt
from lavis.chat.pictures import Picture
from lavis.chat.settings import LIMITS, GenerationSettings
from lavis.common.errors import ChatError
from lavis.datasets.types import ImageRef, Message

MAX_MESSAGES = 1024
MAX_CHARACTERS = 1_000_000
"""Of one text."""

Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
Open = Callable[[str], Picture]


class TextPart(BaseModel):
    """Text of a message."""

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
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class StreamOptions(BaseModel):
    """include_usage: a last chunk with the number of tokens."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """Body of /v1/chat/completions. Without temperature and top_p answers are greedy; a temperature of 0 is greedy too."""

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
    tools: None = None
    response_format: None = None

    def settings(self, defaults: GenerationSettings) -> GenerationSettings:
        """As settings of ours. Raises ChatError for a value out of its limits."""
        values: dict[str, Any] = {name: v for name in ("top_p", "top_k", "repetition_penalty") if (v := getattr(self, name)) is not None}
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

    def prompt(self, chat: ChatModel, open_picture: Open) -> Prompt:
        """The prompt. Raises ChatError for an image that can't be read, one that is not the user's, or more than the model can see."""
        images = sum(isinstance(p, ImagePart) for m in self.messages if isinstance(m.content, list) for p in m.content)
        if images and not chat.sees:
            raise ChatError(f"{chat.name} reads text only: leave the images out.")
        if images * chat.num_query_token > chat.window:
            raise ChatError(f"{images} images of {chat.num_query_token} tokens each are more than {chat.name} reads, {chat.window} tokens.")
        pictures: dict[str, Picture] = {}
        messages = [_message(m, pictures, lambda url: chat.compact(open_picture(url))) for m in self.messages]
        return chat.encode(messages, pictures)


def _message(message: ChatMessage, pictures: dict[str, Picture], open_picture: Open) -> Message:
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return Message(role, (message.content,))
    parts: list[str | ImageRef] = []
    for part in message.content:
        if isinstance(part, TextPart):
            gap = " " if parts and parts[-1] == "</Img>" and not part.text[:1].isspace() else ""
            parts.append(gap + part.text)
            continue
        if role != "user":
            raise ChatError(f"an image stands in a message of the {role}: only the user can show images.")
        picture = open_picture(part.image_url.url)
        pictures[picture.key] = picture
        parts += ["<Img>", ImageRef(picture.key), "</Img>"]
    return Message(role, tuple(_merged(parts)))


def _merged(parts: list[str | ImageRef]) -> list[str | ImageRef]:
    """Texts that follow each other as one, as they are tokenised in training."""
    merged: list[str | ImageRef] = []
    for part in parts:
        if merged and isinstance(part, str) and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    return merged


class Completion:
    """The answers' envelopes, of one request."""

    def __init__(self, model: str) -> None:
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, reason: str, answer: Answer) -> dict[str, Any]:
        """The one answer of a request that does not stream."""
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason, "logprobs": None}
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": usage(answer)}

    def chunk(self, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        """A piece of a stream."""
        return {**self.head, "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]}

    def last_chunk(self, answer: Answer) -> dict[str, Any]:
        """The one with the number of tokens."""
        return {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage(answer)}


def usage(answer: Answer) -> dict[str, Any]:
    """Tokens read and made."""
    read, made = len(answer.prompt), len(answer.ids)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made, "prompt_tokens_details": {"cached_tokens": answer.cached_tokens}}
