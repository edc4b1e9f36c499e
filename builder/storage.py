"""Safetensors files read by their header and written in one stream, and outputs that appear whole.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
then the tensors (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from builder.errors import UserError
from builder.tensors import NUMPY_DTYPES, Expression, Source

SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NAMES = {ours: theirs for theirs, ours in SAFETENSORS_DTYPES.items()}
_MAX_HEADER = 100_000_000  # what the safetensors library accepts
_BLOCK_BYTES = 8 << 20

Progress = Callable[[int], None]  # called with the bytes just written


def read_header(file: Path) -> dict[str, Source]:
    """The tensors of a safetensors file, none of them read. Raises UserError on a broken file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise UserError(f"{file}: truncated or not safetensors; copy the file again")
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise UserError(f"{file}: missing; copy the whole model directory") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file}: header is not valid JSON; copy the file again") from None
    if not isinstance(header, dict):
        raise UserError(f"{file}: header is not a JSON object; copy the file again")
    header.pop("__metadata__", None)
    sources = {name: _source(file, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_layout(file, sources.values(), 8 + length, size)
    return sources


def _source(file: Path, name: str, entry: Any, start: int, size: int) -> Source:
    try:
        shape = tuple(entry["shape"])
        first, last = entry["data_offsets"]
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        if not all(type(n) is int and n >= 0 for n in (*shape, first, last)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{file}: tensor {name!r} has a broken header entry; copy the file again") from None
    if dtype is None:
        known = ", ".join(SAFETENSORS_DTYPES)
        raise UserError(f"{file}: tensor {name!r} has dtype {entry['dtype']!r}; supported are {known}")
    if last - first != prod(shape) * NUMPY_DTYPES[dtype].itemsize:
        raise UserError(
            f"{file}: tensor {name!r} has {last - first} bytes, not what shape {list(shape)} needs"
        )
    if start + last > size:
        raise UserError(f"{file}: truncated inside tensor {name!r}; copy the file again")
    return Source(file, name, start + first, shape, dtype)


def _check_layout(file: Path, sources: Iterable[Source], start: int, size: int) -> None:
    position = start
    for source in sorted(sources, key=lambda x: (x.offset, x.num_bytes)):
        if source.offset != position:
            raise UserError(f"{file}: tensor {source.name!r} overlaps another or leaves a hole")
        position += source.num_bytes
    if position != size:
        raise UserError(f"{file}: {size - position} bytes belong to no tensor; copy the file again")


def write_safetensors(
    file: Path, tensors: Mapping[str, Expression], progress: Progress | None = None
) -> None:
    """Evaluate `tensors` block by block into `file`, in the order the safetensors library uses.

    Peak memory is a few blocks of 8 MiB, whatever the size of the tensors.
    """
    ordered = sorted(tensors.items(), key=lambda x: (-NUMPY_DTYPES[x[1].dtype].itemsize, x[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, x in ordered:
        end = offset + x.num_bytes
        header[name] = {"dtype": _NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb", buffering=0) as stream:
        _write(stream, len(text).to_bytes(8, "little") + text)
        for _, x in ordered:
            for block in _blocks(x):
                _write(stream, block)
                if progress:
                    progress(len(block))


def _blocks(x: Expression) -> Iterator[memoryview]:
    rows = max(1, _BLOCK_BYTES // max(1, x.row_bytes))
    for start in range(0, x.shape[0], rows):
        array = x.read(start, min(start + rows, x.shape[0]))
        yield array.reshape(-1).view("uint8").data


def _write(stream: Any, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError where the file is missing or is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: missing; give a directory that has it") from None
    except NotADirectoryError:
        raise UserError(
            f"{file.parent}: not a directory; give the directory that holds {file.name}"
        ) from None
    except (ValueError, RecursionError):
        raise UserError(f"{file}: not valid JSON; copy the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: not a JSON object; copy the file again")
    return value


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def headers_digest(config: Path, files: Iterable[Path]) -> str:
    """SHA-256 over a config and the headers and sizes of its weight files; contents are not read."""
    digest = hashlib.sha256(config.read_bytes())
    for file in sorted(files):
        with file.open("rb") as stream:
            length = stream.read(8)
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + length)
            digest.update(stream.read(min(int.from_bytes(length, "little"), _MAX_HEADER)))
    return digest.hexdigest()


@contextmanager
def output_directory(path: Path, num_bytes: int = 0) -> Iterator[Path]:
    """A directory that appears at `path` when the block ends well, and not at all when it does not.

    `num_bytes` is what will be written, checked against the free space first.
    """
    path = path.absolute()
    if os.path.lexists(path):
        raise UserError(f"{path}: exists; remove it or choose another output directory")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such directory; create it first")
    free = shutil.disk_usage(path.parent).free
    if num_bytes > free:
        raise UserError(f"{path}: needs {num_bytes:,} bytes, {free:,} are free; choose another disk")
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        partial.mkdir()
        yield partial
        partial.rename(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; nothing was left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
