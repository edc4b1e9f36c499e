"""An answer as it grows: pieces of text, the tokens behind them, and why it ended."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from triton_repo.openai.errors import ApiError
from triton_repo.openai.text import GrowingText, StopStrings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token's own text, which is no text where it is only part of a character, and its log-probability."""

    text: str
    log_prob: float


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What is new: text, `num_tokens` tokens, and those themselves where log-probabilities were asked for.

    `finish_reason` is set on the last.
    """

    text: str = ""
    num_tokens: int = 0
    tokens: tuple[Token, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """New tokens of the engine; `log_probs` has one a token, or none."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Ending:
    """What ends an answer: strings in its text once there are `min_tokens`, tokens, and its length."""

    max_tokens: int
    min_tokens: int = 0
    strings: Sequence[str] = ()
    token_ids: frozenset[int] = frozenset()


async def from_tokens(
    steps: AsyncIterator[Step], tokenizer: Tokenizer, ending: Ending
) -> AsyncGenerator[Piece, None]:
    """The pieces of a token stream. An end token is neither shown nor counted."""
    text, stops = GrowingText(tokenizer), StopStrings(ending.strings)
    count, ended = 0, False
    async for step in steps:
        ended = bool(step.token_ids) and step.token_ids[-1] in ending.token_ids
        ids = step.token_ids[:-1] if ended else step.token_ids
        count += len(ids)
        new = text.push(ids)
        shown = stops.push(new) if count > ending.min_tokens else new
        tokens = tuple(
            Token(text=tokenizer.decode([token], skip_special_tokens=False), log_prob=log_prob)
            for token, log_prob in zip(ids, step.log_probs, strict=False)
        )
        yield Piece(
            text=shown, num_tokens=len(ids), tokens=tokens, finish_reason="stop" if stops.found else None
        )
        if stops.found:
            return
    shown = stops.push(text.push((), final=True), final=True)
    stopped = ended or stops.found or count < ending.max_tokens
    yield Piece(text=shown, finish_reason="stop" if stopped else "length")


async def from_texts(
    answers: AsyncIterator[tuple[str, FinishReason | None]], tokenizer: Tokenizer, ending: Ending
) -> AsyncGenerator[Piece, None]:
    """The pieces of a stream of whole texts. Tokens are counted at the end: those that the text becomes.

    Raises ApiError where a text does not begin as the last did, or none says why it ended.
    """
    stops, said, why = StopStrings(ending.strings), "", None
    async for whole, reason in answers:
        if not whole.startswith(said):
            raise ApiError(502, "the server's streamed text changed what it had said before")
        shown, said, why = stops.push(whole[len(said) :]), whole, reason
        if stops.found:
            why = "stop"
            break
        yield Piece(text=shown)
    if why is None:
        raise ApiError(502, "the server ended its answer without a reason")
    rest = shown if stops.found else stops.push("", final=True)
    count = len(tokenizer.encode(said, add_special_tokens=False).ids)
    yield Piece(text=rest, num_tokens=min(count, ending.max_tokens), finish_reason=why)
