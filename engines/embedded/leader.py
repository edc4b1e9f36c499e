"""The work of a rank once it is connected: rank 0 leads, the others follow."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from engines import hardware
from engines.embedded import protocol, step
from engines.embedded.collectives import Communicator
from engines.embedded.connection import Connection
from engines.embedded.request import Output
from engines.embedded.runtime import Runtime
from engines.embedded.sampling import Sampler, sample
from engines.embedded.scheduler import Scheduler


class Leader:
    """Rank 0's work: requests in, steps through all ranks, tokens out."""

    def __init__(self, runtime: Runtime, communicator: Communicator, connection: Connection) -> None:
        self._runtime, self._communicator, self._connection = runtime, communicator, connection
        manifest = runtime.manifest
        self._scheduler = Scheduler(manifest.max_batch_size, manifest.kv_cache_blocks)
        self._samplers: dict[int, Sampler] = {}  # by slot; that of a free slot is of no more use

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
                self._scheduler.submit(message["submit"], protocol.submitted(message))
            else:
                self._scheduler.cancel(message["cancel"])
        return True

    def _step(self) -> list[tuple[int, Output]]:
        work = self._scheduler.next_step()
        if work is None:
            return []
        this, rows = work
        if self._communicator.size > 1:
            self._communicator.send_step(step.encode(this))
        logits = self._runtime.run(this)
        assert logits is not None, "rank 0 has the logits"
        if isinstance(this, step.Prefill):
            self._samplers[this.slot] = Sampler(rows[0].request)
        tokens, log_probs = sample(logits, [self._samplers[row.slot] for row in rows])
        return self._scheduler.advance(rows, tokens, log_probs)


def follow(runtime: Runtime, communicator: Communicator) -> None:
    """What the other ranks do: every step that rank 0 sends."""
    manifest = runtime.manifest
    longest = step.max_message_size(manifest.max_batch_size, manifest.max_input_len, manifest.max_seq_len)
    while (this := step.decode(communicator.receive_step(longest))) is not None:
        runtime.run(this)


def serve(engine: Path, communicator: Communicator, connection: Connection | None) -> None:
    """Load this rank and work until the session ends."""
    if not os.environ.get("OMP_NUM_THREADS", "").isdecimal():  # torch has read that one
        torch.set_num_threads(max(1, hardware.cores() // communicator.local_size))
    torch.set_grad_enabled(False)
    runtime = Runtime(engine, communicator)
    pids = communicator.gather_pids()
    if connection is None:
        follow(runtime, communicator)
    else:
        connection.send({"ready": pids})
        Leader(runtime, communicator, connection).run()
