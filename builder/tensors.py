"""Lazy tensor expressions: shape and dtype are known without reading a byte.

Every tensor is seen as a matrix, [shape[0], the rest]. An expression fills any window of it, so a
tensor of any size passes through in blocks, and a column cut of joined tensors reads only the parts
it needs. Here bytes only move; `builder.arithmetic` computes.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np

from builder.errors import UserError

Array = np.ndarray

FP8 = "float8_e4m3fn"
INT8 = "int8"
NUMPY_DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    FP8: np.dtype(ml_dtypes.float8_e4m3fn),
    INT8: np.dtype(np.int8),
}
_BAND_BYTES = 1 << 20  # what stays in a core's cache


class _Scratch(threading.local):
    """Buffers a thread uses again and again: fresh memory costs more than the work done in it."""

    def __init__(self) -> None:
        self.free: list[Array] = []

    @contextmanager
    def borrow(self, shape: tuple[int, int], dtype: str) -> Iterator[Array]:
        """A C-contiguous matrix with arbitrary contents."""
        kind = NUMPY_DTYPES[dtype]
        size = prod(shape) * kind.itemsize
        buffer = self.free.pop() if self.free else np.empty(0, np.uint8)
        if buffer.size < size:
            buffer = np.empty(size, np.uint8)
        try:
            yield buffer[:size].view(kind).reshape(shape)
        finally:
            self.free.append(buffer)


scratch = _Scratch()


class Expression(ABC):
    """A tensor yet to be computed; any window of it can be had, in any order."""

    shape: tuple[int, ...]
    dtype: str

    @abstractmethod
    def fill(self, out: Array, row: int, column: int) -> None:
        """Write the window that begins at (row, column) and has `out`'s shape into `out`, of `dtype`."""

    def read(self, start: int, stop: int) -> Array:
        """Rows start..stop as a new array, [stop - start, *shape[1:]]."""
        out = np.empty((stop - start, self.columns), NUMPY_DTYPES[self.dtype])
        self.fill(out, start, 0)
        return out.reshape(stop - start, *self.shape[1:])

    def read_all(self) -> Array:
        """The whole tensor."""
        return self.read(0, self.rows).reshape(self.shape)

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        return prod(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        return self.columns * NUMPY_DTYPES[self.dtype].itemsize

    @property
    def num_bytes(self) -> int:
        return self.rows * self.row_bytes


def bands(rows: int, row_bytes: int, band_bytes: int = _BAND_BYTES) -> Iterator[slice]:
    """0..rows in slices of about `band_bytes`, one row at least."""
    step = max(1, band_bytes // max(1, row_bytes))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class Handle:
    """A file opened for reading when it is first needed, closed with its last tensor."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._number: int | None = None
        self._opening = threading.Lock()

    @property
    def number(self) -> int:
        """The file descriptor."""
        with self._opening:
            if self._number is None:
                self._number = os.open(self.file, os.O_RDONLY)
            return self._number

    def __del__(self) -> None:
        if self._number is not None:
            os.close(self._number)


@dataclass(frozen=True)
class Source(Expression):
    """A tensor stored in a file, row-major, from byte `offset` on."""

    handle: Handle
    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def file(self) -> Path:
        return self.handle.file

    def fill(self, out: Array, row: int, column: int) -> None:
        if out.shape[1] == self.columns and out.flags.c_contiguous:
            self._read(out, row)
            return
        for band in bands(out.shape[0], self.row_bytes):
            with scratch.borrow((band.stop - band.start, self.columns), self.dtype) as rows:
                self._read(rows, row + band.start)
                out[band] = rows[:, column : column + out.shape[1]]

    def _read(self, out: Array, row: int) -> None:
        view = out.reshape(-1).view(np.uint8).data
        position = self.offset + row * self.row_bytes
        while view:
            count = os.preadv(self.handle.number, [view], position)
            if count == 0:
                raise UserError(f"{self.file}: ends inside tensor {self.name!r}; copy the file again")
            view, position = view[count:], position + count


@dataclass(frozen=True)
class Declared(Expression):
    """A tensor whose weights are not at hand: a bare config.json says that it is there."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def fill(self, out: Array, row: int, column: int) -> None:
        raise UserError(f"tensor {self.name}: only a config.json was given; give the model directory")


@dataclass(frozen=True)
class Constant(Expression):
    """Numbers at hand."""

    values: Array
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.values.shape

    def fill(self, out: Array, row: int, column: int) -> None:
        matrix = self.values.reshape(self.shape[0], -1)
        out[...] = matrix[row : row + out.shape[0], column : column + out.shape[1]]


class Same(Expression):
    """An expression over one `x`, of the same shape and dtype unless it says otherwise."""

    x: Expression

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.x.shape

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.x.dtype


@dataclass(frozen=True)
class Slice(Same):
    """Indices start..stop of one axis."""

    x: Expression
    axis: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return resized(self.x.shape, self.axis, self.stop - self.start)

    def fill(self, out: Array, row: int, column: int) -> None:
        if self.axis == 0:
            self.x.fill(out, self.start + row, column)
        else:
            self.x.fill(out, row, self.start + column)


@dataclass(frozen=True)
class Take(Same):
    """The given indices of one axis, in ascending order."""

    x: Expression
    axis: int
    indices: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return resized(self.x.shape, self.axis, len(self.indices))

    def fill(self, out: Array, row: int, column: int) -> None:
        if self.axis == 0:
            for low, high in _runs(self.indices[row : row + out.shape[0]]):
                self.x.fill(out[low:high], self.indices[row + low], column)
            return
        wanted = np.array(self.indices[column : column + out.shape[1]])
        first, span = int(wanted[0]), int(wanted[-1] - wanted[0]) + 1
        for band in bands(out.shape[0], span * out.itemsize):
            with scratch.borrow((band.stop - band.start, span), self.dtype) as rows:
                self.x.fill(rows, row + band.start, first)
                out[band] = rows[:, wanted - first]


def _runs(indices: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Places low..high at which ascending `indices` are consecutive numbers."""
    breaks = [i + 1 for i, (a, b) in enumerate(pairwise(indices)) if b != a + 1]
    yield from pairwise([0, *breaks, len(indices)])


@dataclass(frozen=True)
class Concat(Expression):
    """Tensors of one dtype side by side along an axis."""

    parts: tuple[Expression, ...]
    axis: int

    def __post_init__(self) -> None:
        assert len({p.dtype for p in self.parts}) == 1, "parts of one dtype"
        assert len({resized(p.shape, self.axis, 0) for p in self.parts}) == 1, "parts of one shape"

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return resized(self.parts[0].shape, self.axis, sum(p.shape[self.axis] for p in self.parts))

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.parts[0].dtype

    def fill(self, out: Array, row: int, column: int) -> None:
        start = (row, column)[self.axis]
        stop, first = start + out.shape[self.axis], 0
        for part in self.parts:
            size = part.shape[self.axis]
            low, high = max(start, first), min(stop, first + size)
            if low < high and self.axis == 0:
                part.fill(out[low - start : high - start], low - first, column)
            elif low < high:
                part.fill(out[:, low - start : high - start], row, low - first)
            first += size


@dataclass(frozen=True)
class Pad(Same):
    """Zeros after the end of an axis, up to `size`."""

    x: Expression
    axis: int
    size: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return resized(self.x.shape, self.axis, self.size)

    def fill(self, out: Array, row: int, column: int) -> None:
        start = (row, column)[self.axis]
        held = max(0, min(self.x.shape[self.axis] - start, out.shape[self.axis]))
        inside, outside = (out[:held], out[held:]) if self.axis == 0 else (out[:, :held], out[:, held:])
        outside[...] = 0
        if held:
            self.x.fill(inside, row, column)


def concat(parts: list[Expression], axis: int) -> Expression:
    """The parts side by side; a single one is itself."""
    return parts[0] if len(parts) == 1 else Concat(tuple(parts), axis)


def pad(x: Expression, axis: int, size: int) -> Expression:
    """`x` with zeros up to `size`; itself where it has that size."""
    return x if x.shape[axis] == size else Pad(x, axis, size)


def resized(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])
