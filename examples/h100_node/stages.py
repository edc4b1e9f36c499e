"""Stages: a command each, skipped where its record says that nothing has changed since it ended well.

WORK/stages/NAME.json is the record: the digest of command, inputs and machine, and the digest of what was
written. WORK/stages.json has all of them with their seconds; WORK/logs/NAME.log what a command said.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from builder.errors import UserError
from builder.storage import read_json, write_json
from engines import hardware

LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1  # prctl(2) of Linux
WHOLE_BYTES = 1 << 20  # files up to this size are digested by content, larger ones by size and time


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`needs` are bytes by what they are of, told before anything runs.

    A stage that is `on_gpu` depends on the TensorRT-LLM release and the GPUs as well.
    """

    name: str
    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    needs: dict[str, int] = field(default_factory=dict)
    on_gpu: bool = False

    @property
    def line(self) -> str:
        """The command as a shell takes it."""
        return shlex.join(self.command)


class Runner:
    """Runs stages in the directory `work`, one after another."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.results: dict[str, dict[str, Any]] = {}
        for name in ("stages", "logs"):
            (work / name).mkdir(parents=True, exist_ok=True)

    def run(self, stages: Sequence[Stage], left_out: Mapping[str, str]) -> None:
        """Run what is not done. Raises UserError naming the stage, the command and the log that failed."""
        self.results = {s.name: {"status": "not run", "command": s.line} for s in stages}
        self.results |= {name: {"status": "left out", "reason": why} for name, why in left_out.items()}
        for stage in stages:
            try:
                self.results[stage.name] |= self._run(stage)
            finally:
                write_json(self.work / "stages.json", {"stages": self.results})

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Raises UserError where another run works in the directory."""
        handle = os.open(self.work / "stages", os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise UserError(f"{self.work}: another run works there; wait for it") from None
        finally:
            os.close(handle)

    def is_done(self, stage: Stage) -> bool:
        """Whether its record, its inputs and its outputs agree."""
        record = self._record(stage)
        known = (record.get("inputs"), record.get("outputs"))
        return bool(record) and known == (inputs_digest(stage), outputs_digest(stage))

    def log(self, stage: Stage) -> Path:
        return self.work / "logs" / f"{stage.name}.log"

    def _run(self, stage: Stage) -> dict[str, Any]:
        digest, record = inputs_digest(stage), self._record(stage)
        if self.is_done(stage):
            _say(f"{stage.name}: done before, {record['seconds']:.1f} s")
            return {**record, "status": "done before"}
        self._file(stage).unlink(missing_ok=True)
        for output in stage.outputs:
            if output.exists():
                _say(f"{stage.name}: {output} is of other inputs or unfinished; it is written again")
                shutil.rmtree(output)
            output.parent.mkdir(parents=True, exist_ok=True)
        _say(f"{stage.name}: {stage.line}")
        start, began = time.monotonic(), datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.results[stage.name] |= {"status": "failed", "began": began}
        code = execute(stage.command, self.log(stage))
        seconds = round(time.monotonic() - start, 1)
        self.results[stage.name] |= {"seconds": seconds, "exit": code}
        if code != 0 or not all(output.exists() for output in stage.outputs):
            raise UserError(self._failure(stage, code))
        record = {"inputs": digest, "outputs": outputs_digest(stage), "seconds": seconds, "began": began}
        write_json(self._file(stage), record)
        _say(f"{stage.name}: {seconds:.1f} s")
        return {**record, "status": "done", "exit": 0}

    def _failure(self, stage: Stage, code: int) -> str:
        text = self.log(stage).read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        said = next((x for x in reversed(lines) if x.startswith(("error: ", "Error: "))), lines[-1])
        said = said.removeprefix("error: ")
        return f"{stage.name}: {said}; exit {code} of `{stage.line}`; the log is {self.log(stage)}"

    def _file(self, stage: Stage) -> Path:
        return self.work / "stages" / f"{stage.name}.json"

    def _record(self, stage: Stage) -> dict[str, Any]:
        return read_json(self._file(stage)) if self._file(stage).is_file() else {}


def execute(command: Sequence[str], log: Path) -> int:
    """Run a command with its output in `log`; returns its exit status. The log of an earlier try is kept.

    Whatever ends this process ends the command.
    """
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"$ {shlex.join(command)}\n")
        stream.flush()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,  # what a terminal sends comes to it as SIGTERM, from here
                preexec_fn=_end_with_parent,
            )
        except OSError as error:
            stream.write(f"error: {command[0]}: {error.strerror}\n")
            return 127
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def _end_with_parent() -> None:
    """In the child: be sent SIGTERM should the parent be killed."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def environment() -> dict[str, str]:
    """This one's, with the commands that lie beside this Python first."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def inputs_digest(stage: Stage) -> str:
    """Of all that the output depends on."""
    parts: list[Any] = [stage.command, _version("ffn-fusion"), [digest_of(path) for path in stage.inputs]]
    if stage.on_gpu:
        parts += [_version("tensorrt_llm"), sorted({gpu.name for gpu in hardware.gpus()})]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def outputs_digest(stage: Stage) -> list[str | None]:
    """Of what it has written."""
    return [digest_of(path) for path in stage.outputs]


def digest_of(path: Path) -> str | None:
    """Of a file, or of all files in a directory; None where there is nothing."""
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(x for x in path.rglob("*") if x.is_file())
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.relative_to(path)} {stat.st_size} ".encode())
        whole = stat.st_size <= WHOLE_BYTES
        digest.update(file.read_bytes() if whole else str(stat.st_mtime_ns).encode())
    return digest.hexdigest()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
