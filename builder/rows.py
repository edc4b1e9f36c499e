"""8-bit weights with one scale a row: what a weight-only engine reads from memory.

A row's scale is its largest magnitude over the largest number of the dtype: 127 of INT8, 448 of e4m3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from builder.arithmetic import widen
from builder.errors import UserError
from builder.fp8 import FP8_MAX
from builder.tensors import FP8, INT8, NUMPY_DTYPES, Array, Expression, Same, bands, scratch

LARGEST = {INT8: 127.0, FP8: FP8_MAX}
WHOLE = {INT8: ("embedding.",), FP8: ("embedding.", "lm_head.")}  # what keeps its dtype


@dataclass(frozen=True)
class QuantizeRows(Same):
    """x / its row's scale in `small`, rounded to the nearest, ties to even."""

    x: Expression
    small: str

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.small

    def fill(self, out: Array, row: int, column: int) -> None:
        largest = LARGEST[self.small]
        for band, rows in _rows(self.x, out.shape[0], row):
            np.divide(rows, _scales(rows, self.small)[:, None], out=rows)
            np.clip(rows, -largest, largest, out=rows)
            if self.small == INT8:
                np.rint(rows, out=rows)
            out[band] = rows[:, column : column + out.shape[1]].astype(NUMPY_DTYPES[self.small])


@dataclass(frozen=True)
class RowScales(Same):
    """The scale of each row of x, float32 [rows]; 1 for a row of zeros."""

    x: Expression
    small: str

    dtype = "float32"

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.x.shape[:1]

    def fill(self, out: Array, row: int, column: int) -> None:
        for band, rows in _rows(self.x, out.shape[0], row):
            out[band, 0] = _scales(rows, self.small)


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


def _scales(rows: Array, small: str) -> Array:
    largest = np.abs(rows).max(axis=1)
    if not np.isfinite(largest).all():
        raise UserError(f"holds a number that is not finite, which no {small} can be; repair the model")
    return np.where(largest > 0, largest / np.float32(LARGEST[small]), np.float32(1))


def quantize(tensors: Mapping[str, Expression], small: str) -> dict[str, Expression]:
    """Every matrix but those of WHOLE in `small`, "int8" or e4m3, with NAME.scale beside NAME.weight."""
    smaller: dict[str, Expression] = dict(tensors)
    for name, x in tensors.items():
        if len(x.shape) == 2 and not name.startswith(WHOLE[small]):
            smaller[name] = QuantizeRows(x, small)
            smaller[name.removesuffix("weight") + "scale"] = RowScales(x, small)
    return smaller


def dequantize(tensors: Mapping[str, Expression]) -> dict[str, Expression]:
    """The inverse of `quantize`, but for what rounding took; matrices in float32."""
    whole = {name: x for name, x in tensors.items() if not name.endswith(".scale")}
    for name, scales in tensors.items():
        if name.endswith(".scale"):
            weight = name.removesuffix("scale") + "weight"
            whole[weight] = ScaleRows(tensors[weight], scales)
    return whole
