"""What a request's past does to its next logits: penalties, bad words, and no end before min_tokens.

As TensorRT-LLM's penalty and ban-words layers do (cpp/tensorrt_llm/kernels/penaltyKernels.cu and
banBadWords.cu), each touches the few logits it is about and none looks at the whole vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engines.embedded.request import Request

Row = NDArray[np.float32]  # [vocab_size], logits of one position


class Adjustment(Protocol):
    """A change of logits that depends on what was said so far."""

    def apply(self, row: Row, tokens: Sequence[int]) -> None:
        """Change `row`, the logits that follow `tokens`, which are prompt and output."""


def adjustments(request: Request, temperature: float) -> list[Adjustment]:
    """What a request asks for, in TensorRT-LLM's order; the logits are divided by `temperature` later."""
    found: list[Adjustment] = []
    if (request.repetition_penalty, request.presence_penalty, request.frequency_penalty) != (1.0, 0.0, 0.0):
        found.append(_Penalties(request, temperature))
    if request.min_tokens:
        found.append(_NoEarlyEnd(request))
    if request.bad_words:
        found.append(_BadWords(request.bad_words))
    return found


class _Penalties:
    """Repetition, presence and frequency penalties.

    All three are over prompt and output, as TensorRT-LLM counts them; presence and frequency leave out
    the first `prompt_ignore_length` tokens of the prompt, so with a large one they are OpenAI's, over
    the output alone. TensorRT-LLM divides by the temperature first and then subtracts; here the
    division comes last, so presence and frequency are multiplied by the temperature.
    """

    def __init__(self, request: Request, temperature: float) -> None:
        self._repetition = np.float32(request.repetition_penalty)
        self._presence = np.float32(request.presence_penalty * temperature)
        self._frequency = np.float32(request.frequency_penalty * temperature)
        self._ignored = min(request.prompt_ignore_length, len(request.input_ids))
        room = len(request.input_ids) + request.max_tokens
        self._places: dict[int, int] = {}  # token -> where it is in the arrays
        self._ids = np.empty(room, np.int64)
        self._counts = np.zeros(room, np.float32)  # 0: in the ignored part of the prompt alone
        self._counted = 0

    def apply(self, row: Row, tokens: Sequence[int]) -> None:
        self._count(tokens)
        ids, counts = self._ids[: len(self._places)], self._counts[: len(self._places)]
        logits = row[ids]
        logits = np.where(logits < 0, logits * self._repetition, logits / self._repetition)
        row[ids] = logits - self._presence * (counts > 0) - self._frequency * counts

    def _count(self, tokens: Sequence[int]) -> None:
        for index in range(self._counted, len(tokens)):
            token = tokens[index]
            place = self._places.setdefault(token, len(self._places))
            self._ids[place] = token
            self._counts[place] += index >= self._ignored
        self._counted = len(tokens)


class _NoEarlyEnd:
    """Masks end_id, and stop words of one token, which further end tokens are, until min_tokens."""

    def __init__(self, request: Request) -> None:
        self._until = len(request.input_ids) + request.min_tokens
        ends = {word[0] for word in request.stop_words if len(word) == 1}
        if request.end_id is not None:
            ends.add(request.end_id)
        self._ends = np.array(sorted(end for end in ends if end >= 0), np.int64)

    def apply(self, row: Row, tokens: Sequence[int]) -> None:
        if len(tokens) < self._until:
            row[self._ends[self._ends < len(row)]] = -np.inf


class _BadWords:
    """Masks the last token of a bad word where the ones before it were said, in prompt or output."""

    def __init__(self, words: Sequence[tuple[int, ...]]) -> None:
        self._always = np.array([word[0] for word in words if len(word) == 1], np.int64)
        self._after: dict[int, dict[tuple[int, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
        for *start, last in words:
            if start:
                self._after[len(start)][tuple(start)].append(last)

    def apply(self, row: Row, tokens: Sequence[int]) -> None:
        row[self._always] = -np.inf
        for length, endings in self._after.items():
            row[endings.get(tuple(tokens[-length:]), [])] = -np.inf
