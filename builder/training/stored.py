"""The parent's logits, computed once for what a training reads and kept for others like it.

DIR/stage-1/logits.json           what decides them; a training that needs other logits is refused
DIR/stage-1/step-1.safetensors    of the sequences of a step, in order: see `builder.training.buckets`

Each file is whole or not there, and only those that are missing are computed: after a kill, or where a later
training has more steps.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from builder.checkpoint import Checkpoint
from builder.errors import UserError
from builder.training import buckets, identity, log
from builder.training.batches import Batches
from builder.training.buckets import Buckets, Format
from builder.training.model import States
from builder.training.processes import Processes
from builder.training.stages import Stage

VERSION = 1
NAME, OPTION = "logits.json", "--parent-logits"
DTYPES = ("float16", "float32")


@dataclass(frozen=True, kw_only=True)
class Store:
    """`top_k` tokens are kept of each place, their log-probabilities in `dtype`."""

    directory: Path
    top_k: int = 64
    dtype: str = "float16"

    def check(self, stages: Sequence[Stage], vocab_size: int) -> None:
        """Raise UserError where stored logits are not what the stages need."""
        if self.dtype not in DTYPES:
            raise UserError(f"log_probs: {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if not 0 < self.top_k <= vocab_size:
            raise UserError(f"top_k: {self.top_k} is not between 1 and vocab_size {vocab_size}")
        if not any(stage.weights.parent for stage in stages):
            raise UserError(f"{self.directory}: no stage learns from the parent; leave out {OPTION}")
        for number, stage in enumerate(stages, start=1):
            if stage.weights.cosine:
                raise UserError(
                    f"stage {number}: cosine {stage.weights.cosine} needs the parent's hidden states, which "
                    f"are not stored; give --cosine-weight 0 (in a stage cosine: 0), or leave out {OPTION}"
                )


class StageLogits:
    """Those of one stage, of which `batches` says what each step reads."""

    def __init__(self, store: Store, parent: Checkpoint, stage: Stage, batches: Batches, bf16: bool) -> None:
        self.directory = store.directory.absolute() / f"stage-{batches.stage + 1}"
        self.parent, self.stage, self.batches, self.bf16 = parent, stage, batches, bf16
        vocab_size = parent.architecture.vocab_size
        self.format = Format(vocab_size=vocab_size, top_k=store.top_k, dtype=store.dtype)
        self.step_bytes = stage.sequences * stage.context * self.format.token_bytes

    def file(self, step: int) -> Path:
        """Of a step, counted from 0."""
        return self.directory / f"step-{step + 1}.safetensors"

    def missing(self) -> list[int]:
        """Steps without a file."""
        there = {x.name for x in self.directory.iterdir()}
        return [step for step in range(self.stage.steps) if self.file(step).name not in there]

    def identity(self) -> dict[str, Any]:
        """All that decides the content of each step's file; not how many steps there are."""
        return {
            "version": VERSION,
            "parent": self.parent.digest,
            "parent_weights": _first_rows(self.parent),
            "data": self.batches.stream.digest(),
            "seed": self.batches.seed,
            "context": self.stage.context,
            "sequences": self.stage.sequences,
            "separate_documents": self.stage.separate_documents,
            "temperature": self.stage.temperature,
            "bf16": self.bf16,
            "top_k": self.format.top_k,
            "log_probs": self.format.dtype,
        }

    def compute(self, step: int, parent: States, micro_batch: int, device: torch.device) -> dict[str, Any]:
        """The tensors of a step's file."""
        starts, parts = self.batches.starts(step), []
        for first in range(0, len(starts), micro_batch):
            batch = self.batches.batch(starts[first : first + micro_batch])
            inputs = batch.tokens[:, :-1].to(device)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                _, logits = parent(inputs, batch.lengths)
                found = buckets.likeliest(logits, self.format.top_k, self.stage.temperature)
            parts.append(self.format.encode(found))
        return {name: np.concatenate([x[name] for x in parts]) for name in parts[0]}

    def write(self, step: int, tensors: dict[str, Any]) -> None:
        """The file of a step. Raises UserError where the disk is full."""
        try:
            buckets.save(tensors, self.file(step))
        except OSError as error:
            raise UserError(
                f"{self.file(step)}: {error.strerror}; make room, then give the same command again"
            ) from None

    def read(self, step: int, places: Sequence[int]) -> Buckets:
        """Of some of a step's sequences, [len(places), context]. Raises UserError on a broken file."""
        from safetensors import SafetensorError

        file, wanted = self.file(step), (len(places), self.stage.context, self.format.top_k)
        try:
            tensors = buckets.load(file, list(places))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{file}: cannot be read: {error}; remove it, then give the same command again"
            ) from None
        if tensors["ids"].shape != wanted:
            raise UserError(f"{file}: {list(tensors['ids'].shape)} tokens, {list(wanted)} were expected")
        return self.format.decode(tensors)


