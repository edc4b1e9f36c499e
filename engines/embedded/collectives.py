"""What ranks say to each other: the compiled all-reduce, step messages, and gathered logits.

`torch.ops.ffn_fusion.all_reduce` is in the compiled programs. It is registered without the wrapper
of torch.library.custom_op, which costs more than the reduction itself.
"""

from __future__ import annotations

import os
import time
from array import array
from typing import Any, Protocol

import torch
from torch import Tensor

from engines import mpi
from engines.embedded import cuda

_STEP, _SUM = 1, 2  # tags: a step of rank 0 is never taken for a part of a sum
_SPIN_S = 2e-3  # how long a rank looks for work before it begins to sleep
_LONGEST_SLEEP_S = 1e-3

_library = torch.library.Library("ffn_fusion", "DEF")
_library.define("all_reduce(Tensor x) -> Tensor")


class Communicator(Protocol):
    """The ranks of one engine."""

    rank: int
    size: int
    local_size: int  # ranks on this host

    def send_step(self, message: array[int]) -> None:
        """Rank 0: give every other rank the next step."""

    def receive_step(self, longest: int) -> array[int]:
        """Other ranks: wait for a step without holding a core."""

    def gather(self, logits: Tensor) -> Tensor | None:
        """[B, V / size] float32 of every rank side by side on rank 0, None elsewhere."""

    def gather_pids(self) -> list[int]:
        """The process ids of all ranks; also a barrier."""

    def abort(self) -> None:
        """End all ranks at once."""


class Alone:
    """One rank, no MPI."""

    rank = 0
    size = 1
    local_size = 1

    def send_step(self, message: array[int]) -> None:
        pass

    def receive_step(self, longest: int) -> array[int]:
        raise AssertionError("rank 0 makes the steps")

    def gather(self, logits: Tensor) -> Tensor | None:
        return logits

    def gather_pids(self) -> list[int]:
        return [os.getpid()]

    def abort(self) -> None:
        os._exit(1)


class MPIRanks:
    """The ranks that mpirun started, joined by MPI_COMM_WORLD."""

    def __init__(self) -> None:
        import mpi4py

        mpi4py.rc.thread_level = "funneled"  # only the main thread calls MPI
        from mpi4py import MPI

        self._mpi: Any = MPI
        self._world: Any = MPI.COMM_WORLD
        self.rank: int = self._world.Get_rank()
        self.size: int = self._world.Get_size()
        self.local_size = mpi.local_size()
        _library.impl("all_reduce", AllReduce(MPI), "CPU")

    def send_step(self, message: array[int]) -> None:
        for rank in range(1, self.size):
            self._world.Send([message, self._mpi.INT64_T], dest=rank, tag=_STEP)

    def receive_step(self, longest: int) -> array[int]:
        self._wait_for_message()
        message, status = array("q", bytes(8 * longest)), self._mpi.Status()
        self._world.Recv([message, self._mpi.INT64_T], source=0, tag=_STEP, status=status)
        return message[: status.Get_count(self._mpi.INT64_T)]

    def _wait_for_message(self) -> None:
        """MPI's own waits take a whole core, so look for a while and then sleep between looks."""
        start = time.monotonic()
        while not self._world.Iprobe(source=0, tag=_STEP):
            waited = time.monotonic() - start
            if waited < _SPIN_S:
                os.sched_yield()
            else:
                time.sleep(min(_LONGEST_SLEEP_S, waited / 20))

    def gather(self, logits: Tensor) -> Tensor | None:
        batch, rows = logits.shape
        parts = torch.empty(self.size, batch, rows) if self.rank == 0 else None
        self._world.Gather(logits.numpy(), None if parts is None else parts.numpy(), root=0)
        return None if parts is None else parts.transpose(0, 1).reshape(batch, self.size * rows)

    def gather_pids(self) -> list[int]:
        # Every pair talks here, so all have mapped each other's shared memory after the barrier.
        pids: list[int] = self._world.alltoall([os.getpid()] * self.size)
        self._world.Barrier()
        mpi.remove_shared_memory()
        return pids

    def abort(self) -> None:
        self._world.Abort(1)


class AllReduce:
    """The sum over all ranks, in float32, rounded once to x's dtype.

    All ranks have the same bits, and a row has the same alone and in a batch: two ranks exchange and add, and
    more add in an order that `ranks.MPI_OPTIONS` fixes; MPI would choose it by the size of the message.
    """

    def __init__(self, mpi_module: Any) -> None:
        self._world: Any = mpi_module.COMM_WORLD
        self._byte, self._float = mpi_module.BYTE, mpi_module.FLOAT
        self._address = mpi_module.buffer.fromaddress
        self._partner = 1 - self._world.Get_rank()
        self._size = self._world.Get_size()

    def __call__(self, x: Tensor) -> Tensor:
        return self._of_two(x.contiguous()) if self._size == 2 else self._of_many(x.contiguous())

    def _of_two(self, x: Tensor) -> Tensor:
        other = torch.empty_like(x)
        own, theirs = [self._memory(x), self._byte], [self._memory(other), self._byte]
        self._world.Sendrecv(own, self._partner, _SUM, theirs, self._partner, _SUM)
        return x + other  # one addition, so one rounding

    def _of_many(self, x: Tensor) -> Tensor:
        wide = x.float()
        total = torch.empty_like(wide)
        self._world.Allreduce([self._memory(wide), self._float], [self._memory(total), self._float])
        return total.to(x.dtype)

    def _memory(self, x: Tensor) -> Any:
        """What mpi4py takes, in less time than through numpy, which has no bfloat16."""
        return self._address(x.data_ptr(), x.nbytes)


@torch.library.register_fake("ffn_fusion::all_reduce", lib=_library)
def _all_reduce_shape(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_library.impl("all_reduce", cuda.all_reduce, "CUDA")
