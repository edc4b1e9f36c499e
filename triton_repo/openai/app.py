"""The HTTP side: routes, bodies, streams of events, and clients that go away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from triton_repo.openai import fields, requests
from triton_repo.openai.answers import ChatShape, CompletionShape, Shape, whole
from triton_repo.openai.errors import ApiError
from triton_repo.openai.events import EventStream
from triton_repo.openai.models import MODEL, Model
from triton_repo.openai.prompts import Prompt, Prompts
from triton_repo.openai.requests import ChatRequest, CompletionRequest
from triton_repo.openai.upstream import RETRY_AFTER_S, Upstream

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Frontend:
    """What the routes share: the model's name for clients, and what answers.

    Bounds: `max_body` bytes, `body_s` seconds for a body to arrive, `max_requests` at once.
    """

    name: str
    model: Model
    prompts: Prompts
    upstream: Upstream
    max_body: int = 4 * 2**20
    body_s: float = 30.0
    max_requests: int = 1024
    created: int = field(default_factory=lambda: int(time.time()))

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/health", self.health),
        ]
        handlers: dict[Any, Any] = {
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            Exception: _internal_error,
        }
        bounded = Middleware(_Bounded, max_requests=self.max_requests)
        return Starlette(routes=routes, exception_handlers=handlers, middleware=[bounded])

    async def completions(self, request: Request) -> Response:
        asked = requests.completion(fields.parse(await self._body(request)))
        return await self._answer(request, asked)

    async def chat(self, request: Request) -> Response:
        asked = requests.chat(fields.parse(await self._body(request)))
        return await self._answer(request, asked)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def one_model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._described())

    async def health(self, request: Request) -> Response:
        """200 where Triton can serve the model."""
        if not await self.upstream.ready(MODEL):
            raise ApiError(503, f"{self.upstream.address}: Triton is not ready", retry_after_s=RETRY_AFTER_S)
        return JSONResponse({"status": "ok"})

    async def _body(self, request: Request) -> bytes:
        """The bytes of a request. Raises ApiError where they are too many, or come too slowly."""
        try:
            return await asyncio.wait_for(self._read(request), self.body_s)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self.body_s:g} s") from None

    async def _read(self, request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.max_body:
                raise ApiError(413, f"the body is longer than {self.max_body} bytes", code="body_too_large")
        return bytes(body)

    async def _answer(self, request: Request, asked: CompletionRequest | ChatRequest) -> Response:
        options = asked.options
        self._check_name(options.model)
        prompt = await asyncio.to_thread(self.prompts.of, asked)
        limit = self.prompts.max_tokens(prompt, options.max_tokens)
        pieces, shape = self.model.answer(prompt, options, limit), self._shape(asked, prompt)
        if not options.stream:
            answer = whole(pieces, shape, len(prompt.ids))
            return JSONResponse(await _while_connected(request, answer))
        first = await _while_connected(request, pieces.__anext__())  # what fails before it has a status
        return EventStream(first, pieces, shape, len(prompt.ids) if options.include_usage else None)

    def _shape(self, asked: CompletionRequest | ChatRequest, prompt: Prompt) -> Shape:
        log_probs = asked.options.log_probs
        if isinstance(asked, ChatRequest):
            return ChatShape(model=self.name, log_probs=log_probs)
        echo = self.prompts.shown(prompt) if asked.echo else ""
        return CompletionShape(model=self.name, log_probs=log_probs, echo=echo)

    def _check_name(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                404,
                f"model: no {fields.shown(name)} here; /v1/models says {self.name}",
                param="model",
                code="model_not_found",
            )

    def _described(self) -> dict[str, Any]:
        """As OpenAI's API, and with what vLLM's has more."""
        longest = self.prompts.limits.max_seq_len
        named = {"id": self.name, "object": "model", "created": self.created, "owned_by": "ffn-fusion"}
        return {**named, "max_model_len": longest}


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Bounded:
    """Answers at once when there are `max_requests` already: what is accepted holds memory."""

    def __init__(self, app: ASGIApp, max_requests: int) -> None:
        self.app, self.max_requests, self.running = app, max_requests, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if self.running >= self.max_requests:
            error = ApiError(
                429, f"{self.running} requests run already; try again later", retry_after_s=RETRY_AFTER_S
            )
            await _response(error)(scope, receive, send)
            return
        self.running += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.running -= 1


def _response(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers())


async def _api_error(request: Request, error: ApiError) -> Response:
    return _response(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    """No such path, or not this method."""
    told = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(told.body(), told.status, error.headers)


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    """Nobody reads this."""
    return Response(status_code=499)


async def _internal_error(request: Request, error: Exception) -> Response:
    """The traceback is logged."""
    return _response(ApiError(500, f"the front end failed: {type(error).__name__}"))
