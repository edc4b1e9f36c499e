"""The processes of a running engine, the socket to rank 0, and the last lines they wrote."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from builder.errors import UserError
from engines import mpi
from engines.embedded import protocol
from engines.embedded.process import package_root

# Waits that let the other processes of a busy machine run: with four ranks on two cores a step took 0.9 ms
# with them and 32 ms without (2 cores of Zen 5, Open MPI 5.0.11). Messages are small, and a container may
# have no more than 64 MB of shared memory. Sums by recursive doubling (3): the order of additions is then
# the same for messages of any size; han would add its own between hosts.
MPI_OPTIONS = (
    ("pml", "ob1"),
    ("coll", "^han"),
    ("coll_tuned_use_dynamic_rules", "1"),
    ("coll_tuned_allreduce_algorithm", "3"),
    ("btl_sm_segment_size", str(4 << 20)),
    ("mpi_yield_when_idle", "1"),
)
ONE_HOST = (("btl", "self,sm"),)
# A rank whose peer elsewhere dies aborts for that alone; mpirun shall hear of the peer first.
SEVERAL_HOSTS = (("btl", "self,sm,tcp"), ("opal_abort_delay", "1"))
# What ranks on other hosts get of this environment; mpirun's daemons there start with none of it.
EXPORTED = re.compile(r"PATH|LD_LIBRARY_PATH|PYTHON\w*|VIRTUAL_ENV|(OMP|KMP|MKL|GOMP|TORCH|ONEDNN|DNNL)_\w+")


# libgomp's threads spin for milliseconds between the many short loops of a step, and where other programs
# want the cores the one that works waits for them: 8 ms a step became 280. So few turns cost nothing on an
# idle machine (8 layers of hidden size 1024, 2 cores of Xeon: 7.3 ms, 7.6 without).
_SPINS = {"GOMP_SPINCOUNT": "10000"}
_LOOK_MS = 500  # between looks at the clock while no message comes


class EngineError(RuntimeError):
    """A rank died; the message has its last words."""


class Ranks:
    """One plain process, or `tp_size` of them under mpirun, on this host or on `hosts`.

    Raises UserError where mpirun is missing or `hosts` do not fit.
    """

    def __init__(self, engine: Path, tp_size: int, hosts: Sequence[str] = ()) -> None:
        self.pids: list[int] = []
        self._lines: deque[str] = deque(maxlen=200)
        self._connection: socket.socket | None = None
        environment = mpi.inner_environment()
        if "OMP_WAIT_POLICY" not in environment:
            environment = {**_SPINS, **environment}
        command = _command(tp_size, hosts, environment)
        self._alone = "--mca" not in command
        base = None if self._alone else mpi.shared_memory_directory()
        self._directory = tempfile.mkdtemp(prefix="ffn-fusion-", dir=base)  # only this user may enter
        if "self,sm" in command:  # the ranks' segments, whose names nobody knows, go with the directory
            environment[mpi.SHARED_MEMORY] = self._directory
        self._path = str(Path(self._directory) / "socket")
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            self._listener.bind(self._path)
            self._listener.listen(1)
            self._process = subprocess.Popen(
                [*command, str(engine), self._path, *["--mpi"] * (not self._alone)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=package_root(),
                env=environment,
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
        """Until rank 0 says so."""
        deadline = time.monotonic() + timeout_s
        self._connection = self._accept(deadline)
        try:
            message = next(self.messages(lambda: deadline), None)
        except TimeoutError:
            raise EngineError(f"the engine was not ready after {timeout_s:g} s{self._last_words()}") from None
        if message is None:
            raise self.failure()
        if "refused" in message:
            raise UserError(message["refused"])
        self.pids = message["ready"]
        self._forget_listener()  # all have what they need of it; a killed session could not do this

    def _accept(self, deadline: float) -> socket.socket:
        self._listener.settimeout(0.1)
        while True:
            try:
                connection = self._listener.accept()[0]
            except TimeoutError:
                if self._process.poll() is not None:
                    raise self.failure() from None
                if time.monotonic() > deadline:
                    raise EngineError(f"no rank has connected in time{self._last_words()}") from None
            else:
                connection.setblocking(True)
                return connection

    def send(self, message: protocol.Message) -> None:
        """To rank 0; one that has died is noticed by whoever reads."""
        assert self._connection is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.sendall(protocol.encode(message))

    def messages(self, deadline: Callable[[], float]) -> Iterator[protocol.Message]:
        """Until the socket ends. Raises TimeoutError when time.monotonic() has passed `deadline()`."""
        assert self._connection is not None
        poll, received = select.poll(), b""
        poll.register(self._connection, select.POLLIN)
        with contextlib.suppress(ConnectionError):  # a killed rank 0 resets the connection
            while True:
                if not poll.poll(_LOOK_MS):
                    if time.monotonic() > deadline():
                        raise TimeoutError
                    continue
                data = self._connection.recv(1 << 16)
                if not data:
                    return
                *lines, received = (received + data).split(b"\n")
                yield from map(protocol.decode, lines)

    def failure(self) -> EngineError:
        """Why the ranks ended; ends what is left of them."""
        self._ends_within(2)
        status = self._process.poll()
        self._kill()
        return EngineError(f"the engine died: {self._cause(status)}")

    def hang(self, seconds: float) -> EngineError:
        """What to say of ranks that have been silent for so long; ends them."""
        stopped = [f"rank {i} is stopped" for i, pid in enumerate(self.pids) if _state(pid) in "Tt"]
        self._kill()
        what = f"no step has ended for {seconds:g} s, so the engine was killed"
        return EngineError("; ".join([what, *stopped]))

    def _cause(self, status: int | None) -> str:
        self._drain.join(0.5)
        lines = list(self._lines)
        told = next((line for line in lines if line.startswith("error: rank")), None)
        if told is not None:
            return told.removeprefix("error: ")
        if self._alone and status is not None:
            return f"rank 0 {mpi.describe_status(status)}"
        if status is not None and status < 0:
            return f"mpirun was {mpi.describe_status(status)}"
        return mpi.cause_of_death("\n".join(lines), status)

    def _last_words(self) -> str:
        lines = [line for line in list(self._lines) if line.strip()]
        return ": " + " | ".join(lines[-8:]) if lines else ""

    def end(self, *, wait_s: float) -> None:
        """Close the socket, which ends the ranks; kill those that stay."""
        if self._connection is not None:
            with contextlib.suppress(OSError):  # ended already
                self._connection.shutdown(socket.SHUT_RDWR)
        self._ends_within(wait_s)
        self._kill()
        self._drain.join(2)
        if self._connection is not None:
            self._connection.close()

    def _kill(self) -> None:
        if self._process.poll() is None:
            self._signal_group(signal.SIGTERM)  # mpirun ends its ranks
            if not self._ends_within(2):
                self._kill_ranks()
            if not self._ends_within(2):
                self._signal_group(signal.SIGKILL)
                self._process.wait()
        self._kill_ranks()  # of an mpirun that was killed
        if not self._alone:
            shutil.rmtree(mpi.own_directory(self._process.pid), ignore_errors=True)  # of that as well
        self._forget_listener()

    def _ends_within(self, seconds: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.poll() is not None

    def _kill_ranks(self) -> None:
        for pid in self.pids:
            _kill_rank(pid, self._path)

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def mca(settings: Sequence[tuple[str, str]]) -> list[str]:
    """mpirun's words for Open MPI's parameters."""
    return [word for name, value in settings for word in ("--mca", name, value)]


def _command(tp_size: int, hosts: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    worker = [sys.executable, "-m", "engines.embedded.worker"]
    if tp_size == 1 and not hosts:
        return worker
    several = len(hosts) > 1 or tuple(hosts) == (mpi.ALLOCATION,)
    options = mca(MPI_OPTIONS + (SEVERAL_HOSTS if several else ONE_HOST))
    names = [name for name in sorted(environment) if EXPORTED.fullmatch(name)] if several else []
    exports = [word for name in names for word in ("-x", name)]
    placed = mpi.placement(hosts, tp_size)
    return [*mpi.launcher(), *placed, "--oversubscribe", "--bind-to", "none", *options, *exports, *worker]


def _state(pid: int) -> str:
    """The kernel's letter for a process's state, "X" for one that is not here."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _kill_rank(pid: int, socket_path: str) -> None:
    """Kill a rank of this session on this host; another process may have the number of one elsewhere."""
    with contextlib.suppress(OSError):
        if socket_path.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            os.kill(pid, signal.SIGKILL)
