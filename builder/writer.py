"""Evaluate the tensors of many files at once, block by block, on several threads.

Column cuts of one tensor, and copies of it, are written together: the tensor is read once and its
parts go to their files. A tensor's digest is the XXH3-128 of its bytes, which the writer sees anyway.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from builder.errors import UserError
from builder.tensorfile import Layout
from builder.tensors import Expression, Slice, bands, scratch

BLOCK_BYTES = 8 << 20  # large enough for the file system, small enough for the caches
Progress = Callable[[int], None]  # called with the bytes just written
Digests = dict[str, dict[str, str]]  # file -> tensor -> hexadecimal XXH3-128


def default_threads() -> int:
    """One more than the cores this process may use, 16 at most: some thread always waits for a disk."""
    return min(16, len(os.sched_getaffinity(0)) + 1)


def write(
    directory: Path,
    files: Mapping[str, Mapping[str, Expression]],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Digests:
    """Write each file's tensors into `directory`; returns their digests.

    The bytes are the same for any number of threads. Peak memory is a few blocks a thread, whatever
    the size of the tensors. Raises OSError on a full disk, UserError on a source that ends early.
    """
    digests: Digests = {name: {} for name in files}
    stop = threading.Event()
    with ExitStack() as stack:
        targets = []
        for name, tensors in files.items():
            layout = Layout.of(tensors)
            handle = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            stack.callback(os.close, handle)
            _write_at(handle, layout.header, 0)
            file = _File(name, handle)
            targets += [_Target(file, tensor, x, layout.offsets[tensor]) for tensor, x in tensors.items()]
        pool = stack.enter_context(ThreadPoolExecutor(threads or default_threads()))
        stack.callback(stop.set)  # before the pool waits for its threads
        jobs = [pool.submit(_write_group, group, stop, progress) for group in _groups(targets)]
        for job in as_completed(jobs):
            for target, digest in job.result():
                digests[target.file.name][target.tensor] = digest
    return {name: dict(sorted(tensors.items())) for name, tensors in digests.items()}


@dataclass(frozen=True)
class _File:
    """An open file. One thread writes to it at a time: the kernel would let the others spin."""

    name: str
    handle: int
    busy: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class _Target:
    """A tensor's place in a file."""

    file: _File
    tensor: str
    x: Expression
    offset: int

    @property
    def base(self) -> Expression:
        """What the tensor is cut from by columns, or itself."""
        return self.x.x if isinstance(self.x, Slice) and self.x.axis == 1 else self.x

    @property
    def first(self) -> int:
        """The first column of `base`."""
        return self.x.start if isinstance(self.x, Slice) and self.x.axis == 1 else 0


def _groups(targets: list[_Target]) -> list[list[_Target]]:
    """Targets with one base together.

    The largest come first, so that threads end together; the same tensor of other files next to each
    other, so that threads write to unlike files.
    """
    groups: dict[int, list[_Target]] = {}
    for target in targets:
        groups.setdefault(id(target.base), []).append(target)
    return sorted(
        groups.values(),
        key=lambda group: (-sum(t.x.num_bytes for t in group), group[0].tensor, group[0].file.name),
    )


def _write_group(
    group: list[_Target], stop: threading.Event, progress: Progress | None
) -> list[tuple[_Target, str]]:
    hashes = [xxhash.xxh3_128() for _ in group]
    try:
        for start, parts in _blocks(group):
            if stop.is_set():
                break
            _write_parts(start, list(zip(group, parts, strict=True)))
            for digest, part in zip(hashes, parts, strict=True):
                digest.update(part)
            if progress:
                progress(sum(map(len, parts)))
    except UserError as error:
        raise UserError(f"tensor {group[0].tensor!r}: {error}") from None
    return [(target, digest.hexdigest()) for target, digest in zip(group, hashes, strict=True)]


def _write_parts(start: int, pending: list[tuple[_Target, memoryview]]) -> None:
    """Write each target's rows from `start` on; those whose file is free come first."""
    while pending:
        free = (i for i, (target, _) in enumerate(pending) if target.file.busy.acquire(blocking=False))
        index = next(free, None)
        if index is None:
            index = 0
            pending[0][0].file.busy.acquire()
        target, data = pending.pop(index)
        try:
            _write_at(target.file.handle, data, target.offset + start * target.x.row_bytes)
        finally:
            target.file.busy.release()


def _blocks(group: list[_Target]) -> Iterator[tuple[int, list[memoryview]]]:
    """Block by block: its first row, and the bytes of each target's part of it."""
    base = group[0].base
    first = min(t.first for t in group)
    width = max(t.first + t.x.columns for t in group) - first
    row_bytes = width * base.row_bytes // max(1, base.columns)
    for band in bands(base.rows, row_bytes, BLOCK_BYTES):
        rows = band.stop - band.start
        with scratch.borrow((rows, width), base.dtype) as block, ExitStack() as stack:
            base.fill(block, band.start, first)
            parts = []
            for target in group:
                part = block[:, target.first - first :][:, : target.x.columns]
                if not part.flags.c_contiguous:
                    whole = stack.enter_context(scratch.borrow((rows, target.x.columns), base.dtype))
                    np.copyto(whole, part)
                    part = whole
                parts.append(part.reshape(-1).view(np.uint8).data)
            yield band.start, parts


def _write_at(handle: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count
