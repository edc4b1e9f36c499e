"""From a TensorRT-LLM checkpoint to an engine directory, through trtllm-build.

trtllm-build is called as its own command line has it in 0.20 to 1.2 (tensorrt_llm/commands/build.py):
alone it builds all ranks, `--workers` at once; under MPI process p of P builds the ranks p, p + P, ...
and waits for the others at a barrier.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from builder import trtllm
from builder.errors import UserError
from builder.storage import read_json
from builder.trtllm import TrtllmCheckpoint
from builder.trtllm.conversion import MAX_ELEMENTS, largest_weight
from engines import hardware, mpi
from engines.manifest import Manifest
from engines.mpi import inner_environment
from engines.trtllm import preflight, release
from engines.trtllm.estimate import Estimate, estimate
from engines.trtllm.options import Build, BuildOptions, resolve
from engines.trtllm.workspace import LOG, Workspace

BACKEND = "tensorrt-llm"
LAST_LINES = 12
# Takes part in what MPI processes of trtllm-build do together: what importing the package splits, and
# the barrier at the end.
_STAND_BY = "import tensorrt_llm; tensorrt_llm.mpi_barrier()"
_WRITING = re.compile(r"Serializing engine to .*?rank(\d+)\.engine")
_WRITTEN = "Engine serialized"
_SAID = re.compile(r"^(\w+(\.\w+)*(Error|Exception)\b|.*\[E\]|.*CUDA out of memory|.*Killed)")

# What it says last, whatever went wrong.
_VAGUE = re.compile(r"Engine building failed, please check (the )?error log\.?$")

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A build with every choice made and nothing done yet."""

    checkpoint: TrtllmCheckpoint
    build: Build
    estimate: Estimate
    output: Path
    place: tuple[int, int]  # this process's MPI rank and how many there are
    without_nvlink: bool

    @property
    def under_mpi(self) -> bool:
        return self.place[1] > 1

    @property
    def own_ranks(self) -> range:
        """What this process of an mpirun builds."""
        return range(self.place[0], self.checkpoint.world_size, self.place[1])

    def command(self, directory: Path, *, mpi: bool = False) -> list[str]:
        """trtllm-build's arguments for engines in `directory`."""
        return self.build.arguments(self.checkpoint.directory, directory, mpi=mpi or self.under_mpi)

    def checks(self) -> list[preflight.Check]:
        """The pre-flight, tried on this machine."""
        return preflight.checks(self._wanted())

    def require(self) -> None:
        """Raise UserError for the first check that fails."""
        preflight.require(self._wanted())

    def _wanted(self) -> preflight.Wanted:
        return preflight.Wanted(
            checkpoint=self.checkpoint,
            estimate=self.estimate,
            output=self.output,
            workers=self.estimate.workers,
            without_nvlink=self.without_nvlink,
        )


def prepare(
    directory: Path, output: Path, options: BuildOptions, *, without_nvlink: bool = False
) -> Prepared:
    """Read a checkpoint and choose what `options` left open. Raises UserError naming file or option."""
    checkpoint = trtllm.read(directory.resolve())
    place = mpi.place()
    build = resolve(
        options,
        max_position_embeddings=checkpoint.architecture.max_position_embeddings,
        world_size=checkpoint.world_size,
        fp8=checkpoint.quant_algo == "FP8",
        fp8_kv_cache=checkpoint.kv_cache_quant_algo == "FP8",
        fused_mlp_fits=_fused_mlp_fits(checkpoint),
    )
    if place[1] > checkpoint.world_size:
        raise UserError(
            f"mpirun: {place[1]} processes, the checkpoint has {checkpoint.world_size} ranks; "
            f"start {checkpoint.world_size} at most"
        )
    workers = mpi.local_size() if place[1] > 1 else build.workers
    return Prepared(
        checkpoint=checkpoint,
        build=build,
        estimate=estimate(checkpoint, build, workers),
        output=output,
        place=place,
        without_nvlink=without_nvlink,
    )


