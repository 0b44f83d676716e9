"""`lavis serve`: OpenAI's chat API over an engine. Requests that come together are answered together."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lavis.core.errors import BusyError, ChatError, LavisError
from lavis.generation.engine import Answer, Engine
from lavis.generation.model import ChatModel, Prompt
from lavis.generation.pictures import MAX_BYTES, Picture, picture_from_url, read_picture
from lavis.serve.protocol import ChatRequest, Completion
from lavis.serve.text import TextStream

log = logging.getLogger(__name__)

CHAT_PATH = "/v1/chat/completions"
MAX_BODY = 32 << 20
"""Largest request, bytes."""
PREPARED_AT_ONCE = 4
"""Requests whose images are decoded at the same time: what bounds the memory they take."""
FETCHED_AT_ONCE = 16
FETCH_SECONDS = 10.0
"""For all images of a request."""


class Metrics:
    """What /metrics tells. Gauges read the engine when they are asked."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("lavis_requests", "Chat requests by HTTP status.", ["status"], registry=self.registry)
        self.tokens = Counter(
            "lavis_tokens",
            "Tokens: of prompts, of those the ones not read again, and generated.",
            ["kind"],
            registry=self.registry,
        )
        self.first = Histogram(
            "lavis_first_token_seconds", "From the request to its first token.", registry=self.registry
        )
        self.whole = Histogram(
            "lavis_request_seconds", "From the request to the end of its answer.", registry=self.registry
        )
        for name, about, read in (
            ("lavis_answers_running", "Answers being decoded.", lambda: engine.load[0]),
            ("lavis_questions_waiting", "Questions that wait.", lambda: engine.load[1]),
            ("lavis_stored_bytes", "Keys and values of conversations that may go on.", lambda: engine.store.num_bytes),
        ):
            Gauge(name, about, registry=self.registry).set_function(read)

    def count(self, answer: Answer) -> None:
        """Add an answer's tokens."""
        for kind, n in (
            ("prompt", len(answer.prompt)),
            ("cached", answer.cached_tokens),
            ("generated", len(answer.ids)),
        ):
            self.tokens.labels(kind).inc(n)


