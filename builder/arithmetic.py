"""Tensor expressions that compute: in float32 or wider, and one `Cast` at the end rounds once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from builder.errors import UserError
from builder.tensors import NUMPY_DTYPES, Array, Expression, Same, resized, scratch


def wide(*dtypes: str) -> str:
    """The dtype in which arithmetic on `dtypes` happens."""
    return "float64" if "float64" in dtypes else "float32"


def widen(x: Expression, out: Array, row: int, column: int) -> None:
    """Fill `out`, of a dtype that holds every number of `x`, with a window of `x`."""
    if NUMPY_DTYPES[x.dtype] == out.dtype:
        x.fill(out, row, column)
        return
    with scratch.borrow((out.shape[0], out.shape[1]), x.dtype) as block:
        x.fill(block, row, column)
        np.copyto(out, block)


@dataclass(frozen=True)
class ScaleColumns(Same):
    """x @ diag(scale), in float32 or wider."""

    x: Expression
    scale: Expression

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return wide(self.x.dtype, self.scale.dtype)

    @cached_property
    def _factors(self) -> Array:
        return self.scale.read_all().astype(NUMPY_DTYPES[self.dtype])

    def fill(self, out: Array, row: int, column: int) -> None:
        widen(self.x, out, row, column)
        np.multiply(out, self._factors[column : column + out.shape[1]], out=out)


@dataclass(frozen=True)
class PoolHeads(Same):
    """The mean of neighbouring heads: [old heads * head_dim, ...] becomes [heads * head_dim, ...]."""

    x: Expression
    heads: int
    head_dim: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return resized(self.x.shape, 0, self.heads * self.head_dim)

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return wide(self.x.dtype)

    def fill(self, out: Array, row: int, column: int) -> None:
        group = self.x.shape[0] // self.shape[0]
        done = 0
        while done < out.shape[0]:
            head, place = divmod(row + done, self.head_dim)
            part = out[done : done + self.head_dim - place]
            with scratch.borrow((part.shape[0], part.shape[1]), self.dtype) as member:
                for index in range(group):
                    origin = (head * group + index) * self.head_dim + place
                    widen(self.x, part if index == 0 else member, origin, column)
                    if index:
                        np.add(part, member, out=part)
            np.divide(part, group, out=part)
            done += part.shape[0]


@dataclass(frozen=True)
class Divide(Expression):
    """a / b element by element, in float32 or wider; b has no zeros."""

    a: Expression
    b: Expression

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.a.shape

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return wide(self.a.dtype, self.b.dtype)

    def fill(self, out: Array, row: int, column: int) -> None:
        widen(self.a, out, row, column)
        with scratch.borrow((out.shape[0], out.shape[1]), self.dtype) as divisor:
            widen(self.b, divisor, row, column)
            np.divide(out, divisor, out=out)


@dataclass(frozen=True)
class NormBase(Expression):
    """The common norm weight of a fused run: the members' root mean square, never zero.

    Each member's weight over this base is at most sqrt(number of members), so folding neither
    overflows nor divides by a small number. Where all members are zero the base is 1. The value
    is rounded to the stored dtype before anyone divides by it, which keeps folding exact.
    """

    norms: tuple[Expression, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.norms[0].shape

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.norms[0].dtype

    def fill(self, out: Array, row: int, column: int) -> None:
        stacked = np.stack([x.read(row, row + len(out)).astype(np.float64) for x in self.norms])
        base = np.sqrt(np.square(stacked).mean(axis=0)).astype(NUMPY_DTYPES[self.dtype])
        out[:, 0] = np.where(base == 0, np.ones_like(base), base)


@dataclass(frozen=True)
class Cast(Expression):
    """The same numbers in another dtype, rounded to nearest even.

    Raises UserError where a finite number becomes infinite: bfloat16 and float32 reach further than
    float16.
    """

    x: Expression
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.x.shape

    def fill(self, out: Array, row: int, column: int) -> None:
        with scratch.borrow((out.shape[0], out.shape[1]), self.x.dtype) as block:
            self.x.fill(block, row, column)
            with np.errstate(over="ignore", invalid="ignore"):
                np.copyto(out, block, casting="unsafe")
            if self.dtype == "float16" and np.any(np.isinf(out) & np.isfinite(block)):
                largest = np.abs(block[np.isfinite(block)].astype(np.float64)).max()
                raise UserError(f"dtype: {largest:.6g} does not fit float16; choose --dtype bfloat16")


def cast(x: Expression, dtype: str) -> Expression:
    """`x` in `dtype`; itself where nothing changes."""
    return x if x.dtype == dtype else Cast(x, dtype)
