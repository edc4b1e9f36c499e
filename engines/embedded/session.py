"""A running engine: the rank processes, and requests to them from any thread. Imports no torch, no numpy."""

from __future__ import annotations

import itertools
import os
import queue
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
from types import TracebackType

from builder.errors import UserError
from engines import manifest as manifests
from engines.embedded import protocol, target
from engines.embedded.process import child_environment, package_root
from engines.embedded.request import Output, Request
from engines.manifest import Manifest

__all__ = ["EngineError", "Generation", "Output", "Request", "Session"]

_END_S = 4.0  # for the ranks to end by themselves, after which they are killed
# One host: shared memory only, and waits that let the processes of a busy machine run.
_MPI_OPTIONS = ("pml", "ob1", "btl", "self,sm", "mpi_yield_when_idle", "1")


class EngineError(RuntimeError):
    """A rank died; the message has its last words."""


class Generation(Iterator[Output]):
    """The outputs of one request; `close`, or losing the object, cancels what is left of it."""

    def __init__(self, session: Session, request_id: int) -> None:
        self._session, self._request_id = session, request_id
        self._outputs: queue.SimpleQueue[Output | EngineError] = queue.SimpleQueue()
        self._done = False

    def put(self, output: Output | EngineError) -> None:
        self._outputs.put(output)

    def __next__(self) -> Output:
        if self._done:
            raise StopIteration
        output = self._outputs.get()
        if isinstance(output, EngineError):
            self._done = True
            raise EngineError(*output.args)
        self._done = output.finish_reason is not None
        return output

    def close(self) -> None:
        """Stop the work on this request within one step."""
        if not self._done:
            self._done = True
            self._session._cancel(self._request_id)

    def __del__(self) -> None:
        self.close()


class Session:
    """Starts an engine's ranks and ends them.

    Raises UserError where the engine cannot run here or mpirun is missing, EngineError where a rank
    dies or is not ready after `start_timeout_s` seconds.
    """

    def __init__(self, engine_dir: Path, *, start_timeout_s: float = 120) -> None:
        self.manifest: Manifest = manifests.read(engine_dir)
        target.check(engine_dir, self.manifest)
        self._lock = threading.Lock()
        self._generations: dict[int, Generation] = {}
        self._ids = itertools.count()
        self._failure: EngineError | None = None
        self._closing = False
        self._ranks = _Ranks(engine_dir.resolve(), self.manifest.tp_size)
        try:
            self._ranks.wait_until_ready(start_timeout_s)
        except BaseException:
            self._ranks.end(wait_s=0)
            raise
        self._receiver = threading.Thread(target=self._receive, daemon=True)
        self._receiver.start()

    def generate(self, request: Request) -> Generation:
        """Queue a request; the outputs come step by step. Raises UserError over a limit, EngineError if dead."""
        request.check_limits(self.manifest)
        with self._lock:
            if self._failure:
                raise EngineError(*self._failure.args)
            generation = Generation(self, next(self._ids))
            self._generations[generation._request_id] = generation
            self._ranks.send(protocol.submit(generation._request_id, request))
        return generation

    def _cancel(self, request_id: int) -> None:
        with self._lock:
            if self._generations.pop(request_id, None) is not None and not self._failure:
                self._ranks.send({"cancel": request_id})

    def _receive(self) -> None:
        for message in self._ranks.messages():
            for request_id, output in protocol.output_list(message):
                with self._lock:
                    generation = self._generations.get(request_id)
                    if generation is not None and output.finish_reason:
                        del self._generations[request_id]
                if generation is not None:
                    generation.put(output)
        failure = EngineError("the session is closed") if self._closing else self._ranks.failure()
        with self._lock:
            self._failure = failure
            waiting, self._generations = list(self._generations.values()), {}
        for generation in waiting:
            generation.put(failure)

    def close(self) -> None:
        """End all ranks. Requests that still run raise EngineError."""
        self._closing = True
        self._ranks.end(wait_s=_END_S)
        self._receiver.join()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Ranks:
    """The processes, the socket to rank 0, and the last lines they wrote."""

    def __init__(self, engine: Path, tp_size: int) -> None:
        self._pids: list[int] = []
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
        self._pids = message["ready"]
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
        try:
            self._connection.sendall(protocol.encode(message))
        except (BrokenPipeError, ConnectionResetError):
            pass

    def messages(self) -> Iterator[protocol.Message]:
        """Until the socket ends."""
        with self._stream:
            try:
                yield from map(protocol.decode, self._stream)
            except ConnectionError:
                pass  # rank 0 was killed; the same as the end of the stream

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
            try:
                self._connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # ended already
        try:
            self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            pass
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
            for pid in self._pids:
                _kill_one(pid)
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _kill_one(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _command(tp_size: int) -> list[str]:
    worker = [sys.executable, "-m", "engines.embedded.worker"]
    if tp_size == 1:
        return worker
    options = [
        x for name, value in zip(*[iter(_MPI_OPTIONS)] * 2, strict=True) for x in ("--mca", name, value)
    ]
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return [_mpirun(), "-n", str(tp_size), "--oversubscribe", "--bind-to", "none", *root, *options, *worker]


def _mpirun() -> str:
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.is_file() else shutil.which("mpirun")
    if found is None:
        raise UserError("mpirun: not found, tensor parallelism needs it; pip install 'ffn-fusion[mpi]'")
    return found
