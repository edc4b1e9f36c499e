"""The JSON of answers, whole and in chunks, as OpenAI's API has it."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from triton_repo.openai.continuation import Piece, Token

Json = dict[str, Any]


async def whole(pieces: AsyncGenerator[Piece, None], shape: Shape, prompt_tokens: int) -> Json:
    """An answer that is told at its end."""
    async with aclosing(pieces):
        said = [piece async for piece in pieces]
    text = "".join(piece.text for piece in said)
    tokens = [token for piece in said for token in piece.tokens]
    told = usage(prompt_tokens, sum(piece.num_tokens for piece in said))
    return {**shape.whole(text, said[-1], tokens), "usage": told}


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Shape(Protocol):
    """How one endpoint says an answer; a chunk is a JSON object of a stream."""

    def whole(self, text: str, last: Piece, tokens: Sequence[Token]) -> Json: ...

    def opening(self) -> list[Json]: ...

    def chunk(self, piece: Piece) -> Json: ...

    def counted(self, told: Json) -> Json: ...


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What all answers to a request have in common; `log_probs` says that they were asked for."""

    model: str
    log_probs: bool
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def _object(self, kind: str, prefix: str, choices: list[Json]) -> Json:
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


@dataclass(frozen=True, kw_only=True)
class CompletionShape(_Answer):
    """/v1/completions; `echo` is the prompt, where it is to be repeated."""

    echo: str = ""

    def whole(self, text: str, last: Piece, tokens: Sequence[Token]) -> Json:
        return self._answer(self.echo + text, last, tokens)

    def opening(self) -> list[Json]:
        return [self._answer(self.echo, Piece(), ())] if self.echo else []

    def chunk(self, piece: Piece) -> Json:
        return self._answer(piece.text, piece, piece.tokens)

    def counted(self, told: Json) -> Json:
        return {**self._object("text_completion", "cmpl", []), "usage": told}

    def _answer(self, text: str, piece: Piece, tokens: Sequence[Token]) -> Json:
        known = None
        if self.log_probs:
            known = {
                "tokens": [token.text for token in tokens],
                "token_logprobs": [token.log_prob for token in tokens],
                "top_logprobs": None,
                "text_offset": None,
            }
        choice = {"index": 0, "text": text, "logprobs": known, "finish_reason": piece.finish_reason}
        return self._object("text_completion", "cmpl", [choice])


@dataclass(frozen=True, kw_only=True)
class ChatShape(_Answer):
    """/v1/chat/completions."""

    def whole(self, text: str, last: Piece, tokens: Sequence[Token]) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return self._object("chat.completion", "chatcmpl", [self._choice("message", message, last, tokens)])

    def opening(self) -> list[Json]:
        return [self._chunk({"role": "assistant", "content": ""}, Piece())]

    def chunk(self, piece: Piece) -> Json:
        return self._chunk({"content": piece.text} if piece.text else {}, piece)

    def counted(self, told: Json) -> Json:
        return {**self._object("chat.completion.chunk", "chatcmpl", []), "usage": told}

    def _chunk(self, delta: Json, piece: Piece) -> Json:
        choices = [self._choice("delta", delta, piece, piece.tokens)]
        return self._object("chat.completion.chunk", "chatcmpl", choices)

    def _choice(self, name: str, said: Json, piece: Piece, tokens: Sequence[Token]) -> Json:
        known = {"content": [_token(token) for token in tokens], "refusal": None} if self.log_probs else None
        return {"index": 0, name: said, "logprobs": known, "finish_reason": piece.finish_reason}


def _token(token: Token) -> Json:
    """Bytes of part of a character are not known."""
    whole = "\N{REPLACEMENT CHARACTER}" not in token.text
    return {
        "token": token.text,
        "logprob": token.log_prob,
        "bytes": list(token.text.encode()) if whole else None,
        "top_logprobs": [],
    }
