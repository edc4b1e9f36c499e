"""This rank's GPU, and the ranks' sums over NCCL. Not run on a GPU yet.

Ranks are processes that mpirun started, each with a GPU of its own.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

import torch
from torch import Tensor

from builder.errors import UserError
from engines import mpi

# As Open MPI, MPICH's Hydra and Slurm's srun tell it.
LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")


def local_rank(environment: Mapping[str, str] = os.environ) -> int:
    """This process's place among those of its job on this host; 0 where no launcher started it."""
    told = (environment.get(name, "") for name in LOCAL_RANKS)
    return next((int(x) for x in told if x.isdecimal()), 0)


def device() -> torch.device:
    """The GPU that this rank uses from now on. Raises UserError where there is none for it."""
    if not torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} finds no usable GPU; install a CUDA build that the driver supports"
        )
    rank, count = local_rank(), torch.cuda.device_count()
    if rank >= count:
        raise UserError(
            f"rank {rank} has no GPU: {count} visible; make one visible for each rank (CUDA_VISIBLE_DEVICES)"
        )
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def join(rank: int, size: int, own: torch.device) -> None:
    """Make the group of the ranks, NCCL's on GPUs; MPI tells them where they meet. A barrier."""
    from mpi4py import MPI
    from torch import distributed
    from torch._C._distributed_c10d import TCPStore

    host = "127.0.0.1" if mpi.local_size() == size else socket.gethostname()
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    host, port = MPI.COMM_WORLD.bcast((host, store.port) if store else None)
    distributed.init_process_group(
        distributed.get_default_backend_for_device(own),
        store=store or TCPStore(host, port, is_master=False),
        rank=rank,
        world_size=size,
        device_id=own if own.type == "cuda" else None,
    )


def all_reduce(x: Tensor) -> Tensor:
    """`ffn_fusion::all_reduce` for CUDA: the sum over ranks, in x's dtype. CUDA graphs record it."""
    total = x.contiguous().clone()
    torch.distributed.all_reduce(total)
    return total
