"""The servers that run in the background: a directory each, with what it serves and its logs.

$XDG_STATE_HOME/ffn-fusion/servers/NAME/{server.json, supervisor.log, triton.log}
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from builder.errors import UserError
from triton_repo.processes import start_time

State = Literal["starting", "serving", "repairing", "failed"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Record:
    """A supervising process and its server; `since` is seconds since 1970, `start` of /proc/PID/stat."""

    name: str
    pid: int
    start: str
    repository: str
    model: str
    url: str
    grpc_address: str
    state: State
    since: float
    grace_s: int
    repaired: int = 0

    @property
    def alive(self) -> bool:
        """Whether the supervising process runs; another one may have its number by now."""
        return bool(self.start) and start_time(self.pid) == self.start


def servers_directory() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "ffn-fusion" / "servers"


def place(name: str) -> Path:
    """The directory of a server. Raises UserError where the name is none."""
    if not _NAME.fullmatch(name):
        raise UserError(f"name: {name!r} is no name of a server; use letters, digits, '.', '_' and '-'")
    return servers_directory() / name


def claim(name: str) -> Path:
    """A new directory for a server. Raises UserError where one of that name runs."""
    directory, known = place(name), read(name)
    if known is not None and known.alive:
        raise UserError(f"name: {name!r} runs already on {known.url}; stop it or give another --name")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def write(record: Record) -> None:
    """Whole or not at all."""
    file = place(record.name) / "server.json"
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(record), indent=2), encoding="utf-8")
    partial.rename(file)


def read(name: str) -> Record | None:
    """None where there is none, or it has not written anything yet."""
    file = place(name) / "server.json"
    try:
        return Record(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: not a record of a server ({error}); remove {file.parent}") from None


def find(name: str | None) -> Record:
    """The one of that name, or the only one there is. Raises UserError where that is none or several."""
    if name is not None:
        record = read(name)
        if record is None:
            raise UserError(f"name: no server {name!r}; `ffn-fusion status` lists those there are")
        return record
    records = everything()
    if len(records) != 1:
        names = ", ".join(x.name for x in records)
        raise UserError(f"name: which of {names}?" if records else "no server runs in the background")
    return records[0]


def everything() -> list[Record]:
    """By name."""
    names = sorted(x.name for x in servers_directory().iterdir()) if servers_directory().is_dir() else []
    return [record for name in names if (record := read(name)) is not None]


def forget(name: str) -> None:
    """Remove its record and its logs."""
    shutil.rmtree(place(name), ignore_errors=True)


def uptime(record: Record) -> str:
    """`3:04:05`."""
    seconds = int(time.time() - record.since)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