def _fused_mlp_fits(checkpoint: TrtllmCheckpoint) -> bool:
    """Whether gate and up may be joined. Raises UserError where a weight is too large even so."""
    local = checkpoint.architecture.shard(checkpoint.tp_size)
    for index in range(len(local.layers)):
        elements = largest_weight(local, index, fused_mlp=False)
        if elements > MAX_ELEMENTS:
            raise UserError(
                f"{checkpoint.directory}: layer {index} has a weight of {elements:,} elements a rank, "
                f"TensorRT takes {MAX_ELEMENTS:,}; convert with a larger --tp or smaller groups"
            )
    return all(largest_weight(local, i, fused_mlp=True) <= MAX_ELEMENTS for i in range(len(local.layers)))


def build(prepared: Prepared, report: Report) -> Manifest | None:
    """Build the engine directory; None on the processes of an mpirun but the first.

    A failed or killed build leaves no engine directory; ranks it finished are reused by the next
    one with the same inputs. Raises UserError with the first failing check or trtllm-build's last words.
    """
    prepared.require()
    version, builder = release.engine_builder()
    workspace = Workspace(prepared.output)
    digest = _digest(prepared, version)
    if prepared.under_mpi and prepared.place[0] > 0:
        workspace.wait_until_open(digest)
        log = f"build.{prepared.place[0]}.log"
        _run(_member(prepared, builder, workspace), prepared.own_ranks, workspace, prepared, log)
        return None
    with workspace.open(digest):
        _build_ranks(prepared, builder, workspace, report)
        manifest = _manifest(prepared, version, [str(builder), *prepared.command(prepared.output.absolute())])
        _check_engines(workspace, prepared.checkpoint.world_size)
        manifest.write(workspace.directory)
        workspace.publish(prepared.checkpoint.world_size)
    return manifest


def _build_ranks(prepared: Prepared, builder: Path, workspace: Workspace, report: Report) -> None:
    world_size = prepared.checkpoint.world_size
    finished = workspace.finished(world_size)
    missing = [r for r in range(world_size) if r not in finished]
    if finished:
        report(f"ranks {_list(finished)} are finished already")
    if prepared.under_mpi:
        _run(_member(prepared, builder, workspace), prepared.own_ranks, workspace, prepared, LOG, report)
        return
    if not finished:
        command = [str(builder), *prepared.command(workspace.directory)]
        _run(command, missing, workspace, prepared, LOG, report)
        return
    at_once = prepared.build.workers
    for first in range(0, len(missing), at_once):
        ranks = missing[first : first + at_once]
        _run(_some_ranks(prepared, builder, workspace, ranks), ranks, workspace, prepared, LOG, report)


def _member(prepared: Prepared, builder: Path, workspace: Workspace) -> list[str]:
    """The part of one process of an outer mpirun."""
    if set(prepared.own_ranks) <= set(workspace.finished(prepared.checkpoint.world_size)):
        return _stand_by()
    return [str(builder), *prepared.command(workspace.directory)]


def _some_ranks(prepared: Prepared, builder: Path, workspace: Workspace, ranks: list[int]) -> list[str]:
    """An mpirun with a process for every rank, of which only `ranks` build."""
    arguments = prepared.command(workspace.directory, mpi=True)
    command = [*mpi.launcher(), "--oversubscribe", "--bind-to", "none"]
    for rank in range(prepared.checkpoint.world_size):
        part = [str(builder), *arguments] if rank in ranks else _stand_by()
        command += [*[":"] * (rank > 0), "-n", "1", *part]
    return command


def _stand_by() -> list[str]:
    return [sys.executable, "-c", _STAND_BY]


