"""Directories that belong to one piece of work: what decides it is written down, other work is refused."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from builder.errors import UserError
from builder.storage import json_bytes, read_json


def make(directory: Path, option: str) -> None:
    """The directory where it is missing. Raises UserError where there can be none; `option` named it."""
    if not directory.parent.is_dir():
        raise UserError(f"{directory.parent}: no such directory; create it first")
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: not a directory; choose another {option}")
    directory.mkdir(exist_ok=True)


@contextmanager
def locked(directory: Path, does: str) -> Iterator[None]:
    """For this process alone, while it lives. Raises UserError where another `does` something in it."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{directory}: another process {does} in it; wait for it") from None
        yield
    finally:
        os.close(handle)


def check(directory: Path, name: str, now: Mapping[str, Any], since: str, option: str) -> None:
    """Compare `now` with the file `name` of a directory; write it where nothing else is there yet.

    Raises UserError where the directory is somebody else's, and on the first difference: `since` says when
    the old one was written, and `option` named the directory.
    """
    file = directory / name
    partial = file.with_name(f"{name}.partial")
    if not {x.name for x in directory.iterdir()} - {file.name, partial.name}:
        partial.write_bytes(json_bytes(now))
        partial.rename(file)
        return
    if not file.exists():
        raise UserError(f"{directory}: not empty, and has no {name}; choose another {option}")
    old = read_json(file)
    for key in sorted(old.keys() | now.keys()):
        if old.get(key) != now.get(key):
            raise UserError(
                f"{directory}: {key} was {old.get(key)!r} when {since}, now it is {now.get(key)!r}; give the "
                f"same, or another {option} to begin anew"
            )
