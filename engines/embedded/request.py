"""What is asked of an engine, and what comes back step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from builder.errors import UserError
from engines.embedded.step import BLOCK_SIZE, num_blocks
from engines.manifest import Manifest

LARGEST = 1e4  # of temperatures and penalties: logits stay far from the ends of float32
MAX_WORDS = 1024  # of one list; stop words are looked for after every token
FinishReason = Literal["length", "end_id", "stop_words"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to continue it.

    Greedy when temperature, top_k and top_p are all None, or temperature is 0, or top_k is 1. Otherwise
    a token is drawn from softmax(logits / temperature) cut to the `top_k` likeliest (0: all), then to
    the fewest whose renormalised sum reaches `top_p`. The same seed draws the same tokens, whatever
    else runs.

    Before that, greedy or not, the logits are penalised as TensorRT-LLM does
    (`engines.embedded.penalties`), and tokens that would finish one of `bad_words` are masked. Until
    there are `min_tokens`, `end_id` and stop words of one token are masked and no stop word ends the
    request; `max_tokens` does. `return_log_probs` asks for `Output.log_probs`.

    Raises UserError for a value out of range.
    """

    input_ids: tuple[int, ...]
    max_tokens: int
    end_id: int | None = None
    stop_words: tuple[tuple[int, ...], ...] = ()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    prompt_ignore_length: int = 0
    min_tokens: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    return_log_probs: bool = False

    def __post_init__(self) -> None:
        if not self.input_ids:
            raise UserError("input_ids: empty; give at least one token")
        if self.max_tokens < 1:
            raise UserError(f"max_tokens: {self.max_tokens} is not positive; ask for at least 1")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed: {self.seed} is not between 0 and 2^64 - 1")
        self._check_words()
        self._check_sampling()
        self._check_penalties()

    def _check_words(self) -> None:
        for name in ("stop_words", "bad_words"):
            words = getattr(self, name)
            if not all(words):
                raise UserError(f"{name}: an entry is empty; leave it out")
            if len(words) > MAX_WORDS:
                raise UserError(f"{name}: {len(words)} words, at most {MAX_WORDS} are taken")

    def _check_sampling(self) -> None:
        if self.temperature is not None and not 0 <= self.temperature <= LARGEST:
            raise UserError(f"temperature: {self.temperature} is not between 0 and {LARGEST:g}; 0 is greedy")
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"top_k: {self.top_k} is negative; 0 keeps all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} is not above 0 and at most 1; 1 keeps all tokens")

    def _check_penalties(self) -> None:
        if not 1 / LARGEST <= self.repetition_penalty <= LARGEST:
            raise UserError(
                f"repetition_penalty: {self.repetition_penalty} is not between {1 / LARGEST:g} and "
                f"{LARGEST:g}; 1 is none"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= LARGEST:
                raise UserError(f"{name}: {getattr(self, name)} is not a number up to {LARGEST:g}; 0 is none")
        for name in ("prompt_ignore_length", "min_tokens"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: {getattr(self, name)} is negative; give 0 or more")

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
        needed, room = num_blocks(length + self.max_tokens), manifest.kv_cache_blocks
        if needed > room:
            raise UserError(
                f"max_tokens: {self.max_tokens} after {length} input tokens are {needed} blocks of "
                f"{BLOCK_SIZE} tokens, the engine's kv_cache_blocks is {room}; keep prompt and max_tokens "
                f"within {room * BLOCK_SIZE} or build with a larger --kv-cache-memory"
            )
        for name, words in (("input_ids", (self.input_ids,)), ("bad_words", self.bad_words)):
            wrong = [t for word in words for t in word if not 0 <= t < vocab]
            if wrong:
                raise UserError(
                    f"{name}: token {wrong[0]} is not below vocab_size {vocab}; use the model's tokenizer"
                )


@dataclass(frozen=True, kw_only=True)
class Output:
    """The tokens of one step; `finish_reason` is set on the last. The end_id token is not among them,
    the tokens of a stop word are.

    `log_probs` are those of `token_ids`, `cum_log_prob` the sum over all that were drawn so far, end_id
    included: natural logarithms, of softmax(penalised logits / temperature) over the whole vocabulary
    whatever top_k and top_p are. Empty and None unless the request has return_log_probs.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    log_probs: tuple[float, ...] = ()
    cum_log_prob: float | None = None
