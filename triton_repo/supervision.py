"""A server that is looked after: in the foreground, or by a process of its own that others find by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from builder.errors import UserError
from engines.embedded.process import package_root
from triton_repo import registry
from triton_repo.front import Front
from triton_repo.processes import descendants, end_all, start_time
from triton_repo.registry import Record, State
from triton_repo.server import Server
from triton_repo.watchdog import Watchdog

START_S = 300.0


def serve(
    server: Server,
    tell: Callable[[str, State], None],
    ready: Callable[[Server], None],
    *,
    front: Front | None = None,
) -> None:
    """Serve until interrupted; `front` runs beside the server.

    Raises UserError where repairs did not help, or the front does not start.
    """
    with server, front or nullcontext():
        ready(server)
        try:
            Watchdog(server=server, tell=tell, front=front).run()
        except KeyboardInterrupt:
            return


def supervise(name: str, server: Server, model: str, *, front: Front | None = None) -> None:
    """`serve`, with a record that `status` reads; what happens goes to stderr, the supervisor's log."""
    started = _record(name, server, model, os.getpid())
    repaired = 0

    def record(state: State) -> None:
        registry.write(replace(started, state=state, repaired=repaired))

    def tell(line: str, state: State) -> None:
        nonlocal repaired
        repaired += state == "repairing"
        print(time.strftime("%Y-%m-%d %H:%M:%S"), line, file=sys.stderr, flush=True)  # noqa: T201
        record(state)

    serve(server, tell, lambda _: record("serving"), front=front)


def _record(name: str, server: Server, model: str, pid: int) -> Record:
    """Of a server with ports of its own, which the process `pid` starts."""
    return Record(
        name=name,
        pid=pid,
        start=start_time(pid),
        repository=str(server.repository),
        model=model,
        url=server.url,
        grpc_address=server.grpc_address,
        state="starting",
        since=time.time(),
        grace_s=server.grace_s,
    )


def detach(name: str, server: Server, model: str, command: Sequence[str]) -> Record:
    """Start `command`, which supervises such a server under that name, and wait until it serves.

    Raises UserError with its last words where it ends instead.
    """
    log = registry.claim(name) / "supervisor.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            cwd=package_root(),
            start_new_session=True,
        )
    try:
        registry.write(_record(name, server, model, process.pid))
        return _wait(name, process, log)
    except BaseException:
        if process.poll() is None:
            process.terminate()
            process.wait()
        registry.forget(name)
        raise


def _wait(name: str, process: subprocess.Popen[bytes], log: Path) -> Record:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        found = registry.read(name)
        if found is not None and found.state == "serving":
            return found
        if process.poll() is not None:
            raise UserError(_error(log) or f"name: {name!r} ended with {process.returncode}")
        time.sleep(0.1)
    raise UserError(f"name: {name!r} did not serve within {START_S:.0f} s; see {log}")


def _error(log: Path) -> str:
    if not log.is_file():  # stopped by name meanwhile
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]  # the front's comes before the server's
    return (errors + lines[-1:])[0].removeprefix("error: ") if lines else ""


def stop(record: Record) -> bool:
    """End a server in the background; False where it had died before. Its record goes."""
    alive = record.alive
    if alive:
        family = descendants(record.pid)
        os.kill(record.pid, signal.SIGTERM)
        deadline = time.monotonic() + 2 * record.grace_s + 30  # the front's, then Triton's
        while record.alive and time.monotonic() < deadline:
            time.sleep(0.05)
        if record.alive:
            os.kill(record.pid, signal.SIGKILL)
        end_all(family, grace_s=1.0)
    registry.forget(record.name)
    return alive
