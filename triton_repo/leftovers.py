"""What a killed server leaves in /dev/shm and the temporary directory: by names that tell whose it is.

A name holds the process that supervises the server: its PID namespace, number and start time. Once that
process is gone, whoever starts the next server removes what is left under such a name.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import uuid
from pathlib import Path

from triton_repo.processes import start_time

SHM = Path("/dev/shm")
_NAME = re.compile(r"ffn-fusion-(\d+)-(\d+)-(\d+)-[0-9a-f]{8}-")


def name() -> str:
    """The beginning of the names of one server's leftovers, while this process supervises it."""
    pid = os.getpid()
    return f"ffn-fusion-{_namespace()}-{pid}-{start_time(pid)}-{uuid.uuid4().hex[:8]}-"


def _namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino


def sweep() -> list[Path]:
    """Remove what dead supervisors of this PID namespace left; returns what it was."""
    found = [file for place in (SHM, Path(tempfile.gettempdir())) for file in place.glob("ffn-fusion-*")]
    gone = [file for file in found if _abandoned(file.name)]
    for file in gone:
        remove(file)
    return gone


def _abandoned(file: str) -> bool:
    match = _NAME.match(file)
    if match is None or int(match[1]) != _namespace():
        return False
    return start_time(int(match[2])) != match[3]


def remove(file: Path) -> None:
    """A file, or a directory with all in it; what is another user's stays."""
    if file.is_dir():
        shutil.rmtree(file, ignore_errors=True)
    else:
        try:
            file.unlink(missing_ok=True)
        except PermissionError:
            return


def remove_named(beginning: str) -> None:
    """The leftovers of one server."""
    for file in SHM.glob(f"{beginning}*"):
        remove(file)
