"""Plans that meet a target at the least cost in quality, with what they are expected to bring."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from builder.architecture import Architecture, Attention
from builder.checkpoint import Checkpoint
from builder.errors import UserError
from builder.model_class import model_class
from builder.plan import Plan
from builder.search.alternatives import Option, Pins, Scores, part_size, space
from builder.search.latency import Costs, step_seconds
from builder.search.program import Program, Quantity, Solution
from builder.trtllm.conversion import MAX_ELEMENTS

TOLERANCE = 1e-6  # of a target, relative
ATTEMPTS = 20


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Where the model will run: what its parts cost there, and the bytes a GPU needs for it."""

    costs: Costs
    memory: Callable[[Architecture], float]  # bytes of one GPU
    tp_size: int
    kv_element_bytes: int
    capacity: float | None = None  # bytes that a GPU has
    widest: int | None = None  # the widest FFN that `costs` knows


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Upper bounds but for `speedup` and `min_quality`; None asks for nothing."""

    speedup: float | None = None
    max_seconds: float | None = None  # per token of a sequence
    max_bytes: float | None = None  # of one GPU
    min_quality: float | None = None  # exp(-KL(parent || child))

    def limits(self, now: Figures) -> dict[Quantity, float]:
        """The bounds of a program for a model whose figures are `now`."""
        seconds = [
            now.seconds / self.speedup if self.speedup else math.inf,
            math.inf if self.max_seconds is None else self.max_seconds,
        ]
        bounds: dict[Quantity, float] = {
            "seconds": min(seconds),
            "bytes": math.inf if self.max_bytes is None else self.max_bytes,
            "kl": math.inf if self.min_quality is None else -math.log(self.min_quality),
        }
        return {name: bound for name, bound in bounds.items() if bound < math.inf}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What an architecture costs under some conditions."""

    seconds: float  # of one decode step
    bytes: float  # of one GPU
    kv_bytes_per_token: int  # over all ranks
    all_reduces_per_token: int
    parameters: int
    layers: int

    @classmethod
    def of(cls, architecture: Architecture, conditions: Conditions) -> Figures:
        """Counted on the architecture, but for its seconds."""
        return cls(
            seconds=step_seconds(architecture, conditions.costs),
            bytes=conditions.memory(architecture),
            kv_bytes_per_token=architecture.kv_cache_bytes_per_token(conditions.kv_element_bytes),
            all_reduces_per_token=architecture.all_reduces_per_token(conditions.tp_size),
            parameters=architecture.num_parameters,
            layers=len(architecture.layers),
        )


