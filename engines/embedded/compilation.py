"""From a TensorRT-LLM checkpoint to an engine directory. Imports no torch: it compiles in other processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from builder import trtllm, writer
from builder.architecture import Window
from builder.errors import UserError
from builder.storage import output_directory
from builder.surgery.parallel import parallelize
from builder.tensors import Expression
from engines.embedded import cache, compiler, target
from engines.embedded.process import end_with_parent, package_root
from engines.embedded.step import BLOCK_SIZE, num_blocks
from engines.embedded.weights import stored
from engines.manifest import Manifest
from engines.mpi import inner_environment

DTYPES = ("float32", "bfloat16")

Report = Callable[[str], None]


def build(
    checkpoint_dir: Path,
    output: Path,
    *,
    max_batch_size: int = 4,
    max_input_len: int | None = None,
    max_seq_len: int | None = None,
    kv_cache_memory: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    quant: str | None = None,
    parallel: Sequence[Window] = (),
    progress: Report | None = None,
) -> Manifest:
    """Compile `checkpoint_dir` into a new directory `output`; `progress` gets a line a stage.

    Limits default to the model's max_position_embeddings and half of it; `dtype` to the checkpoint's.
    `kv_cache_memory` bounds a rank's KV cache in bytes; without it all requests at once have room.
    `device` is "cpu" or "cuda"; `quant` keeps the matrices in 8 bits: "int8" on a CPU, "fp8" on a GPU.
    The layers of each of the windows `parallel` all read its input (`builder.surgery.parallel`).
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
            f"quant_algo: {checkpoint.quant_algo} in {checkpoint_dir}, the embedded engine "
            "quantises by itself; convert without --quant, or build with --backend tensorrt-llm"
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
        architecture=parallelize(checkpoint.architecture, parallel),
        dtype=_engine_dtype(checkpoint.dtype, dtype),
        quant=quant,
        tp_size=checkpoint.tp_size,
        pp_size=checkpoint.pp_size,
        max_batch_size=max_batch_size,
        max_input_len=longest // 2 if max_input_len is None else max_input_len,
        max_seq_len=longest,
        device=device,
        hardware=target.this_hardware(device),
        compiler=target.this_compiler(device),
    )
    manifest.check_limits()
    target.check_device(manifest)
    manifest = replace(manifest, kv_cache_blocks=_kv_cache_blocks(manifest, kv_cache_memory))
    ranks = [stored(checkpoint.rank(r), manifest) for r in range(checkpoint.tp_size)]
    num_bytes = sum(x.num_bytes for rank in ranks for x in rank.values())
    with output_directory(output, num_bytes) as directory:
        manifest.write(directory)
        with _compiling(directory, manifest, report) as compilations:
            _write_weights(directory, ranks, report)
            _wait(compilations, report)
    return manifest


def _kv_cache_blocks(manifest: Manifest, memory: int | None) -> int:
    """As many blocks as all requests at once could need, or as `memory` bytes of a rank hold."""
    longest = num_blocks(manifest.max_seq_len)
    most = manifest.max_batch_size * longest
    if memory is None:
        return most
    local = manifest.architecture.shard(manifest.tp_size)
    size = BLOCK_SIZE * local.kv_cache_bytes_per_token(2 if manifest.dtype == "bfloat16" else 4)
    held = memory // max(1, size)
    if held < longest:
        raise UserError(
            f"kv_cache_memory: {memory} bytes are {held * BLOCK_SIZE} tokens, max_seq_len is "
            f"{manifest.max_seq_len}; give at least {longest * size}, or a smaller max_seq_len"
        )
    return min(most, held)


def _engine_dtype(stored: str, wanted: str | None) -> str:
    dtype = wanted or stored
    if dtype not in DTYPES:
        whose = "asked for" if wanted else "of the checkpoint"
        raise UserError(
            f"dtype: {dtype!r} {whose} is not one the embedded engine runs; give --dtype bfloat16 or float32"
        )
    return dtype


def _write_weights(directory: Path, ranks: list[dict[str, Expression]], report: Report) -> None:
    start = time.monotonic()
    files = {f"rank{index}.safetensors": rank for index, rank in enumerate(ranks)}
    writer.write(directory, files)
    report(
        f"weights of {len(ranks)} rank{'s' * (len(ranks) > 1)} written in {time.monotonic() - start:.1f} s"
    )


@dataclass(kw_only=True)
class _Compilation:
    """One file being compiled by its own process."""

    name: str
    file: Path
    key: str
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    start: float

    def finish(self, report: Report) -> None:
        """After its end. Raises UserError where it failed."""
        if self.process.returncode:
            self.log.seek(0)
            text = self.log.read().decode(errors="replace")
            print(text, file=sys.stderr)  # noqa: T201  the compiler's own words, before the one line
            last = (text.strip().splitlines() or [f"exit status {self.process.returncode}"])[-1]
            raise UserError(f"{self.name}: torch {target.torch_version()} cannot compile it: {last}")
        cache.keep(self.key, self.file)
        report(f"{self.name} compiled in {time.monotonic() - self.start:.1f} s")


def _wait(compilations: list[_Compilation], report: Report) -> None:
    running = list(compilations)
    while running:
        for compilation in [c for c in running if c.process.poll() is not None]:
            running.remove(compilation)
            compilation.finish(report)
        time.sleep(0.05)


@contextmanager
def _compiling(directory: Path, manifest: Manifest, report: Report) -> Iterator[list[_Compilation]]:
    """What no cache has, side by side; no compiler survives the block."""
    compilations: list[_Compilation] = []
    try:
        for name in target.compiled(manifest.device):
            key = compiler.key(manifest, name)
            if cache.fetch(key, directory / name):
                report(f"{name} taken from the cache")
            else:
                compilations.append(_start(directory, name, key))
        if compilations:
            report(f"compiling {', '.join(c.name for c in compilations)}")
        yield compilations
    finally:
        for compilation in compilations:
            _end(compilation)
            (directory / f".{compilation.name}.log").unlink(missing_ok=True)


def _start(directory: Path, name: str, key: str) -> _Compilation:
    log = (directory / f".{name}.log").open("w+b")
    process = subprocess.Popen(
        compiler.command(directory, name),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd=package_root(),
        env=inner_environment(),
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
    start = time.monotonic()
    return _Compilation(name=name, file=directory / name, key=key, process=process, log=log, start=start)


def _end(compilation: _Compilation) -> None:
    if compilation.process.poll() is None:
        os.killpg(compilation.process.pid, signal.SIGKILL)  # with the C++ compiler it started
        compilation.process.wait()
    compilation.log.close()
