"""The whole of a training, from two directories and text to a directory of the trained student."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from builder import export
from builder.errors import UserError
from builder.training import data, log, mapping, model, stages
from builder.training.batches import Batches
from builder.training.data import Stream
from builder.training.mapping import Couple
from builder.training.processes import Processes, joined, size
from builder.training.saving import Checkpoints
from builder.training.stages import Stage
from builder.training.stored import StageLogits, Store, fill
from builder.training.trainer import Settings, Trainer, build_parent, train

UNIMPORTANT = ("micro_batch", "recompute", "checkpoint_every")  # may change when a training goes on


@dataclass(frozen=True, kw_only=True)
class Job:
    """`log` and `plot` are files that are written when all is done; `plot` may be None.

    With a `store` the parent's logits are read from there, once they are computed.
    """

    parent: Path
    student: Path
    output: Path
    stages: tuple[Stage, ...]
    settings: Settings
    checkpoint_dir: Path
    log: Path
    plot: Path | None = None
    seed: int = 0
    keep_checkpoints: bool = False
    store: Store | None = None


def distill(job: Job) -> dict[str, Any]:
    """Train, and write the student to `job.output`; on every rank of a torchrun alike.

    A training that was cut short goes on from its newest checkpoint. Returns what the command shows. Raises
    UserError for models, data or stages that do not fit, a full disk and a loss that is not finite.
    """
    couple = _check(job)
    streams = list(_streams(job, couple))
    batches = list(_batches(job, streams))
    with joined() as processes, ExitStack() as stack:
        checkpoints = Checkpoints(job.checkpoint_dir, processes)
        stack.enter_context(checkpoints.held(_identity(job, couple, streams)))
        stored, told = _stored(job, couple, batches, processes)
        trainer = Trainer(couple, job.stages, job.settings, processes, stored)
        done = trainer.resume(checkpoints)
        _train(trainer, batches, checkpoints, done)
        _write(job, couple, trainer, checkpoints)
        entries = log.read(checkpoints.log)
        processes.barrier()
        if processes.rank == 0:
            _publish(job, checkpoints, entries)
        return {**_result(job, couple, entries, done, processes), "parent_logits": told}


def _check(job: Job) -> Couple:
    """Both models, where the job can be done at all."""
    for path in (job.output, job.log, *([job.plot] if job.plot else [])):
        if os.path.lexists(path):
            raise UserError(f"{path}: exists; remove it or choose another name")
        if not path.absolute().parent.is_dir():
            raise UserError(f"{path.absolute().parent}: no such directory; create it first")
    if job.plot:
        log.check_plot()
    couple = mapping.read(job.parent, job.student)
    positions = min(x.architecture.max_position_embeddings for x in (couple.parent, couple.student))
    stages.check(job.stages, positions, size())
    if job.store:
        job.store.check(job.stages, couple.parent.architecture.vocab_size)
    return couple


def _streams(job: Job, couple: Couple) -> Iterator[Stream]:
    """The text of each stage; files that several stages read are read once."""
    known: dict[tuple[tuple[str, ...], bool], Stream] = {}
    for stage in job.stages:
        key = stage.data, stage.loss == "supervised"
        if key not in known:
            files = [Path(x) for x in stage.data]
            vocab_size = couple.student.architecture.vocab_size
            known[key] = data.read(job.student, files, vocab_size=vocab_size, supervised=key[1])
        yield known[key]


def _batches(job: Job, streams: list[Stream]) -> Iterator[Batches]:
    for index, (stream, stage) in enumerate(zip(streams, job.stages, strict=True)):
        yield Batches(
            stream,
            context=stage.context,
            sequences=stage.sequences,
            seed=job.seed,
            stage=index,
            separate=stage.separate_documents,
        )


def _stored(
    job: Job, couple: Couple, batches: list[Batches], processes: Processes
) -> tuple[dict[int, StageLogits] | None, dict[str, Any] | None]:
    """The parent's logits by the index of the stages that learn from them, computed where they are missing.

    And what the command shows of them. None and None where the parent runs beside the student.
    """
    store, settings = job.store, job.settings
    if store is None:
        return None, None
    logits = {
        x.stage: StageLogits(store, couple.parent, stage, x, settings.bf16)
        for x, stage in zip(batches, job.stages, strict=True)
        if stage.weights.parent
    }

    def build() -> model.States:
        return build_parent(couple, (), processes, settings.bf16)

    filled = fill(list(logits.values()), build, processes, settings.micro_batch)
    return logits, {"directory": str(store.directory), "top_k": store.top_k, **asdict(filled)}


def _identity(job: Job, couple: Couple, streams: list[Stream]) -> dict[str, Any]:
    """All that decides the curve."""
    settings = {k: x for k, x in asdict(job.settings).items() if k not in UNIMPORTANT}
    return {
        "parent": couple.parent.digest,
        "student": couple.student.digest,
        "data": [x.digest() for x in streams],
        "stages": [{k: x for k, x in stage.to_dict().items() if k != "data"} for stage in job.stages],
        "seed": job.seed,
        "parent_logits": _kept(job),
        **settings,
    }


def _kept(job: Job) -> dict[str, Any] | None:
    """What is stored of the parent's logits."""
    return {"top_k": job.store.top_k, "log_probs": job.store.dtype} if job.store else None


