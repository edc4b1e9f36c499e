"""One rank of a running engine: `python -m engines.embedded.worker ENGINE SOCKET [--mpi]`.

Rank 0 connects to the session before anything heavy is loaded: the end of that socket, whatever the
reason, ends all ranks.
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from builder.errors import UserError
from engines import manifest, mpi
from engines.embedded.connection import Connection

if TYPE_CHECKING:
    from engines.embedded.collectives import Communicator


def watch_parent() -> None:
    """End this process at once when the mpirun or the daemon that started it is gone.

    MPI alone may wait for ever. What those cannot remove any more goes: their directory and shared memory.
    """
    parent = os.getppid()
    try:
        gone = os.pidfd_open(parent)
    except ProcessLookupError:
        os._exit(1)

    def watch() -> None:
        if os.getppid() == parent:
            select.select([gone], [], [])
        mpi.remove_shared_memory()
        if directory := os.environ.get("PMIX_SERVER_TMPDIR"):
            shutil.rmtree(directory, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(engine: str, path: str, *options: str) -> None:
    """Ranks that fail say why on stderr and take the others with them."""
    sys.excepthook = partial(_say_and_exit, partial(os._exit, 1))
    if options:
        watch_parent()
    connection = Connection(path) if mpi.place()[0] == 0 else None
    try:
        serve(Path(engine), connection, scratch=str(Path(path).parent), over_mpi=bool(options))
    except UserError as error:
        if connection is not None:
            connection.send({"refused": str(error)})
        raise


def serve(engine: Path, connection: Connection | None, *, scratch: str, over_mpi: bool) -> None:
    """Join the other ranks and work until the session ends.

    Raises UserError where the engine is not on this host or was built for another number of ranks.
    """
    size = manifest.read(engine).world_size
    from engines.embedded import leader
    from engines.embedded.collectives import Alone, MPIRanks

    use_temporary_directory(os.environ.get("PMIX_SERVER_TMPDIR") or scratch)
    communicator: Communicator = MPIRanks() if over_mpi else Alone()
    sys.excepthook = partial(_say_and_exit, communicator.abort)
    if communicator.size != size:
        raise UserError(
            f"{engine}: built for {size} ranks, mpirun started {communicator.size}; convert with "
            f"--tp {communicator.size} and build again, or start {size}"
        )
    leader.serve(engine, communicator, connection)


def use_temporary_directory(directory: str) -> None:
    """Put temporary files where those who end this process remove them: mpirun, its daemon or the session.

    torch's lasting cache stays where it is.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    cache_dir()  # sets TORCHINDUCTOR_CACHE_DIR
    os.environ["TMPDIR"] = tempfile.tempdir = directory


def _say_and_exit(
    end: Callable[[], None],
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    if not issubclass(kind, UserError):
        traceback.print_exception(kind, error, trace)
    rank, size = mpi.place()
    where = f" on {socket.gethostname()}" if mpi.local_size() < size else ""
    what = str(error) if issubclass(kind, UserError) else f"{kind.__name__}: {error}"
    print(f"error: rank {rank}{where}: {what}", file=sys.stderr, flush=True)  # noqa: T201
    end()


if __name__ == "__main__":
    main(*sys.argv[1:])