class Guard:
    """What is decided before a request is read: the key, its size, and whether there is room. Counts chat requests by
    status.

    `most_bytes` holds also for requests that do not say their size. Of chat requests no more than `most_open` are open
    at a time.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, api_key: str | None, most_open: int, most_bytes: int = MAX_BODY
    ) -> None:
        self.app, self.metrics, self.most_open, self.most_bytes = app, metrics, most_open, most_bytes
        self.key = api_key.encode() if api_key else None
        self.open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, seen, chats = False, 0, scope["path"] == CHAT_PATH

        async def counted_receive() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.most_bytes:
                raise HTTPException(413, self._too_large)
            return message

        async def counted_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if chats:
                    self.metrics.requests.labels(str(message["status"])).inc()
            await send(message)

        if refusal := self._refusal(scope, chats):
            await refusal(scope, receive, counted_send)
            return
        self.open += chats
        try:
            await self.app(scope, counted_receive, counted_send)
        except Exception as error:
            log.error("a request failed", exc_info=error)
            if not started:
                await _error(500, f"the server failed ({type(error).__name__}); its log says more.")(
                    scope, receive, counted_send
                )
        finally:
            self.open -= chats

    def _refusal(self, scope: Scope, chats: bool) -> Response | None:
        headers = dict(scope["headers"])
        if self.key and scope["path"].startswith("/v1"):
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not hmac.compare_digest(given, self.key):
                return _error(401, "the API key is missing or wrong: send it as `Authorization: Bearer KEY`.")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.most_bytes:
            return _error(413, self._too_large)
        if chats and self.open >= self.most_open:
            return _error(429, f"{self.open} requests are open already: try again later.", headers={"Retry-After": "1"})
        return None

    @property
    def _too_large(self) -> str:
        return f"the request has more than {self.most_bytes >> 20} MiB: send smaller images."


def build_app(engine: Engine, *, api_key: str | None = None, image_hosts: tuple[str, ...] = ()) -> FastAPI:
    """The API over `engine`.

    With `api_key`, /v1 wants it as a bearer token; images are fetched from `image_hosts` alone.
    """
    app = FastAPI(title="lavis", docs_url=None, redoc_url=None, openapi_url=None)
    metrics, prompts = Metrics(engine), PromptBuilder(engine.chat, image_hosts)
    app.add_middleware(Guard, metrics=metrics, api_key=api_key, most_open=engine.max_batch + engine.max_waiting)
    name, started = engine.chat.name, int(time.time())
    card = {"id": name, "object": "model", "created": started, "owned_by": "lavis"}

    @app.get("/health")
    async def health() -> Response:
        alive = engine.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model}")
    async def model(model: str) -> dict[str, Any]:
        if model != name:
            raise HTTPException(404, f"there is no model {model[:100]!r}; this is {name!r}.")
        return card

    @app.post(CHAT_PATH)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await _Exchange(engine, metrics, body, request).answer(body, prompts)

    _add_error_handlers(app)
    return app


class PromptBuilder:
    """Makes prompts of requests: images first.

    Few at a time decode images, which bounds their memory; text waits for nobody.
    """

    def __init__(self, chat: ChatModel, image_hosts: tuple[str, ...]) -> None:
        self.chat, self.image_hosts = chat, image_hosts
        self.decoding, self.fetching, self.encoding = map(
            CapacityLimiter, (PREPARED_AT_ONCE, FETCHED_AT_ONCE, PREPARED_AT_ONCE)
        )

    async def build(self, body: ChatRequest) -> Prompt:
        """The prompt of a request. Raises ChatError for what can't be read."""
        pictures: dict[str, Picture] = {}
        deadline = time.monotonic() + FETCH_SECONDS
        for url in body.urls(self.chat):
            data = None
            if url.startswith(("http://", "https://")):
                data = await run_sync(fetch, url, self.image_hosts, deadline, limiter=self.fetching)
            pictures[url] = await run_sync(self._decode, url, data, limiter=self.decoding)
        return await run_sync(body.prompt, self.chat, pictures, limiter=self.encoding)

    def _decode(self, url: str, data: bytes | None) -> Picture:
        return self.chat.compact(picture_from_url(url) if data is None else read_picture(data))


