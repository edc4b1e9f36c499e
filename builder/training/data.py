"""Text as one stream of tokens, packed into sequences without padding, in an order that a seed decides.

Documents follow each other, each with the end-of-text token behind it; a sequence may hold the end of one
and the beginning of the next, and attention crosses the border. What a step reads is a function of
(seed, step) alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from builder import tokenizer
from builder.errors import UserError
from builder.text import read_texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DOCUMENTS = 256  # tokenised at once


@dataclass(frozen=True)
class Stream:
    """Token numbers [n], and for a supervised stage whether each is to be learnt [n]."""

    ids: np.ndarray
    learnt: np.ndarray | None = None

    def digest(self) -> str:
        """SHA-256 of it all."""
        total = hashlib.sha256(np.ascontiguousarray(self.ids).data)
        if self.learnt is not None:
            total.update(self.learnt.data)
        return total.hexdigest()


def read(model: Path, files: Sequence[Path], *, vocab_size: int, supervised: bool = False) -> Stream:
    """The stream of .txt, .jsonl ("text" in each line) and .npy files (token numbers, mapped into memory).

    Supervised: .jsonl with "prompt" and "response" in each line. Raises UserError by file, and for a token
    outside the vocabulary.
    """
    encoder = tokenizer.load(model)
    ends = tokenizer.end_ids(model)[:1]
    if supervised:
        stream = _answers(encoder, ends, files)
    elif len(files) == 1 and files[0].suffix == ".npy":
        stream = Stream(_numbers(files[0]))
    else:
        parts = [part for file in files for part in _tokens(encoder, ends, file)]
        stream = Stream(np.concatenate(parts) if parts else np.empty(0, np.int32))
    if len(stream.ids) and not 0 <= int(stream.ids.min()) <= int(stream.ids.max()) < vocab_size:
        raise UserError(
            f"{', '.join(map(str, files))}: token {int(stream.ids.max())} is outside vocab_size "
            f"{vocab_size}; {model / 'tokenizer.json'} is not this model's tokenizer"
        )
    return stream


def _tokens(encoder: Tokenizer, ends: list[int], file: Path) -> Iterator[np.ndarray]:
    if file.suffix == ".npy":
        yield _numbers(file)
        return
    texts = read_texts([file])
    for start in range(0, len(texts), DOCUMENTS):
        for found in encoder.encode_batch(texts[start : start + DOCUMENTS], add_special_tokens=False):
            yield np.array([*found.ids, *ends], np.int32)


def _numbers(file: Path) -> np.ndarray:
    try:
        found = np.load(file, mmap_mode="r")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{file}: not a .npy file: {error}") from None
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise UserError(f"{file}: {found.dtype} {list(found.shape)}, one row of integers was expected")
    return found


def _answers(encoder: Tokenizer, ends: list[int], files: Sequence[Path]) -> Stream:
    ids: list[int] = []
    learnt: list[bool] = []
    for prompt, response in _pairs(files):
        asked, told = (encoder.encode(x, add_special_tokens=False).ids for x in (prompt, response))
        ids += [*asked, *told, *ends]
        learnt += [False] * len(asked) + [True] * (len(told) + len(ends))
    return Stream(np.array(ids, np.int32), np.array(learnt, np.bool_))


def _pairs(files: Sequence[Path]) -> Iterator[tuple[str, str]]:
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from None
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _pair(file, number, line)


def _pair(file: Path, number: int, line: str) -> tuple[str, str]:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: line {number} is not JSON: {error}") from None
    prompt, response = (
        (value.get("prompt"), value.get("response")) if isinstance(value, dict) else (None, None)
    )
    if not isinstance(prompt, str) or not isinstance(response, str):
        raise UserError(
            f'{file}: line {number} has no "prompt" and "response" of type string, which a '
            "supervised stage needs"
        )
    return prompt, response


class Batches:
    """Sequences of `context` + 1 tokens of a stream, `sequences` for each step of a stage.

    Every epoch cuts the stream at another offset and shuffles the sequences. Raises UserError where the
    stream has fewer sequences than one step takes.
    """

    def __init__(self, stream: Stream, *, context: int, sequences: int, seed: int, stage: int) -> None:
        self.stream, self.context, self.sequences = stream, context, sequences
        self.seed, self.stage = seed, stage
        self.per_epoch = max(0, (len(stream.ids) - context) // context)  # at any offset
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0))
        if self.per_epoch < sequences:
            raise UserError(
                f"stage {stage + 1}: data: {len(stream.ids):,} tokens are {self.per_epoch} sequences of "
                f"{context} tokens, one step takes {sequences}; give more text, or smaller batch_tokens"
            )

    def starts(self, step: int) -> list[int]:
        """Where the sequences of a step begin."""
        places = range(step * self.sequences, (step + 1) * self.sequences)
        return [int(self._order(n // self.per_epoch)[n % self.per_epoch]) for n in places]

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch[0] != epoch:
            random = np.random.default_rng((self.seed, self.stage, epoch))
            offset = random.integers(self.context)
            self._epoch = epoch, random.permutation(self.per_epoch) * self.context + offset
        return self._epoch[1]

    def tokens(self, starts: Iterable[int]) -> Tensor:
        """[sequences, context + 1] of int64."""
        rows = [self.stream.ids[x : x + self.context + 1].astype(np.int64) for x in starts]
        return torch.from_numpy(np.stack(rows))

    def counted(self, starts: Iterable[int]) -> Tensor:
        """Whether each next token is to be learnt, [sequences, context] of float32."""
        if self.stream.learnt is None:
            return torch.ones(len(list(starts)), self.context)
        rows = [self.stream.learnt[x + 1 : x + self.context + 1].astype(np.float32) for x in starts]
        return torch.from_numpy(np.stack(rows))
