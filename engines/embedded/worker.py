"""One rank of a running engine: `python -m engines.embedded.worker ENGINE SOCKET [--mpi]`.

Rank 0 connects to the session before anything heavy is loaded: the end of that socket, whatever the
reason, ends all ranks.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from builder.errors import UserError
from engines.embedded.connection import Connection

if TYPE_CHECKING:
    from engines.embedded.collectives import Communicator


def watch_parent() -> None:
    """End this process at once when mpirun is gone; MPI alone would wait for ever."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(engine: str, path: str, *mpi: str) -> None:
    """Ranks that fail say why on stderr and take the others with them."""
    if mpi:
        watch_parent()
    leading = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0")) == 0
    connection = Connection(path) if leading else None
    from engines.embedded.collectives import Alone, MPIRanks
    from engines.embedded.leader import serve

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
