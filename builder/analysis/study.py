"""The whole analysis of a model: two passes over it, dealt over processes, and the record they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from builder.analysis import statistics
from builder.analysis.record import (
    CHANNELS,
    FILE,
    Alternative,
    Analysis,
    Baseline,
    Data,
    Dependency,
    Evaluations,
    Fidelity,
    GroupAnalysis,
    Importance,
    LayerAnalysis,
    Matrix,
    Window,
)
from builder.analysis.scoring import Head, fidelity, kl, perplexity, score_all
from builder.analysis.sums import Key, Sums
from builder.analysis.sweep import Progress, sweep
from builder.analysis.trunk import Trunk
from builder.analysis.variants import (
    Variant,
    dropped_blocks,
    dropped_parts,
    fewer_kv_heads,
    group_variants,
    narrower_widths,
    smaller_parts,
    whole,
)
from builder.analysis.windows import rank_windows
from builder.checkpoint import Checkpoint
from builder.errors import UserError
from builder.plan import Plan
from builder.storage import write_json
from builder.surgery.fusion import Group, fuse
from builder.team import Team
from builder.tensors import Constant
from builder.writer import write

MODEL, DROPPED = "model", "dropped"  # the trunks: as it is, and after the planned drops
Bar = Callable[[int], AbstractContextManager[Progress | None]]  # given the blocks that will be run


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`batch` sequences at a time; `widths` are the shares of an FFN's channels that are tried.

    `stream` reads one layer at a time and keeps the hidden states of all samples; `passes` reads the model
    so many times, each with its share of the variants, whose hidden states are then fewer.
    """

    batch: int = 8
    widths: tuple[float, ...] = (0.5, 0.25)
    window: int = 4
    stream: bool = False
    passes: int = 1


def no_bar(total: int) -> AbstractContextManager[None]:
    """Shows nothing."""
    return nullcontext()


def planned(checkpoint: Checkpoint, plan: Plan) -> tuple[Checkpoint, list[Group]]:
    """The model after the plan's drops, its layers not renumbered, and the groups to fuse in it.

    Raises UserError where the plan does not fit the model or asks for what is not analysed.
    """
    if plan.norm != "fold":
        raise UserError(f"plan: norm {plan.norm!r} is not analysed; set it to fold")
    if plan.parallel:
        raise UserError("plan: parallel windows are not analysed; leave the key out and compare `windows`")
    cut = plan.cut(checkpoint)
    groups = plan.groups(cut.architecture)
    fuse(cut, groups)  # raises where a group is none
    return cut, groups


@torch.no_grad()
def analyze(
    checkpoint: Checkpoint,
    samples: Tensor,
    data: Data,
    plan: Plan,
    settings: Settings,
    *,
    team: Team | None = None,
    bar: Bar = no_bar,
) -> tuple[Analysis, dict[int, np.ndarray]]:
    """The analysis of a model on `samples` [n, T], and its channel statistics by layer.

    The decoder runs in the checkpoint's dtype, statistics are float32 and their sums float64. Batches are
    dealt over the team's processes; all get the result. `bar` shows the blocks that are run.
    Raises UserError where the plan does not fit, and for a model whose numbers are not finite.
    """
    team = team or Team()
    study = team.together(lambda: Study(checkpoint, samples, plan, settings))
    mine = samples.split(settings.batch)[team.rank :: team.size]
    with bar(study.evaluations(len(mine))) as study.progress:
        first = Sums.of(team.collect(team.together(lambda: study.statistics(mine))))
        team.together(lambda: _check_finite(first))
        channels = study.channels(first)
        second = Sums.of(team.collect(team.together(lambda: study.sweeps(mine, channels))))
        team.together(lambda: _check_finite(second))
    return study.record(Sums.of((first, second)), data), channels


def save(analysis: Analysis, channels: dict[int, np.ndarray], directory: Path) -> None:
    """Write analysis.json and channels.safetensors into an existing directory."""
    tensors = {f"layers.{i}.ffn": Constant(x.astype(np.float32), "float32") for i, x in channels.items()}
    write(directory, {CHANNELS: tensors})
    write_json(directory / FILE, analysis.to_dict())