def _run(
    command: Sequence[str],
    ranks: Iterable[int],
    workspace: Workspace,
    prepared: Prepared,
    log: str,
    report: Report | None = None,
) -> None:
    """Run a command that builds `ranks`, with its output in `log`, recording each as it is finished."""
    environment = None if prepared.under_mpi else inner_environment()
    last: deque[str] = deque(maxlen=400)
    writing: list[int] = []
    unfinished = 0
    with (workspace.directory / log).open("a", encoding="utf-8") as file:
        file.write(" ".join(command) + "\n")
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=not prepared.under_mpi,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                last.append(line.rstrip())
                begun = [int(rank) for rank in _WRITING.findall(line)]  # workers may share a line
                writing += begun
                unfinished = max(0, unfinished + len(begun) - line.count(_WRITTEN))
                if writing and not unfinished:  # lines of ranks may mix: all are whole once none is open
                    for rank in writing:
                        workspace.finish(rank)
                        if report:
                            report(f"rank {rank} is built")
                    writing.clear()
            code = process.wait()
        except BaseException:
            _end(process, prepared.under_mpi)
            raise
    # Its MPI_Abort has the status 0: only the ranks tell whether it went well.
    if code != 0 or not set(ranks) <= set(workspace.finished(prepared.checkpoint.world_size)):
        raise UserError(_failure(code, last, workspace, prepared, log, report))


def _end(process: subprocess.Popen[str], alone: bool) -> None:
    """End the build and all its workers."""
    try:
        if alone:
            process.terminate()
        else:
            _signal_group(process.pid, signal.SIGTERM)
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill() if alone else _signal_group(process.pid, signal.SIGKILL)
        process.wait()


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return


def _failure(
    code: int, last: deque[str], workspace: Workspace, prepared: Prepared, log: str, report: Report | None
) -> str:
    """The line of a failed build; the lines before it go to `report`."""
    for line in list(last)[-LAST_LINES:]:
        if report:
            report(f"  {line}")
    said = [line for line in last if _SAID.match(line) and not _VAGUE.search(line)]
    said = said or [line for line in last if line.strip()]
    reason = said[-1].strip() if said else "no output"
    if code < 0:
        reason = f"killed by {signal.Signals(-code).name}"
    world_size = prepared.checkpoint.world_size
    finished = workspace.finished(world_size)
    missing = [r for r in range(world_size) if r not in finished]
    kept = f", ranks {_list(finished)} are kept for the next try" if finished else ""
    return (
        f"trtllm-build: {reason}; ranks {_list(missing)} were not built{kept}; "
        f"the log is {workspace.directory / log}"
    )


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _check_engines(workspace: Workspace, world_size: int) -> None:
    read_json(workspace.directory / "config.json")
    for rank in range(world_size):
        engine = workspace.engine(rank)
        if not engine.is_file() or engine.stat().st_size == 0:
            log = workspace.directory / LOG
            raise UserError(f"trtllm-build: ended well but wrote no {engine.name}; see {log}")


def _digest(prepared: Prepared, version: str) -> str:
    """Of everything an engine depends on: weights, options, release, GPU. Contents are not read again."""
    directory = prepared.checkpoint.directory
    stats = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(directory.glob("*.safetensors"))
    ]
    arguments = prepared.command(Path("engine"), mpi=True)
    gpus = sorted({(gpu.name, gpu.driver) for gpu in hardware.gpus()})
    parts = [prepared.checkpoint.digest, stats, arguments, version, gpus]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _manifest(prepared: Prepared, version: str, command: list[str]) -> Manifest:
    checkpoint, chosen = prepared.checkpoint, prepared.build
    return Manifest(
        backend=BACKEND,
        checkpoint_digest=checkpoint.digest,
        architecture=checkpoint.architecture,
        dtype=checkpoint.dtype,
        tp_size=checkpoint.tp_size,
        pp_size=checkpoint.pp_size,
        max_batch_size=chosen.options.max_batch_size,
        max_input_len=chosen.max_input_len,
        max_seq_len=chosen.max_seq_len,
        hardware={"gpus": [asdict(gpu) for gpu in hardware.gpus()]},
        compiler={
            "tensorrt_llm": version,
            "command": command,
            "paged_context_fmha": chosen.options.use_paged_context_fmha,
            "max_beam_width": chosen.options.max_beam_width,
            "max_draft_len": chosen.options.max_draft_len,
        },
    )
