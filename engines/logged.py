"""Another program run to its end, with what it says kept in a file."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_SAID = re.compile(r"^(\w+(\.\w+)*(Error|Exception)\b|Error: |.*\[E\]|.*out of memory|.*Killed)")


def run(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    """The exit code, with command and output in `log`. Whatever ends us ends it and all it started."""
    with log.open("w", encoding="utf-8") as file:
        file.write(shlex.join(command) + "\n")
        file.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            return process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise


def last_words(log: Path, code: int) -> str:
    """Why it failed: the signal, else its last line that looks like an error, else its last line."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    said = [line for line in lines if _SAID.match(line)] or [line for line in lines if line.strip()]
    return said[-1].strip() if said else "no output"
