"""A stream of server-sent events, which ends its work when the client goes."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from triton_repo.openai.answers import Shape, usage
from triton_repo.openai.continuation import Piece
from triton_repo.openai.errors import ApiError

Pieces = AsyncGenerator[Piece, None]


class EventStream(StreamingResponse):
    """`first` and the rest of an answer as chunks; `prompt_tokens` asks for the count of tokens at the end.

    A piece is only taken once the client's socket has taken the one before. An error that comes now is an
    event, after which nothing follows.
    """

    def __init__(self, first: Piece, pieces: Pieces, shape: Shape, prompt_tokens: int | None) -> None:
        self._pieces = pieces
        self._events = _events(first, pieces, shape, prompt_tokens)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events, media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._pieces), aclosing(self._events):
            await super().__call__(scope, receive, send)


async def _events(
    first: Piece, pieces: Pieces, shape: Shape, prompt_tokens: int | None
) -> AsyncGenerator[bytes, None]:
    no_usage = {} if prompt_tokens is None else {"usage": None}
    for chunk in shape.opening():
        yield _event({**chunk, **no_usage})
    count = 0
    try:
        async for piece in _with_first(first, pieces):
            count += piece.num_tokens
            if piece.text or piece.tokens or piece.finish_reason:
                yield _event({**shape.chunk(piece), **no_usage})
    except ApiError as error:
        yield _event(error.body())
        return
    if prompt_tokens is not None:
        yield _event(shape.counted(usage(prompt_tokens, count)))
    yield b"data: [DONE]\n\n"


async def _with_first(first: Piece, rest: Pieces) -> Pieces:
    yield first
    async for piece in rest:
        yield piece


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()
