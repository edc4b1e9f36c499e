"""The processes that work on one output: this one alone, or all that mpirun started."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import click

from builder.errors import UserError, describe

T = TypeVar("T")
# Set by Open MPI, by MPICH and Slurm's PMI, and by PMIx launchers such as `srun --mpi=pmix`.
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")


class Team:
    """`rank` of `size` processes; `comm` is an mpi4py communicator, None for one process alone."""

    def __init__(self, comm: Any = None) -> None:
        self._comm = comm
        self.rank: int = comm.Get_rank() if comm else 0
        self.size: int = comm.Get_size() if comm else 1

    @classmethod
    def join(cls) -> Team:
        """All processes of the mpirun that started this one; this one alone without it."""
        if not any(name in os.environ for name in _RANK_VARIABLES):
            return cls()
        from mpi4py import MPI

        return cls(MPI.COMM_WORLD)

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` on every process; where it fails on one, all fail, and only rank 0 says why.

        Raises UserError with the first failing rank's message on rank 0, SystemExit(1) on the others.
        """
        if self._comm is None:
            return work()
        result, message = None, None
        try:
            result = work()
        except (UserError, OSError) as error:
            message = describe(error)
        except click.UsageError:
            raise  # the same on every process, before any of them waits
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            self._comm.Abort(1)
            raise
        failed = next((text for text in self._comm.allgather(message) if text is not None), None)
        if failed is not None and self.rank == 0:
            raise UserError(failed)
        if failed is not None:
            raise SystemExit(1)
        return result  # type: ignore[return-value]

    def first(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0 alone; all get its result, or fail with it."""
        result = self.together(lambda: work() if self.rank == 0 else None)
        return self.collect(result)[0]  # type: ignore[return-value]

    def collect(self, value: T) -> list[T]:
        """Every process's value, by rank, on all of them."""
        return [value] if self._comm is None else self._comm.allgather(value)
