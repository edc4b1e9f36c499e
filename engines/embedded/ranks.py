"""The processes of a running engine, the socket to rank 0, and the last lines they wrote."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from builder.errors import UserError
from engines import mpi
from engines.embedded import protocol
from engines.embedded.process import child_environment, package_root

# One host: shared memory only, and waits that let the other processes of a busy machine run.
# Messages are small, and a container may have no more than 64 MB of shared memory.
MPI_OPTIONS = (
    ("pml", "ob1"),
    ("btl", "self,sm"),
    ("btl_sm_segment_size", str(4 << 20)),
    ("mpi_yield_when_idle", "1"),
)


class EngineError(RuntimeError):
    """A rank died; the message has its last words."""


class Ranks:
    """One plain process, or `tp_size` of them under mpirun.

    Raises UserError where mpirun is missing.
    """

    def __init__(self, engine: Path, tp_size: int) -> None:
        self.pids: list[int] = []
        self._lines: deque[str] = deque(maxlen=40)
        self._connection: socket.socket | None = None
        self._directory = tempfile.mkdtemp(prefix="ffn-fusion-")  # only this user may enter
        path = str(Path(self._directory) / "socket")
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            self._listener.bind(path)
            self._listener.listen(1)
            self._process = subprocess.Popen(
                _command(tp_size) + [str(engine), path] + ["--mpi"] * (tp_size > 1),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=package_root(),
                env=child_environment(),
                start_new_session=True,
            )
        except BaseException as error:
            self._forget_listener()
            if isinstance(error, OSError) and "too long" in str(error):
                raise UserError(
                    f"TMPDIR: {tempfile.gettempdir()} is too long for a socket; shorten it"
                ) from None
            raise
        self._drain = threading.Thread(target=self._read_lines, daemon=True)
        self._drain.start()

    def _forget_listener(self) -> None:
        self._listener.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _read_lines(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                self._lines.append(line.decode(errors="replace").rstrip())

    def wait_until_ready(self, timeout_s: float) -> None:
        """Until rank 0 says so; nothing of the socket is left in the file system then."""
        deadline = time.monotonic() + timeout_s
        try:
            self._connection = self._accept(deadline)
        finally:
            self._forget_listener()
        self._connection.settimeout(max(0.1, deadline - time.monotonic()))
        self._stream = self._connection.makefile("rb")
        try:
            line = self._stream.readline()
        except TimeoutError:
            raise EngineError(f"the engine was not ready after {timeout_s:g} s{self._last_words()}") from None
        except ConnectionError:
            line = b""
        if not line:
            raise self.failure()
        message = protocol.decode(line)
        if "refused" in message:
            raise UserError(message["refused"])
        self.pids = message["ready"]
        self._connection.settimeout(None)

    def _accept(self, deadline: float) -> socket.socket:
        self._listener.settimeout(0.1)
        while True:
            try:
                return self._listener.accept()[0]
            except TimeoutError:
                if self._process.poll() is not None:
                    raise self.failure() from None
                if time.monotonic() > deadline:
                    raise EngineError(f"no rank has connected in time{self._last_words()}") from None

    def send(self, message: protocol.Message) -> None:
        """To rank 0; one that has died is noticed by whoever reads."""
        assert self._connection is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.sendall(protocol.encode(message))

    def messages(self) -> Iterator[protocol.Message]:
        """Until the socket ends."""
        with self._stream, contextlib.suppress(ConnectionError):  # a killed rank 0 resets the connection
            yield from map(protocol.decode, self._stream)

    def failure(self) -> EngineError:
        """Why the ranks ended; ends what is left of them."""
        try:
            status = str(self._process.wait(2))
        except subprocess.TimeoutExpired:
            status = "none yet"
        self._kill()
        return EngineError(f"the engine died, exit status {status}{self._last_words()}")

    def _last_words(self) -> str:
        self._drain.join(0.5)
        lines = [line for line in list(self._lines) if line.strip()]
        told = [line for line in lines if line.startswith("error: rank")] or lines[-8:]
        return ": " + " | ".join(told) if told else ""

    def end(self, *, wait_s: float) -> None:
        """Close the socket, which ends the ranks; kill those that stay."""
        if self._connection is not None:
            with contextlib.suppress(OSError):  # ended already
                self._connection.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(wait_s)
        self._kill()
        self._drain.join(2)
        if self._connection is not None:
            self._connection.close()

    def _kill(self) -> None:
        if self._process.poll() is not None:
            return
        os.killpg(self._process.pid, signal.SIGTERM)  # mpirun ends its ranks
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _command(tp_size: int) -> list[str]:
    worker = [sys.executable, "-m", "engines.embedded.worker"]
    if tp_size == 1:
        return worker
    options = [word for name, value in MPI_OPTIONS for word in ("--mca", name, value)]
    return [*mpi.launcher(), "-n", str(tp_size), "--oversubscribe", "--bind-to", "none", *options, *worker]