def _train(trainer: Trainer, batches: list[Batches], checkpoints: Checkpoints, done: int) -> None:
    total = sum(stage.steps for stage in trainer.stages)
    with ExitStack() as stack:
        reports: list[log.Report] = []
        if trainer.processes.rank == 0:
            reports.append(stack.enter_context(log.writer(checkpoints.log, done)))
            shown = stack.enter_context(log.bar(total, done))
            reports += [shown] if shown else []
        train(trainer, batches, checkpoints, done, reports)


def _write(job: Job, couple: Couple, trainer: Trainer, checkpoints: Checkpoints) -> None:
    """The student's directory, from the shards that the ranks leave beside the checkpoints."""
    processes, student = trainer.processes, couple.student
    files = [checkpoints.directory / f"rank{rank}.safetensors" for rank in range(processes.size)]
    model.write_shard(trainer.student, files[processes.rank], student.dtype)
    processes.barrier()
    if processes.rank:
        return
    record = couple.record
    kept: dict[str, Any] = {
        key: record[key] for key in ("source", "plan", "layers", "random_weights") if key in record
    }
    facts = {**kept, "distilled": {"from": student.digest, **_summary(job)}}
    export.write(model.from_shards(student, files), job.student, job.output, facts=facts)


def _publish(job: Job, checkpoints: Checkpoints, entries: list[log.Entry]) -> None:
    shutil.copyfile(checkpoints.log, job.log)
    if job.plot:
        log.plot(entries, job.plot)
    if not job.keep_checkpoints:
        checkpoints.remove()


def _summary(job: Job) -> dict[str, Any]:
    settings = asdict(job.settings)
    decided = {"stages": [x.to_dict() for x in job.stages], "seed": job.seed, **settings}
    return {**decided, "parent_logits": _kept(job)} if job.store else decided


def _result(
    job: Job, couple: Couple, entries: list[log.Entry], done: int, processes: Processes
) -> dict[str, Any]:
    tokens, seconds = entries[-1].tokens, sum(x.seconds for x in entries)
    return {
        "output": str(job.output),
        "steps": entries[-1].step,
        "resumed_at": done or None,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "ranks": processes.size,
        "layer_pairs": [list(x) for x in couple.pairs],
        "first": asdict(entries[0]),
        "last": asdict(entries[-1]),
        "log": str(job.log),
        "plot": str(job.plot) if job.plot else None,
        "checkpoints": str(job.checkpoint_dir) if job.keep_checkpoints else None,
    }