def _first_rows(parent: Checkpoint) -> str:
    """SHA-256 over the first row of each weight: other weights of the same shapes are seen, in seconds."""
    total = hashlib.sha256()
    for name, x in sorted(parent.tensors.items()):
        total.update(name.encode() + x.read(0, 1).tobytes())
    return total.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Filled:
    """Steps of which there are logits, how many were computed just now, and what all of them take."""

    steps: int
    computed: int
    bytes: int
    bytes_per_token: int


def fill(
    stages: Sequence[StageLogits],
    build: Callable[[], States],
    processes: Processes,
    micro_batch: int,
) -> Filled:
    """Compute what is missing; each rank a step at a time. `build` gives the parent where it is needed.

    Raises UserError where the directory holds other logits or is in use, and where the disk is too small.
    """
    steps = sum(x.stage.steps for x in stages)
    size = sum(x.stage.steps * x.step_bytes for x in stages)
    with _held(stages, processes) as missing:
        computed = sum(map(len, missing))
        if computed:
            parent = build()
            with log.counter("parent's logits", computed, shown=processes.rank == 0) as count:
                for stage, todo in zip(stages, missing, strict=True):
                    _fill_stage(stage, todo, parent, processes, micro_batch, count)
    return Filled(steps=steps, computed=computed, bytes=size, bytes_per_token=stages[0].format.token_bytes)


@contextmanager
def _held(stages: Sequence[StageLogits], processes: Processes) -> Iterator[list[list[int]]]:
    """The missing steps of each stage, on all ranks; the directories are this training's meanwhile."""
    missing: list[list[int]] = []
    with ExitStack() as stack:
        if processes.rank == 0:
            identity.make(stages[0].directory.parent, OPTION)
            for stage in stages:
                identity.make(stage.directory, OPTION)
                identity.check(stage.directory, NAME, stage.identity(), "its logits were computed", OPTION)
            missing = [stage.missing() for stage in stages]
            if any(missing):
                directory = stages[0].directory.parent
                stack.enter_context(identity.locked(directory, "computes logits"))
                for partial in directory.glob("stage-*/.step-*"):  # of a killed process
                    partial.unlink()
                _check_space(stages, missing)
        yield processes.first(missing)


def _check_space(stages: Sequence[StageLogits], missing: Sequence[Sequence[int]]) -> None:
    """Say what is needed; raise UserError where it is not free."""
    directory, token_bytes = stages[0].directory.parent, stages[0].format.token_bytes
    needed = sum(len(todo) * stage.step_bytes for stage, todo in zip(stages, missing, strict=True))
    free = shutil.disk_usage(directory).free
    text = f"{directory}: the parent's logits need {needed:,} bytes, {token_bytes} a token"
    if needed > free:
        raise UserError(f"{text}, {free:,} are free; give a smaller --top-k, or another {OPTION}")
    log.notice(text)


def _fill_stage(
    stage: StageLogits,
    todo: Sequence[int],
    parent: States,
    processes: Processes,
    micro_batch: int,
    count: Callable[[], None],
) -> None:
    """Ranks run the parent together, each on a step of its own; without one left they repeat the last."""
    for first in range(0, len(todo), processes.size):
        place = first + processes.rank
        step = todo[min(place, len(todo) - 1)]
        tensors = stage.compute(step, parent, micro_batch, processes.device)
        error = None
        if place < len(todo):
            try:
                stage.write(step, tensors)
            except UserError as found:
                error = found
        processes.agree(error)
        for _ in todo[first : first + processes.size]:
            count()
