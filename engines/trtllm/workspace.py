"""The directory beside the output that a build works in, and what it keeps for the next try."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from builder.errors import UserError
from builder.storage import read_json, write_json

LOG = "build.log"
WAIT_S = 60.0


class Workspace:
    """`.NAME.building` beside the output NAME: engines, logs, and a record of every finished rank.

    All processes of an mpirun share it. It survives a failed or killed build; what another
    checkpoint, option or release left there is discarded.
    """

    def __init__(self, output: Path) -> None:
        self.output = output.absolute()
        self.directory = self.output.parent / f".{self.output.name}.building"

    @contextmanager
    def open(self, digest: str) -> Iterator[None]:
        """Hold the directory while the block lasts. Raises UserError where another build does."""
        if os.path.lexists(self.output):
            raise UserError(f"{self.output}: exists; remove it or choose another output directory")
        try:
            self.directory.mkdir(exist_ok=True)
            handle = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise UserError(f"{self.directory}: {error.strerror}") from None
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.output}: another build writes it; wait for that one") from None
            inputs = self.directory / "inputs.json"
            if not inputs.is_file() or read_json(inputs).get("digest") != digest:
                for entry in self.directory.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                partial = inputs.with_suffix(".partial")
                write_json(partial, {"digest": digest})
                partial.rename(inputs)
            yield
        finally:
            os.close(handle)

    def wait_until_open(self, digest: str) -> None:
        """Wait for the first process of the mpirun to open it. Raises UserError where it does not."""
        deadline = time.monotonic() + WAIT_S
        inputs = self.directory / "inputs.json"
        while not inputs.is_file() or read_json(inputs).get("digest") != digest:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.directory}: the first process did not open it for these inputs within "
                    f"{WAIT_S:.0f} s; give all hosts the same files, GPUs and directory"
                )
            time.sleep(0.1)

    def engine(self, rank: int) -> Path:
        """The engine file of a rank, as trtllm-build names it."""
        return self.directory / f"rank{rank}.engine"

    def finish(self, rank: int) -> None:
        """Record that a rank's engine is whole."""
        write_json(self._record(rank), {"bytes": self.engine(rank).stat().st_size})

    def finished(self, world_size: int) -> list[int]:
        """The ranks whose engines are recorded as whole and have not changed since."""
        ranks = [r for r in range(world_size) if self._record(r).is_file() and self.engine(r).is_file()]
        return [r for r in ranks if read_json(self._record(r)).get("bytes") == self.engine(r).stat().st_size]

    def publish(self, world_size: int) -> None:
        """Make it the engine directory, without the records."""
        for file in (*(self._record(r) for r in range(world_size)), self.directory / "inputs.json"):
            file.unlink(missing_ok=True)
        self.directory.rename(self.output)

    def _record(self, rank: int) -> Path:
        return self.directory / f"rank{rank}.done.json"
