"""An engine's process as the harness sees it; it computes only inside `awake`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.engine.channel import Job, NotOffered, job_fields
from engines.embedded.process import package_root

LIMIT_S = 3600.0  # for one answer
_END_S = 10.0


class Failed(Exception):  # noqa: N818
    """An engine did not do what it was asked; the message is one line."""


class Process:
    """`python -m module`, which speaks `channel`. Its stderr goes to the file `log`."""

    def __init__(self, python: Path, module: str, log: Path, threads: int) -> None:
        self._log = log
        self._others: list[int] = []
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                [str(python), "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                cwd=package_root(),
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                text=True,
                start_new_session=True,  # signals reach its children as well
            )

    def ask(self, do: str, job: Job) -> dict[str, Any]:
        """`prepare`, `load` or another method of the engine that takes a Job."""
        answer = self._ask({"do": do, "job": job_fields(job)})
        self._others = answer.get("pids", self._others)
        return answer

    def generate(self, prompts: list[list[int]], count: int) -> dict[str, Any]:
        """The fields of a Trace."""
        return self._ask({"do": "generate", "prompts": prompts, "count": count})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        watch = threading.Timer(LIMIT_S, self._kill)
        watch.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watch.cancel()
        if not line:
            raise Failed(f"died with exit code {self._process.wait()}: {self._last_words()}")
        reply = json.loads(line)
        if "not_offered" in reply:
            raise NotOffered(reply["not_offered"])
        if "error" in reply:
            raise Failed(one_line(reply["error"]))
        return dict(reply["answer"])

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        return one_line(next((x for x in reversed(lines) if x.strip()), "it wrote nothing"))

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
        for pid in self._others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self) -> None:
        """Take no processor time, not even to spin in a thread pool."""
        self._signal(signal.SIGSTOP)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Run until the end of the block."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.stop()

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        """End it, and what it started."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        self._kill()
        self._process.wait()
        self._process.stdout.close()


def one_line(text: str, most: int = 300) -> str:
    """The first line that says something, shortened."""
    line = next((x.strip() for x in text.split("\n") if x.strip()), text.strip())
    return line if len(line) <= most else line[: most - 3] + "..."
