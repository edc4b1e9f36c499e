"""mpirun: where it is, and whether it started this process."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from builder.errors import UserError

# Size and rank as Open MPI, MPICH's Hydra and Slurm's srun tell them. Slurm's SLURM_NTASKS would not
# do: a batch script has it too.
LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE")
LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


def launcher() -> list[str]:
    """The mpirun beside this Python or on PATH. Raises UserError where there is none."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.is_file() else shutil.which("mpirun")
    if found is None:
        raise UserError("mpirun: not found, tensor parallelism needs it; pip install 'ffn-fusion[mpi]'")
    return [found, *["--allow-run-as-root"] * (os.geteuid() == 0)]


def place(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """This process's rank and how many there are: (0, 1) unless mpirun or srun started it.

    Read from the environment: a process that calls MPI_Init keeps its children from doing so.
    """
    for size, rank in LAUNCHERS:
        if environment.get(size, "").isdecimal() and environment.get(rank, "").isdecimal():
            return int(environment[rank]), int(environment[size])
    return 0, 1


def local_size(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes of this MPI job run on this host; all of them where the launcher does not say."""
    for name in LOCAL_SIZES:
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    return place(environment)[1]
