"""Lazy tensor expressions: shape and dtype are known without reading a byte.

An expression is evaluated by rows (axis 0), so a tensor of any size passes through in blocks.
Arithmetic happens in float32 or wider, and one `Cast` at the end rounds once.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np

from builder.errors import UserError

Array = np.ndarray

NUMPY_DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def wide(*dtypes: str) -> str:
    """The dtype in which arithmetic on `dtypes` happens."""
    return "float64" if "float64" in dtypes else "float32"


class Expression(ABC):
    """A tensor yet to be computed; its rows can be had in any order."""

    shape: tuple[int, ...]
    dtype: str

    @abstractmethod
    def read(self, start: int, stop: int) -> Array:
        """Rows start..stop as a C-contiguous array of `dtype`, [stop - start, *shape[1:]]."""

    def read_all(self) -> Array:
        return self.read(0, self.shape[0])

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * NUMPY_DTYPES[self.dtype].itemsize

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.row_bytes


@dataclass(frozen=True)
class Source(Expression):
    """A tensor stored in a file, row-major, from byte `offset` on."""

    file: Path
    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: str

    def read(self, start: int, stop: int) -> Array:
        out = np.empty((stop - start, *self.shape[1:]), NUMPY_DTYPES[self.dtype])
        view = out.reshape(-1).view(np.uint8).data
        position = self.offset + start * self.row_bytes
        handle = os.open(self.file, os.O_RDONLY)
        try:
            while view:
                count = os.preadv(handle, [view], position)
                if count == 0:
                    raise UserError(f"{self.file}: ends inside tensor {self.name!r}; copy the file again")
                view, position = view[count:], position + count
        finally:
            os.close(handle)
        return out


@dataclass(frozen=True)
class Slice(Expression):
    """Indices start..stop of one axis."""

    x: Expression
    axis: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return _resized(self.x.shape, self.axis, self.stop - self.start)

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.x.dtype

    def read(self, start: int, stop: int) -> Array:
        if self.axis == 0:
            return self.x.read(self.start + start, self.start + stop)
        return np.ascontiguousarray(self.x.read(start, stop)[:, self.start : self.stop])


@dataclass(frozen=True)
class Concat(Expression):
    """Tensors of one dtype side by side along an axis."""

    parts: tuple[Expression, ...]
    axis: int

    def __post_init__(self) -> None:
        assert len({p.dtype for p in self.parts}) == 1, "parts of one dtype"
        assert len({_resized(p.shape, self.axis, 0) for p in self.parts}) == 1, "parts of one shape"

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return _resized(self.parts[0].shape, self.axis, sum(p.shape[self.axis] for p in self.parts))

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.parts[0].dtype

    def read(self, start: int, stop: int) -> Array:
        if self.axis == 1:
            return np.concatenate([p.read(start, stop) for p in self.parts], axis=1)
        pieces, first = [], 0
        for part in self.parts:
            low, high = max(start - first, 0), min(stop - first, part.shape[0])
            if low < high:
                pieces.append(part.read(low, high))
            first += part.shape[0]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=0)


@dataclass(frozen=True)
class Pad(Expression):
    """Zeros after the end of an axis, up to `size`."""

    x: Expression
    axis: int
    size: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return _resized(self.x.shape, self.axis, self.size)

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.x.dtype

    def read(self, start: int, stop: int) -> Array:
        out = np.zeros((stop - start, *self.shape[1:]), NUMPY_DTYPES[self.dtype])
        if self.axis == 1:
            out[:, : self.x.shape[1]] = self.x.read(start, stop)
        elif start < self.x.shape[0]:
            last = min(stop, self.x.shape[0])
            out[: last - start] = self.x.read(start, last)
        return out


@dataclass(frozen=True)
class ScaleColumns(Expression):
    """x @ diag(scale), in float32 or wider."""

    x: Expression
    scale: Expression

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.x.shape

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return wide(self.x.dtype, self.scale.dtype)

    def read(self, start: int, stop: int) -> Array:
        dtype = NUMPY_DTYPES[self.dtype]
        return self.x.read(start, stop).astype(dtype) * self.scale.read_all().astype(dtype)


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

    def read(self, start: int, stop: int) -> Array:
        dtype = NUMPY_DTYPES[self.dtype]
        return self.a.read(start, stop).astype(dtype) / self.b.read(start, stop).astype(dtype)


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

    def read(self, start: int, stop: int) -> Array:
        stacked = np.stack([x.read(start, stop).astype(np.float64) for x in self.norms])
        base = np.sqrt(np.square(stacked).mean(axis=0)).astype(NUMPY_DTYPES[self.dtype])
        return np.where(base == 0, np.ones_like(base), base)


@dataclass(frozen=True)
class Cast(Expression):
    """The same numbers in another dtype, rounded to nearest even."""

    x: Expression
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.x.shape

    def read(self, start: int, stop: int) -> Array:
        return self.x.read(start, stop).astype(NUMPY_DTYPES[self.dtype])


def cast(x: Expression, dtype: str) -> Expression:
    """`x` in `dtype`; itself where nothing changes."""
    return x if x.dtype == dtype else Cast(x, dtype)


def concat(parts: list[Expression], axis: int) -> Expression:
    """The parts side by side; a single one is itself."""
    return parts[0] if len(parts) == 1 else Concat(tuple(parts), axis)


def pad(x: Expression, axis: int, size: int) -> Expression:
    """`x` with zeros up to `size`; itself where it has that size."""
    return x if x.shape[axis] == size else Pad(x, axis, size)


def _resized(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])
