"""INT8 weights with one scale a row: what a weight-only engine reads from memory.

A row's scale is its largest magnitude over 127, so the error of a weight is at most half a scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from builder.arithmetic import widen
from builder.errors import UserError
from builder.tensors import INT8, Array, Expression, Same, bands, scratch

LARGEST = 127.0


@dataclass(frozen=True)
class Quantize(Same):
    """x / its row's scale, rounded to the nearest, ties to even."""

    x: Expression

    dtype = INT8

    def fill(self, out: Array, row: int, column: int) -> None:
        for band, rows in _rows(self.x, out.shape[0], row):
            scales = _scales(rows)[:, None]
            np.rint(np.divide(rows, scales, out=rows), out=rows)
            out[band] = rows[:, column : column + out.shape[1]]


@dataclass(frozen=True)
class Scales(Same):
    """The scale of each row of x, float32 [rows]; 1 for a row of zeros."""

    x: Expression

    dtype = "float32"

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.x.shape[:1]

    def fill(self, out: Array, row: int, column: int) -> None:
        for band, rows in _rows(self.x, out.shape[0], row):
            out[band, 0] = _scales(rows)


@dataclass(frozen=True)
class ScaleRows(Same):
    """x with each row times its scale, in float32: what quantised weights stand for."""

    x: Expression
    scales: Expression

    dtype = "float32"

    def fill(self, out: Array, row: int, column: int) -> None:
        widen(self.x, out, row, column)
        np.multiply(out, self.scales.read(row, row + out.shape[0])[:, None], out=out)


def _rows(x: Expression, count: int, first: int) -> Iterator[tuple[slice, Array]]:
    """Whole rows first..first + count in float32, in bands."""
    for band in bands(count, 4 * x.columns):
        with scratch.borrow((band.stop - band.start, x.columns), "float32") as rows:
            widen(x, rows, first + band.start, 0)
            yield band, rows


def _scales(rows: Array) -> Array:
    largest = np.abs(rows).max(axis=1)
    if not np.isfinite(largest).all():
        raise UserError("holds a number that is not finite, which INT8 cannot scale; repair the model")
    return np.where(largest > 0, largest / np.float32(LARGEST), np.float32(1))


def quantize(tensors: Mapping[str, Expression]) -> dict[str, Expression]:
    """Every matrix but the embedding in INT8, with NAME.scale beside NAME.weight."""
    smaller: dict[str, Expression] = dict(tensors)
    for name, x in tensors.items():
        if len(x.shape) == 2 and not name.startswith("embedding."):
            smaller[name] = Quantize(x)
            smaller[name.removesuffix("weight") + "scale"] = Scales(x)
    return smaller


def dequantize(tensors: Mapping[str, Expression]) -> dict[str, Expression]:
    """The inverse of `quantize`, but for what rounding took; matrices in float32."""
    whole = {name: x for name, x in tensors.items() if not name.endswith(".scale")}
    for name, scales in tensors.items():
        if name.endswith(".scale"):
            weight = name.removesuffix("scale") + "weight"
            whole[weight] = ScaleRows(tensors[weight], scales)
    return whole
