"""What is asked of an engine, and what comes back step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from builder.errors import UserError
from engines.manifest import Manifest

FinishReason = Literal["length", "end_id", "stop_words"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to continue it.

    Greedy when temperature, top_k and top_p are all None, or temperature is 0, or top_k is 1. Otherwise
    a token is drawn from softmax(logits / temperature) cut to the `top_k` likeliest (0: all), then to
    the fewest whose renormalised sum reaches `top_p`. The same seed draws the same tokens, whatever
    else runs. Raises UserError for a value out of range.
    """

    input_ids: tuple[int, ...]
    max_tokens: int
    end_id: int | None = None
    stop_words: tuple[tuple[int, ...], ...] = ()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.input_ids:
            raise UserError("input_ids: empty; give at least one token")
        if self.max_tokens < 1:
            raise UserError(f"max_tokens: {self.max_tokens} is not positive; ask for at least 1")
        if not all(self.stop_words):
            raise UserError("stop_words: an entry is empty; leave it out")
        if self.temperature is not None and not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature: {self.temperature} is not 0 or more; 0 is greedy")
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"top_k: {self.top_k} is negative; 0 keeps all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} is not above 0 and at most 1; 1 keeps all tokens")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed: {self.seed} is not between 0 and 2^64 - 1")

    @property
    def greedy(self) -> bool:
        unset = self.temperature is None and self.top_k is None and self.top_p is None
        return unset or self.temperature == 0 or self.top_k == 1

    def check_limits(self, manifest: Manifest) -> None:
        """Raises UserError where the engine was not built for this request."""
        length, vocab = len(self.input_ids), manifest.architecture.vocab_size
        if length > manifest.max_input_len:
            raise UserError(
                f"input_ids: {length} tokens, the engine's max_input_len is {manifest.max_input_len}; "
                "shorten the prompt or build with a larger --max-input-len"
            )
        if length + self.max_tokens > manifest.max_seq_len:
            raise UserError(
                f"max_tokens: {self.max_tokens} after {length} input tokens, the engine's max_seq_len is "
                f"{manifest.max_seq_len}; ask for at most {manifest.max_seq_len - length}"
            )
        wrong = [t for t in self.input_ids if not 0 <= t < vocab]
        if wrong:
            raise UserError(
                f"input_ids: token {wrong[0]} is not below vocab_size {vocab}; use the model's tokenizer"
            )


@dataclass(frozen=True, kw_only=True)
class Output:
    """The tokens of one step; `finish_reason` is set on the last. The end_id token is not among them,
    the tokens of a stop word are."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
