"""The safetensors format: what a file holds is read from its header, and laid out before it is written.

8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the tensors
(https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from builder.errors import UserError
from builder.tensors import FP8, INT8, NUMPY_DTYPES, Expression, Handle, Source

SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": FP8,
    "I8": INT8,
}
_NAMES = {ours: theirs for theirs, ours in SAFETENSORS_DTYPES.items()}
MAX_HEADER = 100_000_000  # what the safetensors library accepts
_MAX_SIZE = 1 << 63


def read_header(file: Path) -> dict[str, Source]:
    """The tensors of a safetensors file, none of them read. Raises UserError on a broken file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise UserError(f"{file}: truncated or not safetensors; copy the file again")
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise UserError(f"{file}: missing; copy the whole model directory") from None
    except _DuplicateKeyError as error:
        raise UserError(f"{file}: header names {error} twice; copy the file again") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file}: header is not valid JSON; copy the file again") from None
    if not isinstance(header, dict):
        raise UserError(f"{file}: header is not a JSON object; copy the file again")
    header.pop("__metadata__", None)
    handle = Handle(file)
    sources = {name: _source(handle, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_layout(file, sources.values(), 8 + length, size)
    return sources


class _DuplicateKeyError(Exception):
    """A JSON object names a key twice; which value is meant nobody can say."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _DuplicateKeyError(repr(key))
        values[key] = value
    return values


def _source(handle: Handle, name: str, entry: Any, start: int, size: int) -> Source:
    file = handle.file
    try:
        shape = tuple(entry["shape"])
        first, last = entry["data_offsets"]
        stored = entry["dtype"]
        if not all(type(n) is int and 0 <= n < _MAX_SIZE for n in (*shape, first, last)):
            raise ValueError
        if not isinstance(stored, str):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{file}: tensor {name!r} has a broken header entry; copy the file again") from None
    dtype = SAFETENSORS_DTYPES.get(stored)
    if dtype is None:
        known = ", ".join(SAFETENSORS_DTYPES)
        raise UserError(f"{file}: tensor {name!r} has dtype {stored!r}; supported are {known}")
    if last - first != prod(shape) * NUMPY_DTYPES[dtype].itemsize:
        raise UserError(
            f"{file}: tensor {name!r} has {last - first} bytes, not what shape {list(shape)} needs"
        )
    if start + last > size:
        raise UserError(f"{file}: truncated inside tensor {name!r}; copy the file again")
    return Source(handle, name, start + first, shape, dtype)


def _check_layout(file: Path, sources: Iterable[Source], start: int, size: int) -> None:
    position = start
    for source in sorted(sources, key=lambda x: (x.offset, x.num_bytes)):
        if source.offset != position:
            raise UserError(f"{file}: tensor {source.name!r} overlaps another or leaves a hole")
        position += source.num_bytes
    if position != size:
        raise UserError(f"{file}: {size - position} bytes belong to no tensor; copy the file again")


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a file will lie, in the order the safetensors library uses."""

    header: bytes
    offsets: dict[str, int]  # byte of the file at which a tensor begins
    num_bytes: int  # of the whole file

    @classmethod
    def of(cls, tensors: Mapping[str, Expression]) -> Layout:
        """The layout of a file that holds `tensors`."""
        ordered = sorted(tensors.items(), key=lambda x: (-NUMPY_DTYPES[x[1].dtype].itemsize, x[0]))
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        relative, end = {}, 0
        for name, x in ordered:
            begin, end = end, end + x.num_bytes
            relative[name] = begin
            entries[name] = {"dtype": _NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        offsets = {name: len(header) + begin for name, begin in relative.items()}
        return cls(header, offsets, len(header) + end)
