"""Baseline against candidate: the same prompts, in interleaved rounds, as distributions and ratios.

Rounds alternate ABBA, so a drift of the machine meets both alike. Within a round `concurrency` clients
work through the prompts, each sending its next request when the last has ended (closed loop), or requests
come at random times of a rate (open loop, `triton_repo.load`). A round is timed by this package's client
through Triton, by aiperf through Triton, or by trtllm-bench without it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from builder.errors import UserError
from triton_repo.client import Endpoint, measure, takes
from triton_repo.history import Against
from triton_repo.load import Load
from triton_repo.measuring import MOST_WARM_UPS, STEADY, Measured, Sides
from triton_repo.rounds import METRICS, SIDES, AnyRound, RecordedRound, Row, Targets, row
from triton_repo.shapes import Shape, ShapeRows, shape_rows
from triton_repo.work import unequal

VERSION = 2
PACKAGES = ("tensorrt_llm", "torch", "tritonclient")
DEFAULT_PROMPTS = (
    "def main(argv=None):\n",
    "import os\nimport sys\n\n",
    "class Node:\n    def __init__(self",
    "The function returns the number of",
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything the report shows."""

    method: str  # "through Triton", ...
    how: str  # the rounds, in a sentence
    rows: tuple[Row, ...]
    token_gap_ms: dict[str, list[float]]  # all values of each side at the first concurrency, or none
    notes: tuple[str, ...]
    settings: dict[str, Any]
    baseline_facts: dict[str, Any] | None
    candidate_facts: dict[str, Any] | None
    quality: dict[str, Any] | None
    hardware: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)  # of this machine's packages
    server_times: dict[str, Any] = field(default_factory=dict)  # by side and model, as Triton counts
    by_shape: tuple[ShapeRows, ...] = ()  # at the first level, for prompts and answers of other lengths
    against: Against | None = None  # a kept run of the same hardware

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that were measured, in their order."""
        return tuple(m for m in METRICS if any(row.metric == m for row in self.rows))

    def row(self, metric: str, concurrency: float) -> Row:
        return next(r for r in self.rows if (r.metric, r.concurrency) == (metric, concurrency))

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json; what is no number, a ratio to nothing, is null."""
        return {"version": VERSION, **_finite(asdict(self))}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compare(
    baseline: Endpoint,
    candidate: Endpoint,
    *,
    prompts: Sequence[str],
    max_tokens: int,
    concurrency: Sequence[float] = (1, 2, 4),
    rounds: int = 8,
    seed: int = 0,
    num_requests: int | None = None,
    open_loop: bool = False,
    equal_lengths: bool = True,
    targets: Targets | None = None,
    shapes: Sequence[Shape] = (),
    baseline_facts: dict[str, Any] | None = None,
    candidate_facts: dict[str, Any] | None = None,
    quality: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Measure both endpoints, greedily, `rounds` rounds a side at each level after a warm-up.

    A level of `concurrency` is clients at once; with `open_loop` requests/s. `equal_lengths` asks for all of
    `max_tokens` if both models can be asked for it. `shapes` are measured at the first level. Raises
    UserError where a server fails.
    """
    ends = dict(zip(SIDES, (baseline, candidate), strict=True))
    equal = equal_lengths and all(takes(end, "min_tokens") for end in ends.values())
    how: dict[str, Any] = {
        "open_loop": open_loop,
        "equal_lengths": equal,
        "num_requests": num_requests,
        "seed": seed,
    }
    load, *others = (
        Load(prompts=texts, max_tokens=tokens, **how)
        for texts, tokens in [(prompts, max_tokens), *((x.prompts, x.output_tokens) for x in shapes)]
    )
    requests = [len(load.asked(level)) for level in concurrency]
    for end, other in itertools.product(ends.values(), others):  # one too long fails now, not in the end
        measure(end, other.prompts[0], max_tokens=other.max_tokens)
    sides = Sides(ends=ends, rounds=rounds, targets=targets, progress=progress)
    measured = sides.measure(load, concurrency)
    _check_gaps(measured.rounds)
    by_shape = []
    for shape, other in zip(shapes, others, strict=True):
        progress(f"{shape.input_tokens} tokens in, {shape.output_tokens} out")
        by_shape.append(shape_rows(shape, sides.measure(other, concurrency[:1]).rounds))
    lengths = "all of them" if equal else "or fewer"
    loop = "open loop (Poisson)" if open_loop else "closed loop"
    return assemble(
        measured.rounds,
        method="through Triton",
        how=f"{rounds} interleaved rounds a side and level (ABBA) of {', '.join(map(str, requests))} "
        f"requests with {len(prompts)} prompts, {max_tokens} tokens each, {lengths}, greedy, {loop}, after "
        f"{', '.join(map(str, measured.warm_ups))} warm-up rounds.",
        settings={
            **settings(prompts, requests, max_tokens, concurrency, rounds, seed),
            "load": "open" if open_loop else "closed",
            "equal_lengths": equal,
            "warm_up_rounds": measured.warm_ups,
            "targets": None if targets is None else asdict(targets),
        },
        notes=(*notes, *_reservations(measured, equal_lengths and not equal)),
        baseline_facts=baseline_facts,
        candidate_facts=candidate_facts,
        quality=quality,
        server_times=measured.server_times,
        by_shape=by_shape,
    )


def _reservations(measured: Measured, lengths_refused: bool) -> Iterator[str]:
    """What was not as it was to be."""
    if lengths_refused:
        yield "Answers end by themselves: a server takes no min_tokens."
    if not all(measured.settled):
        yield (
            f"Latency had not settled to within {STEADY:.0%} after {MOST_WARM_UPS} warm-up rounds: the "
            "machine is noisy, or a server still warms up."
        )


def _check_gaps(rounds: Sequence[AnyRound]) -> None:
    """Inter-token latency decides; without two tokens an answer there is none."""
    for side in SIDES:
        if not all(r.samples("inter_token_ms") for r in rounds if r.side == side):
            raise UserError(f"prompts: the {side} answers them with one token each; give other prompts")


def assemble(
    rounds: Sequence[AnyRound],
    *,
    method: str,
    how: str,
    settings: dict[str, Any],
    notes: Sequence[str] = (),
    baseline_facts: dict[str, Any] | None = None,
    candidate_facts: dict[str, Any] | None = None,
    quality: dict[str, Any] | None = None,
    server_times: dict[str, Any] | None = None,
    by_shape: Sequence[ShapeRows] = (),
) -> Comparison:
    """The comparison that measured rounds make; `settings` has concurrency, rounds and seed."""
    from engines import hardware

    levels = settings["concurrency"]
    metrics = [m for m in METRICS if all(r.samples(m) for r in rounds)]
    samples = {side: _values(rounds, side, levels[0], "token_gap_ms") for side in SIDES}
    tools = any(isinstance(r, RecordedRound) for r in rounds)  # they tell a request's mean at best
    return Comparison(
        method=method,
        how=how,
        rows=tuple(row(rounds, metric, level) for level in levels for metric in metrics),
        token_gap_ms={} if tools else samples,
        notes=(
            *notes,
            *_backends(baseline_facts, candidate_facts),
            *unequal(rounds),
        ),
        settings=settings,
        baseline_facts=baseline_facts,
        candidate_facts=candidate_facts,
        quality=quality,
        hardware={**hardware.cpu(), "gpus": [asdict(gpu) for gpu in hardware.gpus()]},
        versions=_versions(),
        server_times=server_times or {},
        by_shape=tuple(by_shape),
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def settings(
    prompts: Sequence[str],
    requests: Sequence[int],
    max_tokens: int,
    concurrency: Sequence[float],
    rounds: int,
    seed: int,
) -> dict[str, Any]:
    """What was asked of both sides, for the report; `requests` of a round at each level."""
    return {
        "prompts": len(prompts),
        "prompts_sha256": hashlib.sha256("\0".join(prompts).encode()).hexdigest(),
        "requests": list(requests),
        "max_tokens": max_tokens,
        "concurrency": list(concurrency),
        "rounds": rounds,
        "seed": seed,
    }


def _values(rounds: Sequence[AnyRound], side: str, level: float, metric: str) -> list[float]:
    return [x for r in rounds if (r.side, r.concurrency) == (side, level) for x in r.samples(metric)]


def _backends(*facts: dict[str, Any] | None) -> tuple[str, ...]:
    """Where the sides were not served alike, more than the models differs."""
    first, second = ((known or {}).get("backend") for known in facts)
    if first is None or second is None or first == second:
        return ()
    return (f"The sides ran in different backends, {first} and {second}: the ratio is of these too.",)
