"""Train a student against its parent: stages of steps, with checkpoints on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from builder.errors import UserError
from builder.training import loss, model
from builder.training.batches import Batch, Batches
from builder.training.buckets import Buckets
from builder.training.log import Entry, Report
from builder.training.mapping import Couple
from builder.training.model import States
from builder.training.processes import Processes
from builder.training.saving import Checkpoints
from builder.training.schedule import learning_rate
from builder.training.stages import Stage, at
from builder.training.stored import StageLogits

BETAS = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`micro_batch` sequences are run at once on a rank, the rest of a step's one after the other.

    `clip` bounds the gradient's norm; `weight_decay` is for matrices alone.
    """

    micro_batch: int = 8
    clip: float = 1.0
    weight_decay: float = 0.0
    bf16: bool = False
    recompute: bool = False
    checkpoint_every: int = 500


def build_parent(couple: Couple, layers: Collection[int], processes: Processes, bf16: bool) -> States:
    """The parent, which tells the states of `layers`; in bfloat16 where that is asked for and its own."""
    half = bf16 and couple.parent.dtype == "bfloat16"
    dtype = torch.bfloat16 if half else torch.float32
    return model.build(couple.parent, layers, processes, dtype=dtype, trained=False)


class Trainer:
    """The student, its optimizer and the parent beside it, on one rank.

    With `stored` logits of each stage that needs them there is no parent.
    """

    def __init__(
        self,
        couple: Couple,
        stages: Sequence[Stage],
        settings: Settings,
        processes: Processes,
        stored: Mapping[int, StageLogits] | None = None,
    ) -> None:
        self.settings, self.processes, self.stages = settings, processes, tuple(stages)
        self.stored = stored
        compared = couple.pairs if any(stage.weights.cosine for stage in stages) else ()
        ours, theirs = zip(*compared, strict=True) if compared else ((), ())
        self.student = model.build(
            couple.student,
            ours,
            processes,
            dtype=torch.float32,
            trained=True,
            recompute=settings.recompute,
        )
        self.parent: States | None = None
        if stored is None and any(stage.weights.parent for stage in stages):
            self.parent = build_parent(couple, theirs, processes, settings.bf16)
        self.weights = model.parameters(self.student)
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.AdamW:
        """With zero moments, so that a checkpoint has a place to be read into."""
        matrices = [x for x in self.weights.values() if x.dim() > 1]
        rest = [x for x in self.weights.values() if x.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.settings.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([x for x in groups if x["params"]], lr=0.0, betas=BETAS)
        for x in self.weights.values():
            zeros = {name: torch.zeros_like(x, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[x] = {"step": torch.tensor(0.0), **zeros}
        return optimizer

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: weights and both moments by name; writing into it changes the trainer."""
        found = {f"weights.{name}": x.detach() for name, x in self.weights.items()}
        for kind in ("exp_avg", "exp_avg_sq"):
            found |= {f"{kind}.{name}": self.optimizer.state[x][kind] for name, x in self.weights.items()}
        return found

    def resume(self, checkpoints: Checkpoints) -> int:
        """Read the newest checkpoint; returns the steps done, 0 without one."""
        steps = checkpoints.steps()
        if not steps:
            return 0
        checkpoints.load(steps[-1], self.state())
        for x in self.weights.values():
            self.optimizer.state[x]["step"].fill_(float(steps[-1]))
        return steps[-1]

    def step(self, stage: Stage, done: int, batches: Batches) -> dict[str, float]:
        """One step of a stage, of which `done` are behind.

        Returns the loss, the mean of each of its terms, the learning rate and the gradient's norm. The
        weights have not moved where the loss is not finite: the caller stops there.
        """
        weights, starts = stage.weights, batches.starts(done)
        counted = batches.counted(starts)
        share = {"cosine": counted.numel(), "kl": counted.numel(), "lm": max(1.0, float(counted.sum()))}
        sums = self._backward(weights, share, batches, done)
        means = self.processes.sum(sums)
        terms = dict(zip(loss.NAMES, means.tolist(), strict=True))
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.settings.clip)
        size = float(_whole(norm))
        rate = learning_rate(
            done, stage.steps, peak=stage.learning_rate, warmup=stage.warmup, final=stage.final
        )
        total = sum(getattr(weights, name) * x for name, x in terms.items())
        if math.isfinite(total) and math.isfinite(size):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": total, **terms, "learning_rate": rate, "grad_norm": size}

    def _backward(
        self, weights: loss.Weights, share: Mapping[str, float], batches: Batches, done: int
    ) -> Tensor:
        """Gradients of this rank's sequences; returns each term over the tokens of all ranks, [3]."""
        sums = torch.zeros(len(loss.NAMES), device=self.processes.device)
        for batch, known in self._micro_batches(batches, done):
            terms = self._terms(weights, batch, known)
            means = {name: x / share[name] for name, x in terms.items()}
            torch.stack([getattr(weights, name) * x for name, x in means.items()]).sum().backward()
            for index, name in enumerate(loss.NAMES):
                if name in means:
                    sums[index] += means[name].detach()
        return sums

    def _micro_batches(self, batches: Batches, done: int) -> Iterator[tuple[Batch, Buckets | None]]:
        """This rank's sequences of a step, with the parent's logits where they are stored."""
        size, device = self.settings.micro_batch, self.processes.device
        starts = batches.starts(done)
        own = range(self.processes.rank, len(starts), self.processes.size)
        stored = None if self.stored is None else self.stored.get(batches.stage)
        for first in range(0, len(own), size):
            places = own[first : first + size]
            known = None if stored is None else stored.read(done, places).to(device)
            yield batches.batch([starts[i] for i in places]).to(device), known

    def _terms(self, weights: loss.Weights, batch: Batch, known: Buckets | None) -> dict[str, Tensor]:
        """The terms that weigh something, summed over a micro-batch."""
        inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.settings.bf16):
            states, logits = self.student(inputs, batch.lengths)
            if weights.parent and self.parent is not None:
                with torch.no_grad():
                    truth, likely = self.parent(inputs, batch.lengths)
        terms = {}
        if weights.cosine:
            terms["cosine"] = loss.cosine_distance(states, truth)
        if weights.kl and known is not None:
            terms["kl"] = loss.bucket_divergence(logits, known, weights.temperature)
        elif weights.kl:
            terms["kl"] = loss.divergence(logits, likely, weights.temperature)
        if weights.lm:
            terms["lm"] = loss.next_token(logits, targets, batch.counted)
        return terms


def _whole(x: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return x.full_tensor() if isinstance(x, DTensor) else x


def train(
    trainer: Trainer,
    batches: Sequence[Batches],
    checkpoints: Checkpoints,
    done: int,
    reports: Sequence[Report],
) -> None:
    """All steps from `done` on, with a checkpoint after each `checkpoint_every` and after the last.

    Raises UserError where the loss is not finite, naming the step and the checkpoint that is kept.
    """
    stages, every = trainer.stages, trainer.settings.checkpoint_every
    total = sum(stage.steps for stage in stages)
    while done < total:
        index, inside = at(stages, done)
        begin = time.monotonic()
        told = trainer.step(stages[index], inside, batches[index])
        done += 1
        if not (math.isfinite(told["loss"]) and math.isfinite(told["grad_norm"])):
            raise UserError(
                f"step {done}: loss {told['loss']}, gradient norm {told['grad_norm']}; {checkpoints.kept()}; "
                "give a smaller --learning-rate and another --checkpoint-dir"
            )
        entry = _entry(stages, index, inside, done, told, time.monotonic() - begin)
        for report in reports:
            report(entry)
        if done % every == 0 or done == total:
            checkpoints.save(done, trainer.state())


def _entry(
    stages: Sequence[Stage], index: int, inside: int, done: int, told: Mapping[str, Any], seconds: float
) -> Entry:
    stage = stages[index]
    past = sum(x.steps * x.sequences * x.context for x in stages[:index])
    used = {name: told[name] if getattr(stage.weights, name) else None for name in loss.NAMES}
    return Entry(
        step=done,
        stage=index + 1,
        tokens=past + (inside + 1) * stage.sequences * stage.context,
        loss=told["loss"],
        learning_rate=told["learning_rate"],
        grad_norm=told["grad_norm"],
        seconds=seconds,
        **used,
    )
