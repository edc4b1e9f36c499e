"""Checkpoints of a training: torch's distributed checkpoints, each whole or not there at all.

DIR/run.json     what is trained on what; another training is refused here
DIR/step-N       weights and AdamW's moments after N steps, resharded when another number of ranks reads it
DIR/log.jsonl    a line for each step
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from builder.errors import UserError
from builder.training import identity
from builder.training.processes import Processes

RUN, LOG = "run.json", "log.jsonl"
OPTION = "--checkpoint-dir"


class Checkpoints:
    """The checkpoints of one training in a directory that all ranks see."""

    def __init__(self, directory: Path, processes: Processes) -> None:
        self.directory = directory.absolute()
        self.processes = processes

    @property
    def log(self) -> Path:
        return self.directory / LOG

    def step_directory(self, step: int) -> Path:
        return self.directory / f"step-{step}"

    def steps(self) -> list[int]:
        """Those there are, in ascending order."""
        found = (re.fullmatch(r"step-(\d+)", x.name) for x in self.directory.iterdir())
        return sorted(int(x[1]) for x in found if x)

    @contextmanager
    def held(self, run: Mapping[str, Any]) -> Iterator[None]:
        """The directory, made where it is missing, for this training alone.

        Raises UserError where it holds another training, naming the first difference, or is in use.
        """
        if self.processes.rank:
            self.processes.barrier()
            yield
            return
        identity.make(self.directory, OPTION)
        with identity.locked(self.directory, "trains"):
            identity.check(self.directory, RUN, run, "this training began", OPTION)
            for partial in self.directory.glob(".step-*"):
                shutil.rmtree(partial)
            self.processes.barrier()
            yield

    def save(self, step: int, state: dict[str, Tensor]) -> None:
        """Write the state after `step` steps, then remove the older one.

        Raises UserError where the disk is full; the older one is kept then.
        """
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict_saver import save

        old = self.steps()
        partial, final = self.directory / f".step-{step}", self.step_directory(step)
        self._check_space(state)
        self.processes.barrier()
        try:
            with _alone_is_meant():
                save(state, checkpoint_id=partial)
        except CheckpointException as error:
            if self.processes.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"{final}: {_reason(error)}; {self.kept()}; make room, then give the same command again"
            ) from None
        if self.processes.rank == 0:
            partial.rename(final)
            _sync(self.directory)
            for other in old:
                shutil.rmtree(self.step_directory(other))
        self.processes.barrier()

    def kept(self) -> str:
        """What an error says of the last good checkpoint."""
        steps = self.steps()
        return f"{self.step_directory(steps[-1])} is kept" if steps else "there is no checkpoint yet"

    def _check_space(self, state: Mapping[str, Tensor]) -> None:
        needed = sum(x.numel() * x.element_size() for x in state.values())
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise UserError(
                f"{self.directory}: a checkpoint needs {needed:,} bytes, {free:,} are free; {self.kept()}; "
                "make room, then give the same command again"
            )

    def load(self, step: int, state: dict[str, Tensor]) -> None:
        """Read the state after `step` steps into the tensors of `state`."""
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict_loader import load

        try:
            with _alone_is_meant():
                load(state, checkpoint_id=self.step_directory(step))
        except CheckpointException as error:
            raise UserError(
                f"{self.step_directory(step)}: cannot be read: {_reason(error)}; remove it to begin anew"
            ) from None

    def remove(self) -> None:
        """All of it."""
        if self.processes.rank == 0:
            shutil.rmtree(self.directory)


def _reason(error: Any) -> str:
    """The first rank's failure in one line."""
    cause = next((x for x, _ in error.failures.values()), error)
    text = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    return " ".join(text.split()) or type(cause).__name__


@contextmanager
def _alone_is_meant() -> Iterator[None]:
    """torch warns of a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    with contextlib.suppress(OSError):  # not every file system syncs directories
        os.fsync(handle)
    os.close(handle)
