"""e4m3 numbers with one scale a tensor, or one a row, as NVIDIA's FP8 matrix products take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from builder.arithmetic import widen
from builder.errors import UserError
from builder.tensors import FP8, NUMPY_DTYPES, Array, Expression, Same, bands, scratch

FP8_MAX = 448.0  # the largest e4m3 number


@dataclass(frozen=True)
class Quantize(Same):
    """x / scale in e4m3, rounded to nearest even and saturated at 448. `x` is bfloat16 or float16.

    A 16-bit number has 65,536 values, so the rounding is a table, made once per tensor.
    """

    x: Expression
    scale: float

    dtype = FP8

    @cached_property
    def _table(self) -> Array:
        every = np.arange(1 << 16, dtype=np.uint16).view(NUMPY_DTYPES[self.x.dtype]).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = np.clip(every / np.float32(self.scale), -FP8_MAX, FP8_MAX)
            return scaled.astype(NUMPY_DTYPES[FP8]).view(np.uint8)

    def fill(self, out: Array, row: int, column: int) -> None:
        with scratch.borrow((out.shape[0], out.shape[1]), self.x.dtype) as block:
            self.x.fill(block, row, column)
            out.view(np.uint8)[...] = self._table[block.view(np.uint16)]


@dataclass(frozen=True)
class Dequantize(Same):
    """e4m3 numbers times `scale`, in float32."""

    x: Expression
    scale: float

    dtype = "float32"

    def fill(self, out: Array, row: int, column: int) -> None:
        widen(self.x, out, row, column)
        np.multiply(out, np.float32(self.scale), out=out)


def absolute_maximum(x: Expression) -> float:
    """The largest magnitude in `x`; nan where a number is."""
    largest = 0.0
    for band in bands(x.rows, x.row_bytes):
        with scratch.borrow((band.stop - band.start, x.columns), x.dtype) as block:
            x.fill(block, band.start, 0)
            # The bits of a 16-bit float without its sign sort as its magnitude does.
            if block.itemsize == 2:
                top = np.bitwise_and(block.view(np.uint16), 0x7FFF).max(keepdims=True).view(block.dtype)
                largest = max(float(top[0, 0]), largest)
            else:
                largest = max(float(np.abs(block.astype(np.float64)).max()), largest)
            if np.isnan(largest):
                return largest
    return largest


@dataclass(frozen=True)
class QuantizeRows(Same):
    """x / its row's scale in e4m3, rounded to nearest even."""

    x: Expression

    dtype = FP8

    def fill(self, out: Array, row: int, column: int) -> None:
        for band, rows in _whole_rows(self.x, out.shape[0], row):
            np.divide(rows, _row_scales(rows)[:, None], out=rows)
            np.clip(rows, -FP8_MAX, FP8_MAX, out=rows)
            out[band] = rows[:, column : column + out.shape[1]].astype(NUMPY_DTYPES[FP8])


@dataclass(frozen=True)
class RowScales(Same):
    """The scale of each row of x, its largest magnitude over 448, float32 [rows]; 1 for a row of zeros."""

    x: Expression

    dtype = "float32"

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.x.shape[:1]

    def fill(self, out: Array, row: int, column: int) -> None:
        for band, rows in _whole_rows(self.x, out.shape[0], row):
            out[band, 0] = _row_scales(rows)


def _whole_rows(x: Expression, count: int, first: int) -> Iterator[tuple[slice, Array]]:
    """Rows first..first + count in float32, in bands."""
    for band in bands(count, 4 * x.columns):
        with scratch.borrow((band.stop - band.start, x.columns), "float32") as rows:
            widen(x, rows, first + band.start, 0)
            yield band, rows


def _row_scales(rows: Array) -> Array:
    largest = np.abs(rows).max(axis=1)
    if not np.isfinite(largest).all():
        raise UserError("holds a number that is not finite, which FP8 cannot scale; repair the model")
    return np.where(largest > 0, largest / np.float32(FP8_MAX), np.float32(1))


def quantize_rows(tensors: Mapping[str, Expression]) -> dict[str, Expression]:
    """Every matrix but embedding and lm_head in e4m3, with NAME.scale beside NAME.weight."""
    smaller: dict[str, Expression] = dict(tensors)
    for name, x in tensors.items():
        if len(x.shape) == 2 and not name.startswith(("embedding.", "lm_head.")):
            smaller[name] = QuantizeRows(x)
            smaller[name.removesuffix("weight") + "scale"] = RowScales(x)
    return smaller
