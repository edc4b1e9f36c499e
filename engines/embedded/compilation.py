"""From a TensorRT-LLM checkpoint to an engine directory. Imports no torch: it compiles in other processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from builder import trtllm, writer
from builder.checkpoint import Checkpoint
from builder.errors import UserError
from builder.storage import output_directory
from engines.embedded import target
from engines.embedded.process import child_environment, package_root
from engines.manifest import Manifest

DTYPES = ("float32", "bfloat16")

Report = Callable[[str], None]


def build(
    checkpoint_dir: Path,
    output: Path,
    *,
    max_batch_size: int = 4,
    max_input_len: int | None = None,
    max_seq_len: int | None = None,
    dtype: str | None = None,
    progress: Report | None = None,
) -> Manifest:
    """Compile `checkpoint_dir` into a new directory `output`; `progress` gets a line a stage.

    Limits default to the model's max_position_embeddings and half of it; `dtype` to the checkpoint's.
    Raises UserError for a checkpoint or limit that does not fit, no C++ compiler, a failed
    compilation, or an output that exists; nothing is left behind then.
    """
    report = progress or (lambda line: None)
    checkpoint = trtllm.read(checkpoint_dir)
    if checkpoint.pp_size > 1:
        raise UserError(
            f"pp_size: {checkpoint.pp_size} in {checkpoint_dir}, the embedded engine has tensor "
            "parallelism only; convert with --pp 1"
        )
    if checkpoint.quant_algo:
        raise UserError(
            f"quant_algo: {checkpoint.quant_algo} in {checkpoint_dir}, the embedded engine has no FP8; "
            "convert without --quant, or build with --backend tensorrt-llm"
        )
    if checkpoint.tp_size > 1 and checkpoint.architecture.has_linear:
        raise UserError(
            f"tp_size: {checkpoint.tp_size} in {checkpoint_dir}, whose attention or FFN is a matrix in some "
            "layer; the embedded engine runs that with --tp 1"
        )
    longest = checkpoint.architecture.max_position_embeddings if max_seq_len is None else max_seq_len
    manifest = Manifest(
        backend=target.BACKEND,
        checkpoint_digest=checkpoint.digest,
        architecture=checkpoint.architecture,
        dtype=_engine_dtype(checkpoint.dtype, dtype),
        tp_size=checkpoint.tp_size,
        pp_size=checkpoint.pp_size,
        max_batch_size=max_batch_size,
        max_input_len=longest // 2 if max_input_len is None else max_input_len,
        max_seq_len=longest,
        hardware=target.this_hardware(),
        compiler=target.this_compiler(),
    )
    _check_limits(manifest)
    ranks = [checkpoint.rank(r).cast(manifest.dtype) for r in range(checkpoint.tp_size)]
    num_bytes = sum(x.num_bytes for rank in ranks for x in rank.decoder_tensors().values())
    with output_directory(output, num_bytes) as directory:
        manifest.write(directory)
        with _compiling(directory) as compilations:
            _write_weights(directory, ranks, report)
            for compilation in compilations:
                compilation.wait(report)
    return manifest


def _engine_dtype(stored: str, wanted: str | None) -> str:
    dtype = wanted or stored
    if dtype not in DTYPES:
        whose = "asked for" if wanted else "of the checkpoint"
        raise UserError(f"dtype: {dtype!r} {whose} is not one the CPU engine runs; give --dtype bfloat16")
    return dtype


def _check_limits(manifest: Manifest) -> None:
    longest = manifest.architecture.max_position_embeddings
    for name in ("max_batch_size", "max_input_len"):
        if getattr(manifest, name) < 1:
            raise UserError(f"{name}: {getattr(manifest, name)} is not positive; give at least 1")
    if not 4 <= manifest.max_seq_len <= longest:
        raise UserError(
            f"max_seq_len: {manifest.max_seq_len} is not between 4 and the model's "
            f"max_position_embeddings {longest}"
        )
    if manifest.max_input_len >= manifest.max_seq_len:
        raise UserError(
            f"max_input_len: {manifest.max_input_len} leaves no room for output in max_seq_len "
            f"{manifest.max_seq_len}; lower it"
        )


def _write_weights(directory: Path, ranks: list[Checkpoint], report: Report) -> None:
    start = time.monotonic()
    files = {f"rank{index}.safetensors": rank.decoder_tensors() for index, rank in enumerate(ranks)}
    writer.write(directory, files)
    report(
        f"weights of {len(ranks)} rank{'s' * (len(ranks) > 1)} written in {time.monotonic() - start:.1f} s"
    )


@dataclass(kw_only=True)
class _Compilation:
    """One program being compiled by its own process."""

    kind: str
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    start: float

    def wait(self, report: Report) -> None:
        if self.process.wait():
            self.log.seek(0)
            text = self.log.read().decode(errors="replace")
            print(text, file=sys.stderr)  # noqa: T201  the compiler's own words, before the one line
            last = (text.strip().splitlines() or [f"exit status {self.process.returncode}"])[-1]
            raise UserError(f"{self.kind}: torch {target.torch_version()} cannot compile the program: {last}")
        report(f"{self.kind} program compiled in {time.monotonic() - self.start:.1f} s")


@contextmanager
def _compiling(directory: Path) -> Iterator[list[_Compilation]]:
    """All programs side by side; none survives the block."""
    compilations: list[_Compilation] = []
    try:
        for kind in target.KINDS:
            log = (directory / f".{kind}.log").open("w+b")
            command = [sys.executable, "-m", "engines.embedded.program", str(directory), kind]
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=package_root(),
                env=child_environment(),
                start_new_session=True,
            )
            compilations.append(_Compilation(kind=kind, process=process, log=log, start=time.monotonic()))
        yield compilations
    finally:
        for compilation in compilations:
            _end(compilation)
            (directory / f".{compilation.kind}.log").unlink(missing_ok=True)


def _end(compilation: _Compilation) -> None:
    if compilation.process.poll() is None:
        os.killpg(compilation.process.pid, signal.SIGKILL)  # with the C++ compiler it started
        compilation.process.wait()
    compilation.log.close()