@dataclass(frozen=True, kw_only=True)
class FusedGroup:
    """A run to fuse. `dependency` is the largest M[i][j] inside it, `typical` the median of the model's."""

    first: int
    last: int
    members: int
    width: int
    elements: int  # of its largest TensorRT weight on a rank
    dependency: float | None
    typical: float | None

    @property
    def confirmed(self) -> bool | None:
        """Whether its members depend on one another less than blocks usually do; None is not known."""
        if self.dependency is None or self.typical is None:
            return None
        return self.dependency <= self.typical


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A plan and what is expected of it. KL in nats per token, None where some change was never scored."""

    plan: Plan
    architecture: Architecture
    figures: Figures
    now: Figures
    groups: tuple[FusedGroup, ...]
    changes_kl: float | None
    fusing_kl: float | None
    gap: float

    @property
    def kl(self) -> float | None:
        """The sum of all scores."""
        if self.changes_kl is None or self.fusing_kl is None:
            return None
        return self.changes_kl + self.fusing_kl

    @property
    def speedup(self) -> float:
        """Of a decode step."""
        return self.now.seconds / self.figures.seconds


def max_fused_width(architecture: Architecture, conditions: Conditions) -> int:
    """The widest FFN that TensorRT takes with gate and up joined, and that the costs know, over all ranks."""
    fits = MAX_ELEMENTS // (2 * architecture.hidden_size) * conditions.tp_size
    return fits if conditions.widest is None else min(fits, conditions.widest)


class Search:
    """The search for plans of one model under fixed conditions and pins."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        conditions: Conditions,
        scores: Scores | None = None,
        pins: Pins | None = None,
        time_limit: float = 60.0,
    ) -> None:
        """Without `scores` nothing is dropped but by hand. Raises UserError for a pin that does not fit."""
        self.checkpoint, self.conditions, self.scores = checkpoint, conditions, scores
        self.pins, self.time_limit = pins or Pins(), time_limit
        self._check_plan()
        architecture = checkpoint.architecture
        self.space = space(
            architecture,
            self.scores,
            self.pins,
            max_fused_width(architecture, conditions),
            conditions.tp_size,
        )
        self.program = Program(self.space, conditions.costs, conditions.memory)
        self.now = Figures.of(architecture, conditions)

    def _check_plan(self) -> None:
        if self.pins.plan.parallel:
            raise UserError(
                "--plan: parallel is not searched with; leave it out, and add it to the plan written"
            )
        model = self.pins.plan.model
        if model is not None and model != self.checkpoint.digest:
            this = self.checkpoint.digest[:12] or "a config without weights"
            raise UserError(f"--plan: made for model {model[:12]}, this one is {this}")

    def propose(self, targets: Targets, solutions: int = 1, difference: int = 1) -> list[Proposal]:
        """Up to `solutions` plans, the best first, each `difference` choices apart from the others.

        With a bound on time or memory a plan has the least sum of scores; without one, or without
        an analysis, the least time. Raises UserError where the targets cannot be met, with what can.
        """
        limits = targets.limits(self.now)
        bounded = self.scores is not None and bool(limits.keys() - {"kl"})
        if self.scores is not None and self.conditions.capacity is not None:
            limits["bytes"] = min(limits.get("bytes", math.inf), self.conditions.capacity)
        minimise, then = ("kl", "seconds") if bounded else ("seconds", "kl")
        found: list[Solution] = []
        proposals: list[Proposal] = []
        while len(found) < solutions:
            best = self._best(minimise, then, limits, found, difference)  # type: ignore[arg-type]
            if best is None:
                break
            found.append(best[0])
            proposals.append(best[1])
            if targets.min_quality is not None and best[1].kl is None:
                raise UserError(
                    "--min-quality: a change made by hand has no score; leave it out, or `analyze` it as well"
                )
        if not proposals:
            raise UserError(self._out_of_reach(targets, limits))
        return proposals

    def _best(
        self,
        minimise: Quantity,
        then: Quantity | None,
        limits: Mapping[Quantity, float],
        other_than: Sequence[Solution] = (),
        difference: int = 1,
    ) -> tuple[Solution, Proposal] | None:
        """The best solution whose true figures keep the limits; the program's are tightened until then."""
        asked = dict(limits)
        for _ in range(ATTEMPTS):
            solution = self._solve(minimise, asked, then, other_than, difference)
            if solution is None:
                return None
            proposal = self.proposal(solution)
            over = {
                name: true - limit
                for name, limit in limits.items()
                if (true := self._true(name, solution, proposal)) > limit * (1 + TOLERANCE)
            }
            if not over:
                return solution, proposal
            asked = {name: bound - over.get(name, 0.0) for name, bound in asked.items()}
        return None

    def _solve(
        self,
        minimise: Quantity,
        limits: Mapping[Quantity, float],
        then: Quantity | None,
        other_than: Sequence[Solution],
        difference: int,
    ) -> Solution | None:
        try:
            return self.program.solve(
                minimise,
                limits,
                then=then,
                other_than=other_than,
                difference=difference,
                seconds=self.time_limit,
            )
        except TimeoutError:
            raise UserError(
                f"--time-limit: {self.time_limit:g} s were too few to find any plan; give more"
            ) from None

    def _true(self, name: Quantity, solution: Solution, proposal: Proposal) -> float:
        return solution.kl if name == "kl" else getattr(proposal.figures, name)

    def proposal(self, solution: Solution) -> Proposal:
        """What a solution of the program, or another choice of the space, comes to."""
        plan = self._plan(solution)
        child = plan.apply(self.checkpoint).architecture
        if child != self.checkpoint.architecture:
            model_class(child)  # refuses what no format can say
        if not child.num_attention_layers and self.checkpoint.architecture.num_attention_layers:
            raise UserError("plan: no attention would be left, which no runtime takes; keep one")
        chosen: list[Option[Any]] = [
            *(x.attention[i] for x, i in zip(self.space.layers, solution.attention, strict=True)),
            *(x.ffn[i] for x, i in zip(self.space.layers, solution.ffn, strict=True)),
        ]
        return Proposal(
            plan=plan,
            architecture=child,
            figures=Figures.of(child, self.conditions),
            now=self.now,
            groups=tuple(self._group(first, last, solution) for first, last in plan.fuse or ()),
            changes_kl=_sum([x.kl for x in chosen]),
            fusing_kl=solution.fusing_kl(self.space),
            gap=solution.gap,
        )

    def _plan(self, solution: Solution) -> Plan:
        pinned = self.pins.plan
        attention = self._changed(solution.attention, "attention")
        ffn = self._changed(solution.ffn, "ffn")
        given = dict(pinned.ffn_channels)
        return Plan(
            drop_attention=tuple(i for i, x in attention.items() if x.part is None),
            drop_ffn=tuple(i for i, x in ffn.items() if x.part is None),
            kv_heads=tuple(
                (i, part_size(x.part)) for i, x in attention.items() if isinstance(x.part, Attention)
            ),
            ffn_channels=tuple(
                (i, given[i] if i in given else self._kept(i, x))
                for i, x in ffn.items()
                if x.part is not None
            ),
            fuse=solution.groups(self.space),
            norm=pinned.norm,
            model=self.checkpoint.digest or None,
        )

    def _changed(self, chosen: tuple[int, ...], part: str) -> dict[int, Option[Any]]:
        options = [getattr(x, part)[i] for x, i in zip(self.space.layers, chosen, strict=True)]
        return {index: option for index, option in enumerate(options) if option.changed}

    def _kept(self, layer: int, option: Option[Any]) -> tuple[int, ...]:
        assert self.scores is not None, "without scores nothing is narrowed"
        return self.scores.kept_channels(layer, part_size(option.part))

    def _group(self, first: int, last: int, solution: Solution) -> FusedGroup:
        parts = [
            (i, part_size(x.ffn[f].part))
            for i, (x, f) in enumerate(zip(self.space.layers, solution.ffn, strict=True))
        ]
        members = [(i, width) for i, width in parts if first <= i <= last and width]
        width = sum(width for _, width in members)
        inside, typical = _dependency(self.scores, [i for i, _ in members])
        tp_size = self.conditions.tp_size
        return FusedGroup(
            first=first,
            last=last,
            members=len(members),
            width=width,
            elements=2 * -(-width // tp_size) * self.checkpoint.architecture.hidden_size,
            dependency=inside,
            typical=typical,
        )

    def _out_of_reach(self, targets: Targets, limits: Mapping[Quantity, float]) -> str:
        """What the targets miss, and the closest that can be had, in one line."""
        for alone in (False, True):
            for name in limits:
                others = {} if alone else {n: x for n, x in limits.items() if n != name}
                best = self._best(name, None, others)
                if best is None:
                    continue
                value = self._true(name, *best)
                if value > limits[name] * (1 + TOLERANCE):
                    kept = others.keys() & targets.limits(self.now).keys()
                    beside = " with the other targets kept" if kept else ""
                    return self._closest(name, value, targets) + beside + self._remedy()
        return "targets: not met together within what the latency model can tell; ask for a little less"

    def _closest(self, name: Quantity, value: float, targets: Targets) -> str:
        basis = "measured" if self.conditions.costs.measured else "estimated"
        if name == "bytes":
            capacity = self.conditions.capacity or math.inf
            asked = "--max-memory" if (targets.max_bytes or math.inf) < capacity else "the GPU's memory"
            limit = min(targets.max_bytes or math.inf, capacity)
            return (
                f"{asked}: {limit / 1e9:.4g} GB cannot be met; the closest is "
                f"{value / 1e9:.4g} GB per GPU (estimated)"
            )
        if name == "kl":
            return (
                f"--min-quality: {targets.min_quality:g} cannot be met; the closest is "
                f"{math.exp(-value):.4g} (KL {value:.4g}, estimated)"
            )
        times = self.now.seconds / value
        closest = f"the closest is {times:.4g} times as fast, {value * 1e3:.4g} ms per token ({basis})"
        if targets.speedup is not None and value > self.now.seconds / targets.speedup:
            return f"--target-speedup: {targets.speedup:g} cannot be met; {closest}"
        assert targets.max_seconds is not None
        return f"--max-latency: {targets.max_seconds * 1e3:.4g} ms cannot be met; {closest}"

    def _remedy(self) -> str:
        if self.scores is None:
            return "; with --analysis it may drop and narrow as well"
        return "; ask for less, keep fewer layers by hand, or analyse more alternatives"


def read_scores(checkpoint: Checkpoint, directory: Path) -> Scores:
    """The scores in the directory of an analysis. Raises UserError where it was made for another model."""
    from builder.analysis import record

    analysis = record.read(directory)
    if analysis.model != checkpoint.digest:
        raise UserError(
            f"{directory}: made for model {analysis.model[:12]}, this one is {checkpoint.digest[:12]}; run "
            "`ffn-fusion analyze` on this model"
        )
    for index, (seen, layer) in enumerate(zip(analysis.layers, checkpoint.architecture.layers, strict=False)):
        if (seen.attention is None, seen.ffn is None) != (layer.attention is None, layer.ffn is None):
            raise UserError(f"{directory}: layer {index} is another one than the model's; analyze it again")
    if analysis.num_layers != len(checkpoint.architecture.layers):
        raise UserError(
            f"{directory}: {analysis.num_layers} layers, the model has "
            f"{len(checkpoint.architecture.layers)}; analyze it again"
        )
    return Scores.of(analysis, record.read_channels(directory))


def _sum(values: Sequence[float | None]) -> float | None:
    known = [x for x in values if x is not None]
    return sum(known) if len(known) == len(values) else None


def _dependency(scores: Scores | None, members: Sequence[int]) -> tuple[float | None, float | None]:
    """The largest entry of M among `members`, and the median of all of M above its diagonal."""
    matrix = scores.dependency if scores else None
    if matrix is None:
        return None, None
    size = len(matrix)
    entries = sorted(matrix[i][j] for i in range(size) for j in range(i + 1, size))
    inside = [matrix[i][j] for i in members for j in members if i < j]
    return max(inside, default=0.0), entries[len(entries) // 2] if entries else 0.0


def with_drops(plan: Plan, layers: Sequence[int]) -> Plan:
    """The plan with these layers' attention dropped as well."""
    return replace(plan, drop_attention=tuple(sorted({*plan.drop_attention, *layers})))


def summary(proposal: Proposal, conditions: Conditions) -> dict[str, Any]:
    """A proposal for JSON: every figure beside what it rests on."""
    basis = "measured" if conditions.costs.measured else "estimated"
    now, then = proposal.now, proposal.figures
    pairs: dict[str, tuple[float, float, str]] = {
        "ms_per_token": (now.seconds * 1e3, then.seconds * 1e3, basis),
        "tokens_per_s": (1 / now.seconds, 1 / then.seconds, basis),
        "gpu_bytes": (now.bytes, then.bytes, "estimated"),
        "kv_bytes_per_token": (now.kv_bytes_per_token, then.kv_bytes_per_token, "counted"),
        "all_reduces_per_token": (now.all_reduces_per_token, then.all_reduces_per_token, "counted"),
        "parameters": (now.parameters, then.parameters, "counted"),
        "layers": (now.layers, then.layers, "counted"),
    }
    return {
        "plan": proposal.plan.to_dict(),
        "groups": [_group_dict(x) for x in proposal.groups],
        "speedup": {"value": proposal.speedup, "basis": basis},
        "expected": {n: {"now": a, "planned": b, "basis": kind} for n, (a, b, kind) in pairs.items()},
        "quality": {
            "kl": proposal.kl,
            "of_changes": proposal.changes_kl,
            "of_fusing": proposal.fusing_kl,
            "min_quality": None if proposal.kl is None else math.exp(-proposal.kl),
            "basis": "estimated",
        },
        "gap": proposal.gap,
    }


def _group_dict(group: FusedGroup) -> dict[str, Any]:
    return {
        "first": group.first,
        "last": group.last,
        "members": group.members,
        "width": group.width,
        "elements": group.elements,
        "dependency": group.dependency,
        "typical_dependency": group.typical,
        "confirmed": group.confirmed,
    }
