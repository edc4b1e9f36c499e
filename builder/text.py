"""Text of files as tokens, and as samples of one length to measure a model on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from builder import tokenizer
from builder.architecture import Architecture
from builder.errors import UserError


def read_texts(files: Sequence[Path]) -> list[str]:
    """The documents of plain text files, and of each line's "text" in .jsonl files.

    Raises UserError where a file cannot be read, is not UTF-8 or not such JSON.
    """
    return [text for file in files for text in _documents(file)]


def _documents(file: Path) -> Iterator[str]:
    try:
        content = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    if file.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield _json_text(file, number, line)


def _json_text(file: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: line {number} is not JSON: {error}") from None
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{file}: line {number} has no "text" of type string; write {{"text": "..."}}')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{file}: line {number} has half a surrogate pair, which is no text") from None
    return text


def read_ids(tokenizer_dir: Path, files: Sequence[Path]) -> list[int]:
    """The tokens of files, one document after the other. Raises UserError where a file cannot be read."""
    texts = read_texts(files)
    encoder = tokenizer.load(tokenizer_dir)
    return [token for text in texts for token in encoder.encode(text, add_special_tokens=False).ids]


def read_samples(
    model: Path, files: Sequence[Path], count: int, length: int, architecture: Architecture, seed: int = 0
) -> Tensor:
    """`count` pieces of `length` tokens that do not overlap, [count, length] of int64, chosen by `seed`.

    Fewer where the text has no more. Raises UserError where it has none, or has a token outside the
    vocabulary.
    """
    longest, vocab_size = architecture.max_position_embeddings, architecture.vocab_size
    if length > longest:
        raise UserError(f"length: {length} is beyond the model's max_position_embeddings {longest}; lower it")
    ids = read_ids(model, files)
    names = ", ".join(map(str, files))
    if len(ids) < length:
        raise UserError(
            f"{names}: {len(ids):,} tokens, shorter than one sample of {length:,}; give more text or a "
            "smaller --length"
        )
    if max(ids) >= vocab_size:
        raise UserError(
            f"{model / 'tokenizer.json'}: makes token {max(ids)}, outside vocab_size {vocab_size}; it is not "
            "this model's tokenizer"
        )
    starts = range(0, len(ids) - length + 1, length)
    chosen = sorted(random.Random(seed).sample(starts, min(count, len(starts))))
    return torch.tensor([ids[start : start + length] for start in chosen])
