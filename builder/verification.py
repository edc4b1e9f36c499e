"""Re-read a model directory: headers, shapes, dtypes, finite numbers, and digests where it has them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from builder import huggingface, manifest, trtllm
from builder.errors import UserError
from builder.storage import read_json
from builder.tensorfile import read_header
from builder.tensors import Array, Source, bands, scratch
from builder.trtllm.reading import TrtllmCheckpoint
from builder.writer import BLOCK_BYTES, Progress, default_threads

# For each element size the bits without the sign, and the smallest of them that is not finite.
_BITS: dict[str, tuple[Any, int, int]] = {
    "bfloat16": (np.uint16, 0x7FFF, 0x7F80),
    "float16": (np.uint16, 0x7FFF, 0x7C00),
}
_BITS["float8_e4m3fn"] = (np.uint8, 0x7F, 0x7F)


@dataclass(kw_only=True)
class Report:
    """`problems` name a file, a tensor where it is one, and what is wrong."""

    files: int = 0
    tensors: int = 0
    bytes: int = 0
    digests: bool = False  # whether there were digests to compare with
    problems: list[str] = field(default_factory=list)


def weight_bytes(directory: Path) -> int:
    """What `verify` will read."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def verify(directory: Path, *, threads: int | None = None, progress: Progress | None = None) -> Report:
    """Check a Hugging Face or TensorRT-LLM checkpoint directory, its ffn-fusion.json if it has one.

    Raises UserError where the directory cannot be looked at: all else is a problem in the report.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    record = manifest.read(directory)
    entries = record["files"] if record else {}
    report = Report(digests=record is not None)
    for name, entry in entries.items():
        if "tensors" not in entry:
            _check_small(directory / name, entry, report)
    _note(report, partial(check_shapes, directory))
    named = {directory / name for name, entry in entries.items() if "tensors" in entry}
    for file in sorted({*directory.glob("*.safetensors"), *named}):
        entry = entries.get(file.name)
        if record and entry is None:
            report.problems.append(f"{file.name}: not in {manifest.NAME}")
        report.files += 1
        _note(report, partial(_check_weights, file, entry, report, threads, progress))
    return report


def _note(report: Report, check: Callable[[], None]) -> None:
    try:
        check()
    except (UserError, OSError) as error:
        report.problems.append(str(error))


def _check_small(file: Path, entry: dict[str, Any], report: Report) -> None:
    report.files += 1
    if not file.is_file():
        report.problems.append(f"{file.name}: missing")
    elif xxhash.xxh3_128_hexdigest(file.read_bytes()) != entry["xxh3_128"]:
        report.problems.append(f"{file.name}: changed since it was written")


def check_shapes(directory: Path) -> None:
    """Every tensor is there, of the shape and dtype that config.json says."""
    if "architecture" not in read_json(directory / "config.json"):
        huggingface.read(directory)
        return
    checkpoint = trtllm.read(directory)
    for rank in range(checkpoint.world_size):
        _check_rank(checkpoint, rank)


def _check_rank(checkpoint: TrtllmCheckpoint, rank: int) -> None:
    file = checkpoint.directory / f"rank{rank}.safetensors"
    stored, expected = read_header(file), checkpoint.stored_shapes(rank)
    for name in sorted(stored.keys() | expected.keys()):
        if name not in stored:
            raise UserError(f"{file.name}: tensor {name!r} is missing")
        if name not in expected:
            raise UserError(f"{file.name}: tensor {name!r} is not part of the architecture")
        have, want = (stored[name].dtype, stored[name].shape), expected[name]
        if have != want:
            raise UserError(
                f"{file.name}: tensor {name!r} is {have[0]} {list(have[1])}, "
                f"config.json says {want[0]} {list(want[1])}"
            )


def _check_weights(
    file: Path,
    entry: dict[str, Any] | None,
    report: Report,
    threads: int | None,
    progress: Progress | None,
) -> None:
    sources = read_header(file)
    digests = entry["tensors"] if entry else {}
    for name in sorted(digests.keys() - sources.keys()):
        report.problems.append(f"{file.name}: tensor {name!r} is missing")
    if entry and _header_digest(file) != entry["header"]:
        report.problems.append(f"{file.name}: header changed since it was written")
    with ThreadPoolExecutor(threads or default_threads()) as pool:
        checks = pool.map(lambda x: _check_tensor(x, digests.get(x.name), progress), sources.values())
        for problem in checks:
            report.problems += [f"{file.name}: {problem}"] if problem else []
    report.tensors += len(sources)
    report.bytes += sum(x.num_bytes for x in sources.values())


def _header_digest(file: Path) -> str:
    with file.open("rb") as stream:
        length = stream.read(8)
        return xxhash.xxh3_128_hexdigest(length + stream.read(int.from_bytes(length, "little")))


def _check_tensor(x: Source, expected: str | None, progress: Progress | None) -> str | None:
    digest, finite = xxhash.xxh3_128(), True
    for band in bands(x.rows, x.row_bytes, BLOCK_BYTES):
        with scratch.borrow((band.stop - band.start, x.columns), x.dtype) as block:
            x.fill(block, band.start, 0)
            digest.update(block.reshape(-1).view(np.uint8).data)
            finite = finite and _all_finite(block, x.dtype)
            if progress:
                progress(block.nbytes)
    if expected is not None and digest.hexdigest() != expected:
        return f"tensor {x.name!r} differs from what was written"
    return None if finite else f"tensor {x.name!r} holds numbers that are not finite"


def _all_finite(block: Array, dtype: str) -> bool:
    if dtype not in _BITS:
        return bool(np.isfinite(block).all())
    unsigned, magnitude, limit = _BITS[dtype]
    return int(np.bitwise_and(block.view(unsigned), magnitude).max(initial=0)) < limit
