"""The processes below one of ours: told apart by when they started, ended with it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path


def _starts() -> dict[int, tuple[int, str]]:
    """Parent and start time of every process."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if fields[0] != "Z":
            found[int(file.parent.name)] = (int(fields[1]), fields[19])
    return found


def start_time(pid: int) -> str:
    """In clock ticks since the machine started, "" where there is no such process: PIDs are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def descendants(root: int) -> dict[int, str]:
    """Start times of the processes below `root`: the stubs, and the ranks of the engines they run."""
    processes, family = _starts(), {root}
    while True:
        more = {pid for pid, (parent, _) in processes.items() if parent in family} - family
        if not more:
            return {pid: processes[pid][1] for pid in family - {root}}
        family |= more


def cpu_s(root: int) -> float:
    """Processor time that `root` and the processes below it have used."""
    ticks = 0
    for pid in (root, *descendants(root)):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def end_all(family: dict[int, str], grace_s: float = 10.0) -> None:
    """Wait for `family` to end by itself, then kill what remains of it."""
    deadline = time.monotonic() + grace_s
    while True:
        processes = _starts()
        left = [pid for pid, start in family.items() if processes.get(pid, (0, ""))[1] == start]
        if not left:
            return
        if time.monotonic() > deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
