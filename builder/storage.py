"""JSON files, digests of model directories, and output directories that appear whole."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from builder.errors import UserError
from builder.tensorfile import MAX_HEADER


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


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """The content of a JSON file."""
    return (json.dumps(value, indent=2) + "\n").encode()


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    file.write_bytes(json_bytes(value))


def headers_digest(config: Path, files: Iterable[Path]) -> str:
    """SHA-256 over a config and the headers and sizes of its weight files; contents are not read."""
    digest = hashlib.sha256(config.read_bytes())
    for file in sorted(files):
        with file.open("rb") as stream:
            length = stream.read(8)
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + length)
            digest.update(stream.read(min(int.from_bytes(length, "little"), MAX_HEADER)))
    return digest.hexdigest()


@contextmanager
def output_directory(path: Path, num_bytes: int = 0) -> Iterator[Path]:
    """A directory that appears at `path` when the block ends well, and not at all when it does not.

    `num_bytes` is what will be written, checked against the free space first. What killed processes
    left of an earlier attempt is removed.
    """
    path = path.absolute()
    if os.path.lexists(path):
        raise UserError(f"{path}: exists; remove it or choose another output directory")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such directory; create it first")
    _sweep(path)
    free = shutil.disk_usage(path.parent).free
    if num_bytes > free:
        raise UserError(f"{path}: needs {num_bytes:,} bytes, {free:,} are free; choose another disk")
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    handle = None
    try:
        partial.mkdir()
        handle = os.open(partial, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)  # held for as long as this process lives
        yield partial
        partial.rename(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; nothing was left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _sweep(path: Path) -> None:
    """Remove the partial directories of `path` that no living process holds."""
    prefix = f".{path.name}.partial-"
    for partial in [x for x in path.parent.iterdir() if x.name.startswith(prefix)]:
        with contextlib.suppress(OSError):
            handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(partial, ignore_errors=True)
            finally:
                os.close(handle)
