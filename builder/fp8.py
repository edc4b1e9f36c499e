"""e4m3 numbers with one scale a tensor, or one a row, as NVIDIA's FP8 matrix products take them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from builder.arithmetic import widen
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
