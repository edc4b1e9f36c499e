"""Serve two engines on Triton at once, run a command while both answer, end both.

    python serving.py --server START.sh:PORT:GPUS --server START.sh:PORT:GPUS --logs DIR -- COMMAND ...

The second starts when the first is ready, so that each finds the GPU memory that is left to it. GPUS is what
CUDA_VISIBLE_DEVICES is set to, or empty for all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import click

from builder.errors import UserError

STOP_S = 90


@dataclass(frozen=True, kw_only=True)
class Server:
    """A start.sh that `deploy` wrote, its HTTP port and the GPUs it may see."""

    script: Path
    port: int
    gpus: str

    @classmethod
    def parse(cls, text: str) -> Server:
        script, port, gpus = text.rsplit(":", 2)
        return cls(script=Path(script), port=int(port), gpus=gpus)


@contextmanager
def served(server: Server, log: Path, timeout_s: int) -> Iterator[None]:
    """The server, ready. Raises UserError where it ends or is not ready in time."""
    visible = {"CUDA_VISIBLE_DEVICES": server.gpus} if server.gpus else {}
    with log.open("a", encoding="utf-8") as stream:
        process = subprocess.Popen(
            ["bash", str(server.script)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **visible},
            start_new_session=True,
        )
        try:
            _wait(process, server, log, timeout_s)
            yield
        finally:
            _stop(process)


def _wait(process: subprocess.Popen[bytes], server: Server, log: Path, timeout_s: int) -> None:
    deadline = time.monotonic() + timeout_s
    while not _ready(server.port):
        if process.poll() is not None:
            raise UserError(f"{server.script}: the server ended with {process.returncode}; see {log}")
        if time.monotonic() > deadline:
            raise UserError(f"{server.script}: not ready on port {server.port} in {timeout_s} s; see {log}")
        time.sleep(1)


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and the processes it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        if _ended(process):
            return


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Wait for the whole group; ranks of an mpirun may outlive it."""
    deadline = time.monotonic() + STOP_S
    while time.monotonic() < deadline:
        process.poll()
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.2)
    return False


def _terminate(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


@click.command()
@click.option("--server", "servers", multiple=True, required=True)
@click.option("--logs", type=click.Path(path_type=Path), required=True)
@click.option("--timeout", "timeout_s", type=click.IntRange(1), default=1800, show_default=True)
@click.argument("command", nargs=-1, required=True)
def main(servers: tuple[str, ...], logs: Path, timeout_s: int, command: tuple[str, ...]) -> None:
    """Run COMMAND while all --server answer; its exit status is passed on."""
    signal.signal(signal.SIGTERM, _terminate)  # servers end with this process
    with ExitStack() as stack:
        for number, server in enumerate(map(Server.parse, servers)):
            log = logs / f"server-{number}-{server.port}.log"
            stack.enter_context(served(server, log, timeout_s))
            click.echo(f"ready on port {server.port}")
        code = subprocess.run(command, check=False).returncode
    sys.exit(code)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