class Study:
    """What is run on the batches of one process, and what the sums of all processes say."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        samples: Tensor,
        plan: Plan,
        settings: Settings,
    ) -> None:
        self.settings, self.plan = settings, plan
        self.progress: Progress | None = None
        self.checkpoint, self.architecture = checkpoint, checkpoint.architecture
        self.tokens, self.targets = samples.numel(), samples.numel() - len(samples)
        cut, self.groups = planned(checkpoint, plan)
        self.model = Trunk(checkpoint, resident=not settings.stream)
        self.dropped: Trunk | None = None
        if cut is not checkpoint:
            self.dropped = Trunk(cut, resident=not settings.stream, over=self.model)
        self.head = Head(checkpoint)

    def statistics(self, batches: Sequence[Tensor]) -> Sums:
        """The first pass."""
        sums = Sums()
        for chunk in self._chunks(batches):
            statistics.gather(self.model, self.model.embed(chunk), sums, self.progress)
        return sums

    def channels(self, sums: Sums) -> dict[int, np.ndarray]:
        """The statistic of every FFN's channels, [width] by layer."""
        layers = [key[1] for key in sums.arrays if key[0] == "channels"]
        return {int(i): statistics.channels(sums, int(i), self.tokens) for i in layers}

    def sweeps(self, batches: Sequence[Tensor], channels: dict[int, np.ndarray]) -> Sums:
        """The second pass, or as many as the settings ask for."""
        sums = Sums()
        variants = self._model_variants(channels)
        for chunk in self._chunks(batches):
            for number in range(self.settings.passes):
                portion = variants[number :: self.settings.passes]
                self._sweep(chunk, portion, sums, with_dropped=number == 0)
        return sums

    def evaluations(self, num_batches: int) -> int:
        """Blocks that all of this will run."""
        layers, passes = len(self.architecture.layers), self.settings.passes
        channels = {i: np.zeros(x.intermediate_size) for i, x in enumerate(self.architecture.layers)}
        count = layers + passes * layers + sum(layers - v.resume for v in self._model_variants(channels))
        if self.dropped:
            count += layers + sum(layers - v.resume for v in self._dropped_variants())
        return count * num_batches

    def record(self, sums: Sums, data: Data) -> Analysis:
        """The sums of all processes as means."""
        dropped = self._matrix(sums, DROPPED) if self.dropped else None
        model = self._matrix(sums, MODEL)
        return Analysis(
            model=self.checkpoint.digest,
            num_layers=len(self.architecture.layers),
            data=data,
            baseline=Baseline(perplexity=perplexity(sums, (), sums.count(("targets",)))),
            layers=tuple(self._layer(sums, i) for i in range(len(self.architecture.layers))),
            alternatives=tuple(self._alternatives(sums)),
            planned_drops=tuple(sorted(self.plan.drop_attention)),
            dependency=Dependency(model=_rows(model), dropped=None if dropped is None else _rows(dropped)),
            windows=self._windows(model, dropped),
            groups=tuple(self._group(sums, group) for group in self.groups),
            evaluations=self._evaluations(sums),
        )

    def _chunks(self, batches: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """What goes through the layers together: one batch, or all where each layer is read once."""
        if not self.settings.stream:
            return [[batch] for batch in batches]
        return [batches] if batches else []

    def _model_variants(self, channels: dict[int, np.ndarray]) -> list[Variant]:
        variants = dropped_blocks(self.architecture) + dropped_parts(self.architecture)
        variants += smaller_parts(self.checkpoint, channels, self.settings.widths)
        if self.dropped is None:
            variants += [v for group in self.groups for v in group_variants(self.model, group)]
        return variants

    def _dropped_variants(self) -> list[Variant]:
        assert self.dropped is not None, "asked where there is a plan"
        groups = [v for group in self.groups for v in group_variants(self.dropped, group)]
        return dropped_blocks(self.dropped.checkpoint.architecture) + groups

    def _sweep(
        self, batches: Sequence[Tensor], variants: list[Variant], sums: Sums, *, with_dropped: bool
    ) -> None:
        hidden = self.model.embed(batches)
        swept = sweep(self.model, hidden, variants, sums, name=MODEL, progress=self.progress)
        children: dict[Key, list[Tensor]] = {v.key: states for v, states in swept.variants.items()}
        if self.dropped is not None and with_dropped:
            after = sweep(
                self.dropped,
                hidden,
                self._dropped_variants(),
                sums,
                name=DROPPED,
                keep=lambda variant: not variant.drops_block,
                progress=self.progress,
            )
            children |= {v.key: states for v, states in after.variants.items()}
            children[("sequential",)] = after.model
        score_all(self.head, batches, swept.model, children, sums)

    def _layer(self, sums: Sums, index: int) -> LayerAnalysis:
        layer = self.architecture.layers[index]
        block = self._importance(sums, "block", index)
        parts = {
            name: self._importance(sums, name if whole(layer) else "block", index)
            for name in ("attention", "ffn")
        }
        heads = statistics.kv_heads(sums, index, self.tokens) if layer.num_key_value_heads else None
        return LayerAnalysis(
            attention=parts["attention"] if layer.attention else None,
            ffn=parts["ffn"] if layer.ffn else None,
            block=block,
            explain=statistics.explain(sums, index, self.tokens),
            kv_heads=heads,
        )

    def _importance(self, sums: Sums, part: str, index: int) -> Importance:
        return Importance(
            cosine=sums.mean(("cosine", MODEL, part, index), self.tokens),
            kl=kl(sums, (part, index), self.tokens),
        )

    def _alternatives(self, sums: Sums) -> list[Alternative]:
        found = []
        for i, layer in enumerate(self.architecture.layers):
            record = self._layer(sums, i)
            if record.attention is not None:
                found.append(Alternative(layer=i, part="attention", size=0, kl=record.attention.kl))
            for heads in fewer_kv_heads(layer):
                score = kl(sums, ("kv_heads", i, heads), self.tokens)
                found.append(Alternative(layer=i, part="attention", size=heads, kl=score))
            if record.ffn is not None:
                found.append(Alternative(layer=i, part="ffn", size=0, kl=record.ffn.kl))
            for width in narrower_widths(layer, self.settings.widths):
                score = kl(sums, ("width", i, width), self.tokens)
                found.append(Alternative(layer=i, part="ffn", size=width, kl=score))
        return found

    def _matrix(self, sums: Sums, name: str) -> np.ndarray:
        size = len(self.architecture.layers)
        matrix = np.zeros((size, size))
        for key, value in sums.arrays.items():
            if key[:2] == ("dependency", name):
                matrix[int(key[2]), int(key[3])] = value / self.tokens
        return matrix

    def _windows(self, model: np.ndarray, dropped: np.ndarray | None) -> tuple[Window, ...]:
        if dropped is None or self.dropped is None:
            return rank_windows(self.architecture, model, self.settings.window)
        return rank_windows(self.dropped.checkpoint.architecture, dropped, self.settings.window)

    def _group(self, sums: Sums, group: Group) -> GroupAnalysis:
        def measured(key: Key) -> Fidelity:
            return fidelity(sums, key, self.tokens, self.targets)

        first, last = group
        unchanged = Fidelity(kl=0.0, perplexity=perplexity(sums, (), sums.count(("targets",))), top1=1.0)
        with_last = ("fused_with_last", first, last)
        return GroupAnalysis(
            first=first,
            last=last,
            sequential=measured(("sequential",)) if self.dropped else unchanged,
            fused=measured(("fused", first, last)),
            reversed=measured(("reversed", first, last)),
            removed=measured(("removed", first, last)),
            fused_with_last=measured(with_last) if ("kl", *with_last) in sums.arrays else None,
        )

    def _evaluations(self, sums: Sums) -> Evaluations:
        def count(*key: str) -> int:
            return sums.count(("evaluations", *key))

        return Evaluations(
            dependency=count(MODEL) + count(MODEL, "dependency"),
            dependency_dropped=count(DROPPED) + count(DROPPED, "dependency"),
            importance=count(MODEL, "importance"),
            alternatives=count(MODEL, "alternatives"),
            groups=count(MODEL, "groups") + count(DROPPED, "groups"),
            statistics=count("statistics"),
        )


def _rows(matrix: np.ndarray) -> Matrix:
    return tuple(tuple(row) for row in matrix.tolist())


def _check_finite(sums: Sums) -> None:
    for key, value in sums.arrays.items():
        if not np.isfinite(value).all():
            layer = next((n for n in key if isinstance(n, int)), len(sums.arrays))
            raise UserError(f"layer {layer}: {key[0]} is not finite on this text; the model is not sound")
