"""`lavis serve`: OpenAI's chat API over an engine. Requests that come together are answered together."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import httpx
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lavis.chat.engine import Answer, Engine
from lavis.chat.pictures import MAX_BYTES, Picture, picture_from_url, read_picture
from lavis.chat.protocol import ChatRequest, Completion
from lavis.chat.text import TextStream
from lavis.common.errors import BusyError, ChatError, LavisError

log = logging.getLogger(__name__)

CHAT_PATH = "/v1/chat/completions"
MAX_BODY = 32 << 20
"""Largest request, bytes."""
PREPARED_AT_ONCE = 4
"""Requests whose images are decoded at the same time: what bounds the memory they take."""
FETCH_SECONDS = 10.0


class Metrics:
    """What /metrics tells. Gauges read the engine when they are asked."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("lavis_requests", "Chat requests by HTTP status.", ["status"], registry=self.registry)
        self.tokens = Counter("lavis_tokens", "Tokens: of prompts, of those the ones not read again, and generated.", ["kind"], registry=self.registry)
        self.first = Histogram("lavis_first_token_seconds", "From the request to its first token.", registry=self.registry)
        self.whole = Histogram("lavis_request_seconds", "From the request to the end of its answer.", registry=self.registry)
        for name, about, read in (
            ("lavis_answers_running", "Answers being decoded.", lambda: engine.load[0]),
            ("lavis_questions_waiting", "Questions that wait.", lambda: engine.load[1]),
            ("lavis_stored_bytes", "Keys and values of conversations that may go on.", lambda: engine.store.num_bytes),
        ):
            Gauge(name, about, registry=self.registry).set_function(read)

    def count(self, answer: Answer) -> None:
        """Add an answer's tokens."""
        for kind, n in (("prompt", len(answer.prompt)), ("cached", answer.cached_tokens), ("generated", len(answer.ids))):
            self.tokens.labels(kind).inc(n)


class Guard:
    """Refuses requests of more than `most` bytes with 413, also when they do not say so beforehand, and counts chat requests by status."""

    def __init__(self, app: ASGIApp, metrics: Metrics, most: int = MAX_BODY) -> None:
        self.app, self.metrics, self.most = app, metrics, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        seen = 0

        async def counted_receive() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.most:
                raise HTTPException(413, self._too_large)
            return message

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["path"] == CHAT_PATH:
                self.metrics.requests.labels(str(message["status"])).inc()
            await send(message)

        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) <= self.most:
            await self.app(scope, counted_receive, counted_send)
        else:
            await _error(413, self._too_large)(scope, receive, counted_send)

    @property
    def _too_large(self) -> str:
        return f"the request has more than {self.most >> 20} MiB: send smaller images."


def build_app(engine: Engine, *, api_key: str | None = None, image_hosts: tuple[str, ...] = ()) -> FastAPI:
    """The API over `engine`. With `api_key`, /v1 wants it as a bearer token; images are fetched from `image_hosts` alone."""
    app = FastAPI(title="lavis", docs_url=None, redoc_url=None, openapi_url=None)
    metrics, gate = Metrics(engine), asyncio.Semaphore(PREPARED_AT_ONCE)
    app.add_middleware(Guard, metrics=metrics)
    name, started = engine.chat.name, int(time.time())
    allowed = [Depends(partial(_check_key, api_key))] if api_key else []
    card = {"id": name, "object": "model", "created": started, "owned_by": "lavis"}

    @app.get("/health")
    async def health() -> Response:
        alive = engine.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", dependencies=allowed)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model}", dependencies=allowed)
    async def model(model: str) -> dict[str, Any]:
        if model != name:
            raise HTTPException(404, f"there is no model {model[:100]!r}; this is {name!r}.")
        return card

    @app.post(CHAT_PATH, dependencies=allowed)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await _Exchange(engine, metrics, body, request, time.perf_counter()).answer(gate, image_hosts)

    _add_error_handlers(app)
    return app


class _Exchange:
    """One request and its answer."""

    def __init__(self, engine: Engine, metrics: Metrics, body: ChatRequest, request: Request, started: float) -> None:
        self.engine, self.metrics, self.body, self.request, self.started = engine, metrics, body, request, started
        self.tokens: asyncio.Queue[int | None] = asyncio.Queue()
        self.text = TextStream(engine.chat.tokenizer, body.stops())
        self.completion = Completion(engine.chat.name)

    async def answer(self, gate: asyncio.Semaphore, image_hosts: tuple[str, ...]) -> Response:
        body, chat = self.body, self.engine.chat
        if body.model not in (None, "", "default", chat.name):
            raise HTTPException(404, f"there is no model {body.model[:100]!r}; this is {chat.name!r}.")
        settings = body.settings(chat.defaults)
        async with gate:
            prompt = await asyncio.to_thread(body.prompt, chat, partial(open_image, hosts=image_hosts))
        loop = asyncio.get_running_loop()
        seed = 42 if body.seed is None else body.seed
        self.pending = self.engine.submit(prompt, settings, seed=seed, sink=lambda token: loop.call_soon_threadsafe(self.tokens.put_nowait, token))
        if body.stream:
            first = await self._first()
            return StreamingResponse(self._stream(first), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return await self._whole()

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

    async def _pieces(self, token: int | None) -> AsyncIterator[str]:
        """The answer's text, from its first token on."""
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
            async for piece in self._pieces(first):
                yield _event(self.completion.chunk({"content": piece}))
        except LavisError as error:
            yield _event(_error_body(500, str(error)))
            return
        yield _event(self.completion.chunk({}, self._reason()))
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield _event(self.completion.last_chunk(self.pending))
        yield "data: [DONE]\n\n"

    async def _watch(self) -> None:
        """Cancel the answer when the client goes away."""
        while not await self.request.is_disconnected():
            await asyncio.sleep(0.2)
        self.pending.cancel()

    def _raise(self) -> None:
        if self.pending.error is not None:
            raise ModelError(str(self.pending.error))

    def _reason(self) -> str:
        return "length" if self.pending.finish_reason == "length" and not self.text.stopped else "stop"


class ModelError(ChatError):
    """The model failed at a request that was right."""


def open_image(url: str, hosts: tuple[str, ...]) -> Picture:
    """The picture at a data URL, or at an http(s) address on one of `hosts`. Raises ChatError for any other."""
    if not url.startswith(("http://", "https://")):
        return picture_from_url(url)
    try:
        host = httpx.URL(url).host
    except httpx.InvalidURL as error:
        raise ChatError("an image's address is none: give a data URL, data:image/png;base64,...") from error
    if host not in hosts:
        raise ChatError("images are not fetched from http addresses here: give a data URL, data:image/png;base64,...")
    try:
        with httpx.Client(timeout=FETCH_SECONDS, follow_redirects=False) as client, client.stream("GET", url) as response:
            response.raise_for_status()
            data = b""
            for piece in response.iter_bytes():
                data += piece
                if len(data) > MAX_BYTES:
                    raise ChatError(f"the image at {host} has more than {MAX_BYTES >> 20} MiB. Make it smaller.")
    except httpx.HTTPError as error:
        raise ChatError(f"the image at {host} could not be fetched: {type(error).__name__}.") from error
    return read_picture(data)


def _check_key(api_key: str, request: Request) -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not hmac.compare_digest(given.encode(), api_key.encode()):
        raise HTTPException(401, "the API key is missing or wrong: send it as `Authorization: Bearer KEY`.")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
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

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return _error(500, f"the server failed ({type(error).__name__}); its log says more.")


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
