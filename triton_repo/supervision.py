"""A server that is looked after: in the foreground, or by a process of its own that others find by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from builder.errors import UserError
from engines.embedded.process import package_root
from triton_repo import registry
from triton_repo.openai import launch
from triton_repo.processes import descendants, end_all, start_time
from triton_repo.registry import Record
from triton_repo.server import Server
from triton_repo.watchdog import Watchdog

START_S = 300.0


def serve(
    server: Server, tell: Callable[[str], None], ready: Callable[[Server], None], *, front: Sequence[str] = ()
) -> None:
    """Serve until interrupted; `front` is the command line of a front end that runs beside it.

    Raises UserError where repairs did not help, or the front end does not start.
    """
    with ExitStack() as stack:
        stack.enter_context(server)
        if front:
            stack.callback(_end, _start_front(front))
        ready(server)
        try:
            Watchdog(server=server, tell=tell).run()
        except KeyboardInterrupt:
            return


def _start_front(command: Sequence[str]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=package_root())
    assert process.stdout is not None
    if not process.stdout.readline():  # its URL, once it listens
        raise UserError(f"openai: the front end ended with {process.wait()}; it says why above")
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(launch.GRACE_S + 5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def supervise(name: str, server: Server, model: str, *, front: Sequence[str] = ()) -> None:
    """`serve`, with a record that `status` reads; what happens goes to stderr, the supervisor's log."""
    common: dict[str, Any] = {
        "name": name,
        "pid": os.getpid(),
        "start": start_time(os.getpid()),
        "repository": str(server.repository),
        "model": model,
        "since": time.time(),
        "grace_s": server.grace_s,
    }
    repaired = 0

    def record(state: str) -> None:
        url, grpc = server.url, server.grpc_address
        registry.write(Record(**common, url=url, grpc_address=grpc, state=state, repaired=repaired))

    def tell(line: str) -> None:
        nonlocal repaired
        repaired += line.endswith("again") and line != "serving again"
        print(time.strftime("%Y-%m-%d %H:%M:%S"), line, file=sys.stderr, flush=True)  # noqa: T201
        record("serving" if line == "serving again" else "repairing")

    serve(server, tell, lambda _: record("serving"), front=front)


def detach(name: str, command: Sequence[str]) -> Record:
    """Start `command`, which supervises under that name, and wait until it serves.

    Raises UserError with its last words where it ends instead.
    """
    directory = registry.claim(name)
    log = directory / "supervisor.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
        )
    deadline = time.monotonic() + START_S
    try:
        while time.monotonic() < deadline:
            found = registry.read(name)
            if found is not None and found.state == "serving":
                return found
            if process.poll() is not None:
                raise UserError(_last_line(log) or f"name: {name!r} ended with {process.returncode}")
            time.sleep(0.1)
        raise UserError(f"name: {name!r} did not serve within {START_S:.0f} s; see {log}")
    except BaseException:
        if process.poll() is None:
            process.terminate()
            process.wait()
        registry.forget(name)
        raise


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else ""


def stop(record: Record) -> bool:
    """End a server in the background; False where it had died before. Its record goes."""
    alive = record.alive
    if alive:
        family = descendants(record.pid)
        os.kill(record.pid, signal.SIGTERM)
        deadline = time.monotonic() + record.grace_s + 20
        while record.alive and time.monotonic() < deadline:
            time.sleep(0.05)
        if record.alive:
            os.kill(record.pid, signal.SIGKILL)
        end_all(family, grace_s=1.0)
    registry.forget(record.name)
    return alive
