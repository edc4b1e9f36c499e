"""One rank of a running engine: `python -m engines.embedded.worker ENGINE SOCKET [--mpi]`.

Rank 0 takes requests from the session's socket, schedules, samples, and tells the other ranks each
step. The socket is connected before anything heavy is loaded: its end, whatever the reason, ends all
ranks.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from builder.errors import UserError
from engines import hardware
from engines.embedded import protocol, step
from engines.embedded.collectives import Alone, Communicator, MPIRanks
from engines.embedded.protocol import Message
from engines.embedded.request import Output
from engines.embedded.runtime import Runtime
from engines.embedded.sampling import Sampler, sample
from engines.embedded.scheduler import Scheduler

_GRACE_S = 3.0  # from the socket's end to the hard end of a rank that does not notice


class Connection:
    """Rank 0's end of the socket; a thread reads it, so that its end is noticed during a long step."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(path)
        finally:  # of no more use, and the session may be gone already
            with contextlib.suppress(FileNotFoundError):
                Path(path).unlink()
                Path(path).parent.rmdir()
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with self._socket.makefile("rb") as lines, contextlib.suppress(ConnectionError):
            for line in lines:
                self._inbox.put(protocol.decode(line))
        self._inbox.put(None)
        time.sleep(_GRACE_S)
        os._exit(1)

    def receive(self, *, wait: bool) -> list[Message | None]:
        """Messages that have come, None at the end of the stream; with `wait` at least one."""
        messages = [self._inbox.get()] if wait else []
        while not self._inbox.empty():
            messages.append(self._inbox.get())
        return messages

    def send(self, message: Message) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the reading thread sees it too
            self._socket.sendall(protocol.encode(message))


class Leader:
    """Rank 0's work: requests in, steps through all ranks, tokens out."""

    def __init__(self, runtime: Runtime, communicator: Communicator, connection: Connection) -> None:
        self._runtime, self._communicator, self._connection = runtime, communicator, connection
        self._scheduler = Scheduler(runtime.manifest.max_batch_size)
        self._samplers: dict[int, Sampler] = {}

    def run(self) -> None:
        """Until the session ends."""
        while self._take_messages():
            if results := self._step():
                self._connection.send(protocol.outputs(results))
        self._communicator.send_step(step.encode(None))

    def _take_messages(self) -> bool:
        for message in self._connection.receive(wait=self._scheduler.idle):
            if message is None:
                return False
            if "submit" in message:
                request = protocol.submitted(message)
                self._samplers[message["submit"]] = Sampler(request)
                self._scheduler.submit(message["submit"], request)
            else:
                self._samplers.pop(message["cancel"], None)
                self._scheduler.cancel(message["cancel"])
        return True

    def _step(self) -> list[tuple[int, Output]]:
        work = self._scheduler.next_step()
        if work is None:
            return []
        this, rows = work
        self._communicator.send_step(step.encode(this))
        logits = self._runtime.run(this)
        assert logits is not None, "rank 0 has the logits"
        tokens = sample(logits, [self._samplers[row.request_id] for row in rows])
        results = self._scheduler.advance(rows, tokens)
        for request_id, output in results:
            if output.finish_reason:
                del self._samplers[request_id]
        return results


def follow(runtime: Runtime, communicator: Communicator) -> None:
    """What the other ranks do: every step that rank 0 sends."""
    manifest = runtime.manifest
    longest = step.max_message_size(manifest.max_batch_size, manifest.max_input_len)
    while (this := step.decode(communicator.receive_step(longest))) is not None:
        runtime.run(this)


def watch_parent() -> None:
    """End this process at once when mpirun is gone; MPI alone would wait for ever."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def serve(engine: Path, communicator: Communicator, connection: Connection | None) -> None:
    """Load this rank and work until the session ends."""
    import torch

    torch.set_num_threads(max(1, hardware.cores() // communicator.size))
    torch.set_grad_enabled(False)
    runtime = Runtime(engine, communicator)
    pids = communicator.gather_pids()
    if connection is None:
        follow(runtime, communicator)
    else:
        connection.send({"ready": pids})
        Leader(runtime, communicator, connection).run()


def main(engine: str, path: str, *mpi: str) -> None:
    """Ranks that fail say why on stderr and take the others with them."""
    if mpi:
        watch_parent()
    leading = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0")) == 0
    connection = Connection(path) if leading else None
    communicator: Communicator = MPIRanks() if mpi else Alone()
    sys.excepthook = _abort_hook(communicator)
    try:
        serve(Path(engine), communicator, connection)
    except UserError as error:
        if connection is not None:
            connection.send({"refused": str(error)})
        raise


def _abort_hook(communicator: Communicator) -> Callable[..., None]:
    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        traceback.print_exception(kind, error, trace)
        print(f"error: rank {communicator.rank}: {kind.__name__}: {error}", file=sys.stderr, flush=True)  # noqa: T201
        communicator.abort()

    return hook


if __name__ == "__main__":
    main(*sys.argv[1:])
