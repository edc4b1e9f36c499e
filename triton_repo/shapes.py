"""Prompts and answers of given lengths, and what a comparison finds for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from builder import tokenizer
from builder.errors import UserError
from triton_repo.rounds import METRICS, AnyRound, Row, row


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Prompts of `input_tokens` each, answered by `output_tokens`."""

    input_tokens: int
    output_tokens: int
    prompts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ShapeRows:
    """All metrics of one shape."""

    input_tokens: int
    output_tokens: int
    rows: tuple[Row, ...]

    def row(self, metric: str) -> Row:
        return next(x for x in self.rows if x.metric == metric)


def shape_rows(shape: Shape, rounds: Sequence[AnyRound]) -> ShapeRows:
    """The rows of rounds at one level."""
    metrics = [m for m in METRICS if all(r.samples(m) for r in rounds)]
    return ShapeRows(
        input_tokens=shape.input_tokens,
        output_tokens=shape.output_tokens,
        rows=tuple(row(rounds, metric, rounds[0].concurrency) for metric in metrics),
    )


def make(lengths: Sequence[tuple[int, int]], texts: Sequence[str], directory: Path) -> tuple[Shape, ...]:
    """Shapes of (input, output) tokens, their prompts the texts again and again, each from another place.

    A text of so many tokens is cut anew until it is taken for as many again, for cutting changes tokens.
    Raises UserError where no cut has the length.
    """
    encoder = tokenizer.load(directory)
    whole = encoder.encode("\n".join(texts), add_special_tokens=False).ids
    most = max(n for n, _ in lengths) if lengths else 0
    ids = whole * (2 + most // max(1, len(whole)))
    special = len(encoder.encode("").ids)

    def prompt(length: int, start: int) -> str:
        for extra in range(-8, 9):
            text: str = encoder.decode(ids[start : start + length - special + extra])
            if len(encoder.encode(text).ids) == length:
                return text
        raise UserError(f"lengths: no prompt of {length} tokens can be made of the texts; give another")

    starts = [i * len(whole) // len(texts) for i in range(len(texts))]
    return tuple(
        Shape(input_tokens=n, output_tokens=m, prompts=tuple(prompt(n, start) for start in starts))
        for n, m in lengths
    )
