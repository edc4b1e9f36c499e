"""Compiled files that were made before, by their key: a directory in the user's cache."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

SWITCH = "FFN_FUSION_COMPILE_CACHE"  # a directory; empty for none
LIMIT = 1 << 30  # bytes; the files that were used longest ago go first


def directory() -> Path | None:
    """Where compiled files are kept; None where the user wants none."""
    chosen = os.environ.get(SWITCH)
    if chosen is not None:
        return Path(chosen) if chosen else None
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ffn-fusion" / "compiled"


def fetch(key: str, output: Path) -> bool:
    """Copy the file of `key` to `output`; False where there is none."""
    kept = directory()
    if kept is None or not (kept / key).is_file():
        return False
    with contextlib.suppress(FileNotFoundError):  # another process made room
        shutil.copyfile(kept / key, output)
        os.utime(kept / key)
        return True
    return False


def keep(key: str, file: Path) -> None:
    """Keep a compiled file; it appears whole or not at all. A cache that cannot be written is none."""
    kept = directory()
    if kept is None:
        return
    with contextlib.suppress(OSError):
        kept.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=kept, prefix=".")
        os.close(handle)
        try:
            shutil.copyfile(file, scratch)
            Path(scratch).rename(kept / key)
        finally:
            Path(scratch).unlink(missing_ok=True)
        _make_room(kept)


def _make_room(kept: Path) -> None:
    files = sorted(((f.stat().st_mtime, f.stat().st_size, f) for f in kept.iterdir()), reverse=True)
    total = 0
    for _, size, file in files:
        total += size
        if total > LIMIT:
            file.unlink(missing_ok=True)
