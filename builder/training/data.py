"""Text as one stream of tokens: documents follow each other, each with the end-of-text token behind it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from builder import tokenizer
from builder.errors import UserError
from builder.text import read_texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DOCUMENTS = 256  # tokenised at once
NUMBERS = 1 << 24  # of a .npy file, looked at at once


@dataclass(frozen=True)
class Stream:
    """Token numbers [n], and for a supervised stage whether each is to be learnt [n].

    `documents` are the places where documents begin, ascending; None where nothing says.
    """

    ids: np.ndarray
    learnt: np.ndarray | None = None
    documents: np.ndarray | None = None

    def digest(self) -> str:
        """SHA-256 of it all."""
        total = hashlib.sha256(np.ascontiguousarray(self.ids).data)
        for more in (self.learnt, self.documents):
            if more is not None:
                total.update(more.data)
        return total.hexdigest()


def read(model: Path, files: Sequence[Path], *, vocab_size: int, supervised: bool = False) -> Stream:
    """The stream of .txt, .jsonl ("text" in each line) and .npy files (token numbers, mapped into memory).

    Supervised: .jsonl with "prompt" and "response" in each line. A document is a .txt file, a line of a
    .jsonl file, or what an end-of-text token ends in a .npy file. Raises UserError by file, and for a token
    outside the vocabulary.
    """
    encoder = tokenizer.load(model)
    ends = tokenizer.end_ids(model)[:1]
    if supervised:
        stream = _answers(encoder, ends, files)
    elif len(files) == 1 and files[0].suffix == ".npy":
        numbers = _numbers(files[0])
        stream = Stream(numbers, documents=_begins(numbers, ends[0]) if ends else None)
    else:
        stream = _joined(encoder, ends, files)
    low, high = (int(x) for x in (stream.ids.min(), stream.ids.max())) if len(stream.ids) else (0, 0)
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"{', '.join(map(str, files))}: token {low if low < 0 else high} is outside vocab_size "
            f"{vocab_size}; {model / 'tokenizer.json'} is not this model's tokenizer"
        )
    return stream


def _joined(encoder: Tokenizer, ends: list[int], files: Sequence[Path]) -> Stream:
    parts = [part for file in files for part in _tokens(encoder, ends, file)]
    begins = np.cumsum([0, *map(len, parts)])[:-1]
    known = ends or all(file.suffix != ".npy" for file in files)
    return Stream(
        np.concatenate(parts) if parts else np.empty(0, np.int32),
        documents=np.unique(begins) if known else None,
    )


def _tokens(encoder: Tokenizer, ends: list[int], file: Path) -> Iterator[np.ndarray]:
    """Each document's."""
    if file.suffix == ".npy":
        numbers = np.asarray(_numbers(file))
        yield from np.split(numbers, _begins(numbers, ends[0])[1:]) if ends else [numbers]
        return
    texts = read_texts([file])
    for start in range(0, len(texts), DOCUMENTS):
        for found in encoder.encode_batch(texts[start : start + DOCUMENTS], add_special_tokens=False):
            yield np.array([*found.ids, *ends], np.int32)


def _begins(numbers: np.ndarray, end: int) -> np.ndarray:
    """0, and the place behind each `end` but a last one."""
    blocks = range(0, len(numbers), NUMBERS)
    found = [np.flatnonzero(numbers[x : x + NUMBERS] == end) + x + 1 for x in blocks]
    begins = np.concatenate([[0], *found])
    return begins[begins < max(1, len(numbers))]


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
    begins: list[int] = []
    for prompt, response in _pairs(files):
        begins.append(len(ids))
        asked, told = (encoder.encode(x, add_special_tokens=False).ids for x in (prompt, response))
        ids += [*asked, *told, *ends]
        learnt += [False] * len(asked) + [True] * (len(told) + len(ends))
    return Stream(np.array(ids, np.int32), np.array(learnt, np.bool_), np.unique(begins).astype(np.int64))


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
