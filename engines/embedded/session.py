"""A running engine: its rank processes, and requests to them from any thread. Imports no torch."""

from __future__ import annotations

import itertools
import math
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from builder.errors import UserError
from engines import manifest as manifests
from engines import mpi
from engines.embedded import memory, protocol, target
from engines.embedded.ranks import EngineError, Ranks
from engines.embedded.request import Output, Request
from engines.manifest import Manifest

__all__ = ["EngineError", "Generation", "Output", "Request", "Session"]

_END_S = 4.0  # for the ranks to end by themselves, after which they are killed

Outputs = queue.SimpleQueue[Output | EngineError | None]  # None ends a wait for what was cancelled


class Generation(Iterator[Output]):
    """The outputs of one request; `close`, or losing the object, cancels what is left of it."""

    def __init__(self, session: Session, request_id: int, outputs: Outputs) -> None:
        self._session, self._request_id, self._outputs = session, request_id, outputs
        self._done = False

    def __next__(self) -> Output:
        if self._done:
            raise StopIteration
        output = self._outputs.get()
        if output is None:
            raise StopIteration
        if isinstance(output, EngineError):
            self._done = True
            raise EngineError(*output.args)
        self._done = output.finish_reason is not None
        return output

    def close(self) -> None:
        """Stop the work on this request within one step; a thread that waits for outputs gets no more."""
        if not self._done:
            self._done = True
            self._session._cancel(self._request_id)
            self._outputs.put(None)

    def __del__(self) -> None:
        self.close()


class Session:
    """Starts an engine's ranks and ends them.

    `hosts`, such as ("a:2", "b:2"), are where ranks run, in that order, this host first, by which name it has
    for mpirun; the engine and this installation have the same paths there. ("allocation",) are those that
    Slurm or PBS gave. Raises UserError where the engine cannot run here, mpirun is missing or `hosts` do not
    fit, EngineError where a rank dies or is not ready after `start_timeout_s` seconds. Ranks that make no
    step for `step_timeout_s` seconds while there are requests are taken for hanging, and killed.
    """

    def __init__(
        self,
        engine_dir: Path,
        *,
        hosts: Sequence[str] = (),
        start_timeout_s: float = 120,
        step_timeout_s: float = 600,
    ) -> None:
        if mpi.place()[1] > 1:
            raise UserError(
                f"mpirun: started this program {mpi.place()[1]} times; start it once, a session starts the "
                "ranks of its engine itself"
            )
        self.manifest: Manifest = manifests.read(engine_dir)
        target.check(engine_dir, self.manifest)
        if self.manifest.device == "cpu":
            memory.check(engine_dir, self.manifest, 1 if hosts else self.manifest.tp_size)
        self._lock = threading.RLock()  # the collector may close a Generation while we hold it
        self._outputs: dict[int, Outputs] = {}
        self._ids = itertools.count()
        self._failure: EngineError | None = None
        self._closing = False
        self._step_timeout_s, self._waiting_since = step_timeout_s, math.inf
        self._ranks = Ranks(engine_dir.resolve(), self.manifest.tp_size, hosts)
        try:
            self._ranks.wait_until_ready(start_timeout_s)
        except BaseException:
            self._ranks.end(wait_s=0)
            raise
        self._receiver = threading.Thread(target=self._receive, daemon=True)
        self._receiver.start()

    @property
    def pids(self) -> list[int]:
        """The process ids of the ranks, rank 0 first."""
        return self._ranks.pids

    def generate(self, request: Request) -> Generation:
        """Queue a request; its outputs come step by step.

        Raises UserError where it is over a limit, EngineError where a rank has died.
        """
        request.check_limits(self.manifest)
        with self._lock:
            if self._failure:
                raise EngineError(*self._failure.args)
            if not self._outputs:
                self._waiting_since = time.monotonic()
            request_id, outputs = next(self._ids), Outputs()
            self._outputs[request_id] = outputs
            self._ranks.send(protocol.submit(request_id, request))
        return Generation(self, request_id, outputs)

    def _cancel(self, request_id: int) -> None:
        with self._lock:
            if self._outputs.pop(request_id, None) is not None:
                self._ranks.send({"cancel": request_id})

    def _deadline(self) -> float:
        return self._waiting_since + self._step_timeout_s if self._outputs else math.inf

    def _receive(self) -> None:
        try:
            for message in self._ranks.messages(self._deadline):
                self._waiting_since = time.monotonic()
                self._take(message)
        except TimeoutError:
            failure = self._ranks.hang(self._step_timeout_s)
        else:
            failure = EngineError("the session is closed") if self._closing else self._ranks.failure()
        with self._lock:
            self._failure = failure
            waiting, self._outputs = list(self._outputs.values()), {}
        for outputs in waiting:
            outputs.put(failure)

    def _take(self, message: protocol.Message) -> None:
        for request_id, output in protocol.output_list(message):
            with self._lock:
                outputs = self._outputs.get(request_id)
                if output.finish_reason:
                    self._outputs.pop(request_id, None)
            if outputs is not None:
                outputs.put(output)

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
