"""Baseline against candidate: the same prompts, in interleaved rounds, as distributions and ratios.

Rounds alternate ABBA, so a drift of the machine meets both alike. Within a round `concurrency` clients
work through the prompts, each sending its next request when the last has ended (closed loop), or requests
come at random times of a rate (open loop, `triton_repo.load`). A round is timed by this package's client
through Triton, by aiperf through Triton, or by trtllm-bench without it.
"""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from triton_repo.client import Endpoint
from triton_repo.history import Against
from triton_repo.load import Load
from triton_repo.measuring import MOST_WARM_UPS, STEADY, Sides
from triton_repo.rounds import METRICS, SIDES, AnyRound, RecordedRound, Row, Targets, row
from triton_repo.shapes import Shape, ShapeRows, shape_rows

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
    inter_token_ms: dict[str, list[float]]  # all values of each side at the first concurrency, or none
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
        """The content of report.json."""
        return {"version": VERSION, **asdict(self)}


def compare(
    baseline: Endpoint,
    candidate: Endpoint,
    *,
    prompts: Sequence[str],
    max_tokens: int,
    concurrency: Sequence[float] = (1, 2, 4),
    rounds: int = 8,
    seed: int = 0,
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
    `max_tokens` where the models can be asked for it. `shapes` are measured at the first level. Raises
    UserError where a server fails.
    """
    sides = Sides(baseline, candidate, rounds=rounds, targets=targets, progress=progress)
    how: dict[str, Any] = {"open_loop": open_loop, "equal_lengths": equal_lengths, "seed": seed}
    load = Load(prompts=prompts, max_tokens=max_tokens, **how)
    measured, warm_ups = sides.measure(load, concurrency)
    by_shape = []
    for shape in shapes:
        progress(f"{shape.input_tokens} tokens in, {shape.output_tokens} out")
        load_of = Load(prompts=shape.prompts, max_tokens=shape.output_tokens, **how)
        by_shape.append(shape_rows(shape, sides.measure(load_of, concurrency[:1])[0]))
    lengths = "all of them" if equal_lengths else "or fewer"
    loop = "open loop (Poisson)" if open_loop else "closed loop"
    return assemble(
        measured,
        method="through Triton",
        how=f"{rounds} interleaved rounds a side and level (ABBA) of {len(prompts)} prompts, repeated "
        f"until every client has two, {max_tokens} tokens each, {lengths}, greedy, {loop}, after "
        f"{', '.join(map(str, warm_ups))} warm-up rounds.",
        settings={
            **settings(prompts, max_tokens, concurrency, rounds, seed),
            "requests": [load.requests(level) for level in concurrency],
            "load": "open" if open_loop else "closed",
            "warm_up_rounds": warm_ups,
            "targets": None if targets is None else asdict(targets),
        },
        notes=(*notes, *_cold(warm_ups)),
        baseline_facts=baseline_facts,
        candidate_facts=candidate_facts,
        quality=quality,
        server_times=sides.server_times(),
        by_shape=by_shape,
    )


def _cold(warm_ups: Sequence[int]) -> tuple[str, ...]:
    if MOST_WARM_UPS not in warm_ups:
        return ()
    return (
        f"Latency had not settled to within {STEADY:.0%} after {MOST_WARM_UPS} warm-up rounds: the machine "
        "is noisy, or a server still warms up.",
    )


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
    samples = {side: _values(rounds, side, levels[0], "inter_token_ms") for side in SIDES}
    tools = any(isinstance(r, RecordedRound) for r in rounds)  # they tell a request's mean at best
    return Comparison(
        method=method,
        how=how,
        rows=tuple(row(rounds, metric, level) for level in levels for metric in metrics),
        inter_token_ms={} if tools else samples,
        notes=(
            *notes,
            *_backends(baseline_facts, candidate_facts),
            *_notes(rounds),
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
    prompts: Sequence[str], max_tokens: int, concurrency: Sequence[float], rounds: int, seed: int
) -> dict[str, Any]:
    """What was asked of both sides, for the report."""
    return {
        "prompts": len(prompts),
        "requests": [len(enough(prompts, int(level))) for level in concurrency],
        "max_tokens": max_tokens,
        "concurrency": list(concurrency),
        "rounds": rounds,
        "seed": seed,
    }


def enough(prompts: Sequence[str], level: int) -> list[str]:
    """The prompts of one round, again and again until every client has two: else fewer would be at work."""
    return list(itertools.islice(itertools.cycle(prompts), max(len(prompts), 2 * level)))


def _values(rounds: Sequence[AnyRound], side: str, level: float, metric: str) -> list[float]:
    return [x for r in rounds if (r.side, r.concurrency) == (side, level) for x in r.samples(metric)]


def _backends(*facts: dict[str, Any] | None) -> tuple[str, ...]:
    """Where the sides were not served alike, more than the models differs."""
    first, second = ((known or {}).get("backend") for known in facts)
    if first is None or second is None or first == second:
        return ()
    return (f"The sides ran in different backends, {first} and {second}: the ratio is of these too.",)


def _notes(rounds: Sequence[AnyRound]) -> tuple[str, ...]:
    """What keeps the two sides from having done equal work."""
    lengths = {side: [x for r in rounds if r.side == side for x in r.lengths] for side in SIDES}
    if sorted(lengths["baseline"]) == sorted(lengths["candidate"]):
        return ()
    means = {side: np.mean(lengths[side]) for side in SIDES}
    unlike = ""
    if len(lengths["baseline"]) == len(lengths["candidate"]):
        share = np.mean([a != b for a, b in zip(*lengths.values(), strict=True)])
        unlike = f"; {share:.0%} of the requests are of unlike length"
    return (
        f"Outputs differ in length: {means['baseline']:.1f} tokens a request from the baseline, "
        f"{means['candidate']:.1f} from the candidate{unlike}. Request latency is not of equal work.",
    )
