"""Serve engines on Triton at once, run a command while all of them answer, end all.

    python serving.py --server NAME START.sh PORT GPUS --server ... --logs DIR -- COMMAND ...

A server starts when the one before it gave a token, so that each finds the GPU memory that is left to it.
GPUS is what CUDA_VISIBLE_DEVICES is set to; `all` leaves it as it is.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import click

from builder.errors import UserError
from triton_repo.client import discover, generate
from triton_repo.launch.commands import EXIT_TIMEOUT_S

MARK = "FFN_FUSION_SERVER"  # in the environment of a server and all it starts, whatever their session
# mpirun binds a rank and all its threads to one core, of several mpiruns to the same ones: Open MPI 5 and 4.
UNBOUND = {"PRTE_MCA_hwloc_default_binding_policy": "none", "OMPI_MCA_hwloc_base_binding_policy": "none"}
STOP_S = max(EXIT_TIMEOUT_S.values()) + 30
LEFT_OVER_S = 10  # for what is left of a server that has ended
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class Server:
    """A start.sh that `deploy` wrote, its HTTP port, the GPUs it may see and the log of what it says."""

    name: str
    script: Path
    port: int
    gpus: str
    log: Path


@contextmanager
def served(server: Server, timeout_s: int) -> Iterator[subprocess.Popen[bytes]]:
    """The server, having given a token. Raises UserError where it ends or gives none in time."""
    mark = uuid.uuid4().hex
    visible = {} if server.gpus == "all" else {"CUDA_VISIBLE_DEVICES": server.gpus}
    with server.log.open("a", encoding="utf-8") as stream:
        process = subprocess.Popen(
            ["bash", str(server.script)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **UNBOUND, **visible, MARK: mark},
            start_new_session=True,
        )
    try:
        _wait_for_token(process, server, timeout_s)
        yield process
    finally:
        _stop(process, mark)


def _wait_for_token(process: subprocess.Popen[bytes], server: Server, timeout_s: int) -> None:
    """Triton calls itself ready before its model has answered anything, and after it died."""
    deadline = time.monotonic() + timeout_s
    while True:
        if process.poll() is not None:
            raise UserError(f"{server.name}: the server ended with {process.returncode}; see {server.log}")
        left = deadline - time.monotonic()
        try:
            end = discover(f"http://127.0.0.1:{server.port}")
            generate(replace(end, timeout_s=max(1.0, left)), "a", max_tokens=1)
            return
        except UserError as error:  # not listening, or still loading
            if left <= 0:
                raise UserError(
                    f"{server.name}: no token in {timeout_s} s: {error}; see {server.log}"
                ) from None
        time.sleep(min(1.0, max(0.0, left)))


def _stop(process: subprocess.Popen[bytes], mark: str) -> None:
    """End the server and everything that it started; a signal from now on waits for that."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + LEFT_OVER_S
        for pid in marked(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        while marked(mark) and time.monotonic() < deadline:
            process.poll()
            time.sleep(0.1)


def marked(mark: str) -> list[int]:
    """Processes with the mark. mpirun's ranks have a group of their own, the LLM API's a session."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's, or ended
            if wanted in (directory / "environ").read_bytes().split(b"\0"):
                found.append(int(directory.name))
    return found


def check_ports(servers: list[Server]) -> None:
    """Raise UserError where a port is taken: another's server would be measured."""
    for server in servers:
        for port in range(server.port, server.port + 3):  # HTTP, gRPC, metrics
            with socket.socket() as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    tried.bind(("", port))
                except OSError:
                    raise UserError(
                        f"port {port}: in use; end the process that has it, or choose another --http-port"
                    ) from None


def _terminate(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


@click.command()
@click.option("--server", "given", type=(str, Path, int, str), multiple=True, required=True)
@click.option("--logs", type=click.Path(path_type=Path), required=True)
@click.option("--timeout", "timeout_s", type=click.IntRange(1), default=3600, show_default=True)
@click.argument("command", nargs=-1, required=True)
def main(
    given: tuple[tuple[str, Path, int, str], ...], logs: Path, timeout_s: int, command: tuple[str, ...]
) -> None:
    """Run COMMAND while all --server NAME START.sh PORT GPUS answer; its exit status is passed on."""
    for number in SIGNALS:
        signal.signal(number, _terminate)  # servers end with this process
    servers = [
        Server(name=name, script=script, port=port, gpus=gpus, log=logs / f"server-{name}.log")
        for name, script, port, gpus in given
    ]
    check_ports(servers)
    with ExitStack() as stack:
        running = []
        for server in servers:
            running.append(stack.enter_context(served(server, timeout_s)))
            click.echo(f"{server.name} answers on port {server.port}")
        code = subprocess.run(command, check=False).returncode
        for server, process in zip(servers, running, strict=True):
            if code and process.poll() is not None:
                raise UserError(f"{server.name}: the server ended while it was measured; see {server.log}")
    sys.exit(code)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
