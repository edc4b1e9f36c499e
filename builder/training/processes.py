"""The processes of one training: this one alone, or all that torchrun started, on any number of nodes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from builder.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Processes:
    """`rank` of `size` processes, each with its `device`; fully_shard cuts over `mesh`, None alone."""

    rank: int
    size: int
    device: torch.device
    mesh: Any = None

    def sum(self, x: Tensor) -> Tensor:
        """`x` added up over all ranks, in place."""
        if self.mesh is not None:
            dist.all_reduce(x)
        return x

    def barrier(self) -> None:
        """Wait for all."""
        if self.mesh is not None:
            dist.barrier()

    def first(self, x: T) -> T:
        """Rank 0's `x`, on every rank."""
        if self.mesh is None:
            return x
        held = [x]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def agree(self, error: UserError | None) -> None:
        """Raise on all ranks, rank 0 among them, what any of them brings."""
        brought: list[str | None] = [None if error is None else str(error)]
        if self.mesh is not None:
            brought = [None] * self.size
            dist.all_gather_object(brought, None if error is None else str(error))
        for text in brought:
            if text is not None:
                raise UserError(text)


def rank() -> int:
    """As torchrun says it."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """As torchrun says it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined() -> Iterator[Processes]:
    """All processes of the torchrun that started this one: NCCL on GPUs, gloo on CPUs."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size() == 1:
        yield Processes(rank=0, size=1, device=device)
        return
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        mesh = init_device_mesh(device.type, (size(),))
        yield Processes(rank=rank(), size=size(), device=device, mesh=mesh)
    finally:
        dist.destroy_process_group()