class _Exchange:
    """One request and its answer."""

    def __init__(self, engine: Engine, metrics: Metrics, body: ChatRequest, request: Request) -> None:
        self.engine, self.metrics, self.started = engine, metrics, time.perf_counter()
        self.gone = request.is_disconnected
        self.tokens: asyncio.Queue[int | None] = asyncio.Queue()
        self.text = TextStream(engine.chat.tokenizer, body.stops())
        self.completion = Completion(engine.chat.name)
        self.with_usage = bool(body.stream_options and body.stream_options.include_usage)

    async def answer(self, body: ChatRequest, prompts: PromptBuilder) -> Response:
        chat, stream = self.engine.chat, body.stream
        if body.model not in (None, "", "default", chat.name):
            raise HTTPException(404, f"there is no model {body.model[:100]!r}; this is {chat.name!r}.")
        settings, seed = body.settings(chat.defaults), 42 if body.seed is None else body.seed
        prompt = await prompts.build(body)
        body.messages.clear()  # megabytes of images, while it waits
        loop = asyncio.get_running_loop()
        self.pending = self.engine.submit(
            prompt, settings, seed=seed, sink=lambda token: loop.call_soon_threadsafe(self.tokens.put_nowait, token)
        )
        if not stream:
            return await self._whole()
        return StreamingResponse(
            self._stream(await self._first()), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    async def _first(self) -> int | None:
        """The first token: what fails before it has a status of its own."""
        watch = asyncio.create_task(self._watch())
        try:
            token = await self.tokens.get()
        except asyncio.CancelledError:
            self.pending.cancel()
            raise
        finally:
            watch.cancel()
        self._raise()
        return token

    async def _pieces(self, token: int | None) -> AsyncGenerator[str, None]:
        """The answer's text, from its first token on."""
        if token is not None:
            self.metrics.first.observe(time.perf_counter() - self.started)
        try:
            while token is not None:
                if piece := self.text.add(token):
                    yield piece
                if self.text.stopped:
                    break
                token = await self.tokens.get()
            self._raise()
            if piece := self.text.finish():
                yield piece
        finally:
            self.pending.cancel()
            self.metrics.count(self.pending)
            self.metrics.whole.observe(time.perf_counter() - self.started)

    async def _whole(self) -> Response:
        watch = asyncio.create_task(self._watch())
        try:
            async for _ in self._pieces(await self.tokens.get()):
                pass
        finally:
            self.pending.cancel()
            watch.cancel()
        return JSONResponse(self.completion.whole(self.text.text, self._reason(), self.pending))

    async def _stream(self, first: int | None) -> AsyncIterator[str]:
        yield _event(self.completion.chunk({"role": "assistant", "content": ""}))
        try:
            async with contextlib.aclosing(self._pieces(first)) as pieces:
                async for piece in pieces:
                    yield _event(self.completion.chunk({"content": piece}))
        except LavisError as error:
            yield _event(_error_body(500, str(error)))
            return
        yield _event(self.completion.chunk({}, self._reason()))
        if self.with_usage:
            yield _event(self.completion.last_chunk(self.pending))
        yield "data: [DONE]\n\n"

    async def _watch(self) -> None:
        """Cancel the answer when the client goes away."""
        while not await self.gone():
            await asyncio.sleep(0.2)
        self.pending.cancel()

    def _raise(self) -> None:
        if self.pending.error is not None:
            raise ModelError(str(self.pending.error))

    def _reason(self) -> str:
        return "length" if self.pending.finish_reason == "length" and not self.text.stopped else "stop"


class ModelError(ChatError):
    """The model failed at a request that was right."""


def fetch(url: str, hosts: tuple[str, ...], deadline: float) -> bytes:
    """The file at an http(s) address on one of `hosts` (`name`, or `name:port` for another port than 80 and 443), until
    `deadline` (time.monotonic).

    Raises ChatError for another address, one that redirects, compresses, or sends too much or too slowly.
    """
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ChatError("an image's address is none: give a data URL, data:image/png;base64,...") from error
    place = address.host if address.port in (None, 80, 443) else f"{address.host}:{address.port}"
    if place not in hosts or address.userinfo:
        raise ChatError("images are not fetched from http addresses here: give a data URL, data:image/png;base64,...")
    data, plain = bytearray(), {"Accept-Encoding": "identity"}
    try:
        with (
            httpx.Client(timeout=FETCH_SECONDS, trust_env=False, headers=plain) as client,
            client.stream("GET", address) as response,
        ):
            response.raise_for_status()
            if response.has_redirect_location or response.headers.get("content-encoding", "identity") != "identity":
                raise ChatError(f"the image at {place} is not sent as it is.")
            for piece in response.iter_raw():
                data += piece
                if len(data) > MAX_BYTES or time.monotonic() > deadline:
                    raise ChatError(
                        f"the image at {place} has more than {MAX_BYTES >> 20} MiB or takes more than"
                        f" {FETCH_SECONDS:.0f} s."
                    )
    except httpx.HTTPError as error:
        raise ChatError(f"the image at {place} could not be fetched.") from error
    return bytes(data)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = next(iter(error.errors()))
        where = ".".join(str(part) for part in first["loc"][1:])
        return _error(400, f"{where + ': ' if where else ''}{first['msg']}", param=where or None)

    @app.exception_handler(StarletteHTTPException)
    async def http(request: Request, error: StarletteHTTPException) -> Response:
        return _error(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(LavisError)
    async def refused(request: Request, error: LavisError) -> Response:
        if isinstance(error, BusyError):
            return _error(429, str(error), headers={"Retry-After": "1"})
        return _error(500 if isinstance(error, ModelError) else 400, str(error))


def _error(status: int, message: str, *, param: str | None = None, headers: Any = None) -> Response:
    return JSONResponse(_error_body(status, message, param), status, headers=headers)


def _error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def serve(app: FastAPI, host: str, port: int) -> None:
    """Answer requests until the process is told to stop."""
    import uvicorn

    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.run(app, host=host, port=port, log_level="warning", timeout_keep_alive=30, timeout_graceful_shutdown=10)
