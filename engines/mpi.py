"""mpirun: where it is, whether it started this process, where it puts ranks, and why it ended."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
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
ALLOCATION = "allocation"
SHARED_MEMORY = "OMPI_MCA_btl_sm_backing_directory"

# What Open MPI 5's mpirun says of the rank or daemon that ended first; it breaks lines anywhere.
_SIGNALLED = re.compile(r"process rank (\d+) with PID \d+ on node (\S+) exited on signal (\d+)")
_STATUS = re.compile(r"Process name: \[\S+?,(\d+)\] Exit code: (\d+)")
_IMPROPER = re.compile(r"process rank (\d+) with PID \d+ on node (\S+) (?:exiting improperly|calling)")
_UNREACHED = re.compile(r"Remote host: (\S+) Daemon exit status: (\d+)")
_NO_PROGRAM = re.compile(r"could not access an executable: Executable: (\S+) Node: (\S+)")
_LOST = "lost communication with a remote daemon"


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


def inner_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for an mpirun of one's own: without what an outer one left in it.

    Where there is no outer one, settings such as OMPI_MCA_btl_tcp_if_include are the user's and stay.
    """
    outer = ("OMPI_", "PMIX_", "PRTE_") if "PMIX_RANK" in environment else ()
    return {name: value for name, value in environment.items() if not name.startswith(outer)}


def placement(hosts: Sequence[str], size: int) -> list[str]:
    """mpirun's options that put `size` ranks on `hosts`, such as ("a:2", "b:2"), in that order.

    None given: on this host, whatever Slurm or PBS allocated. ("allocation",): where mpirun finds that
    this job may run, rank 0 on the first host. Raises UserError where the slots do not add up to `size`, or
    the first host is not this one, which rank 0 has to run on.
    """
    if tuple(hosts) == (ALLOCATION,):
        return ["-n", str(size)]
    if not hosts:
        return ["-n", str(size), "--host", f"localhost:{size}"]
    slots = 0
    for host in hosts:
        found = re.fullmatch(r"[A-Za-z0-9._-]+(?::([1-9]\d*))?", host)
        if found is None:
            raise UserError(f"hosts: {host!r} is not NAME or NAME:RANKS; give for example a:2,b:2")
        slots += int(found[1] or 1)
    if slots != size:
        raise UserError(f"hosts: room for {slots} ranks in {','.join(hosts)}, the engine has {size}")
    first = hosts[0].partition(":")[0]
    if not is_this_host(first):
        raise UserError(
            f"hosts: {first} is not this host, {socket.gethostname()}; name that first, rank 0 runs where "
            "the session does"
        )
    return ["-n", str(size), "--host", ",".join(hosts)]


def is_this_host(name: str) -> bool:
    """Whether `name` is this host's, or has one of its addresses."""
    if name in ("localhost", socket.gethostname(), socket.gethostname().partition(".")[0]):
        return True
    try:
        answers = socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    return any(_is_own(family, address[0]) for family, _, _, _, address in answers)


def _is_own(family: int, address: str | int) -> bool:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def own_directory(pid: int) -> Path:
    """Where Open MPI 5's mpirun of that process id keeps its files; it removes them unless it is killed."""
    return Path(tempfile.gettempdir()) / f"ompi.{pid}"


def shared_memory_directory() -> str | None:
    """Where Open MPI keeps shared memory; None where /dev/shm is not there."""
    return os.environ.get(SHARED_MEMORY) or ("/dev/shm" if Path("/dev/shm").is_dir() else None)


def remove_shared_memory() -> None:
    """Take the names off the segments of Open MPI's shared-memory transport that this process has mapped.

    They live on until the last rank ends, however it ends.
    """
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    for path in {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/sm_segment." in line}:
        Path(path).unlink(missing_ok=True)


def cause_of_death(said: str, status: int | None) -> str:
    """Why the ranks ended, in one line, from what mpirun said and its exit status, negative for a signal.

    mpirun tells of the rank that ended first: it ends the others itself.
    """
    words = " ".join(said.split())
    if found := _SIGNALLED.search(words):
        return f"rank {found[1]} on {found[2]} was ended by {signal_name(int(found[3]))}"
    if found := _STATUS.search(words):
        return f"rank {found[1]} ended with exit status {found[2]}"
    if found := _UNREACHED.search(words):
        return (
            f"mpirun cannot start its daemon on {found[1]}, exit status {found[2]}; check that "
            f"`ssh {found[1]}` works without a password and has the same files"
        )
    if found := _NO_PROGRAM.search(words):
        return f"{found[1]}: not on {found[2]}; all hosts need the same paths"
    if _LOST in words:
        return "mpirun lost a host or its daemon there"
    if found := _IMPROPER.search(words):
        return f"rank {found[1]} on {found[2]} ended by itself"
    return "no rank said why" if status is None else describe_status(status)


def describe_status(status: int) -> str:
    """A process's end: 3 or, for a signal, -9."""
    return f"ended by {signal_name(-status)}" if status < 0 else f"exit status {status}"


def signal_name(number: int) -> str:
    """SIGKILL for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
