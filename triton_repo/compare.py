"""Baseline against candidate: the same prompts, in interleaved rounds, as distributions and ratios.

Rounds alternate ABBA, so a drift of the machine meets both alike. Within a round `concurrency` clients
work through the prompts, each sending its next request when the last has ended (closed loop). A round is
timed by this package's client through Triton, by aiperf through Triton, or by trtllm-bench without it.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from triton_repo.client import Endpoint, measure
from triton_repo.rounds import METRICS, SIDES, AnyRound, RecordedRound, Round, Row, row

VERSION = 1
PACKAGES = ("tensorrt_llm", "torch", "tritonclient")
MIN_ROUNDS = 5  # 2 ** (1 - 5) is near 0.05
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

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that were measured, in their order."""
        return tuple(m for m in METRICS if any(row.metric == m for row in self.rows))

    def row(self, metric: str, concurrency: int) -> Row:
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
    concurrency: Sequence[int] = (1, 2, 4),
    rounds: int = 8,
    seed: int = 0,
    baseline_facts: dict[str, Any] | None = None,
    candidate_facts: dict[str, Any] | None = None,
    quality: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Measure both endpoints, greedily, `rounds` rounds a side at each concurrency after a warm-up.

    Raises UserError where a server fails.
    """
    ends = dict(zip(SIDES, (baseline, candidate), strict=True))

    def warm_up(level: int) -> None:
        for end in (*ends.values(), *ends.values()):
            _run_round("", end, prompts, max_tokens, level)

    measured = interleave(
        lambda side, level, _: _run_round(side, ends[side], prompts, max_tokens, level),
        concurrency,
        rounds,
        warm_up=warm_up,
        progress=progress,
    )
    return assemble(
        measured,
        method="through Triton",
        how=f"{rounds} interleaved rounds a side and level (ABBA) of {len(prompts)} prompts, repeated "
        f"until every client has two, {max_tokens} tokens each, greedy, closed loop, after two warm-up "
        "rounds.",
        settings=settings(prompts, max_tokens, concurrency, rounds, seed),
        notes=notes,
        baseline_facts=baseline_facts,
        candidate_facts=candidate_facts,
        quality=quality,
    )


def interleave(
    run: Callable[[str, int, int], AnyRound],
    levels: Sequence[int],
    rounds: int,
    *,
    warm_up: Callable[[int], None] = lambda level: None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[AnyRound]:
    """`run(side, level, number)` for `rounds` rounds a side at each level, the sides ABBA."""
    measured: list[AnyRound] = []
    for level in levels:
        warm_up(level)
        for number in range(rounds):
            progress(f"concurrency {level}, round {number + 1} of {rounds}")
            order = SIDES if number % 2 == 0 else SIDES[::-1]
            measured += [run(side, level, number) for side in order]
    return measured


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
) -> Comparison:
    """The comparison that measured rounds make; `settings` has concurrency, rounds and seed."""
    from engines import hardware

    levels, seed = settings["concurrency"], settings["seed"]
    metrics = [m for m in METRICS if all(r.samples(m) for r in rounds)]
    samples = {side: _values(rounds, side, levels[0], "inter_token_ms") for side in SIDES}
    tools = any(isinstance(r, RecordedRound) for r in rounds)  # they tell a request's mean at best
    return Comparison(
        method=method,
        how=how,
        rows=tuple(row(rounds, metric, level, seed) for level in levels for metric in metrics),
        inter_token_ms={} if tools else samples,
        notes=(
            *notes,
            *_backends(baseline_facts, candidate_facts),
            *_notes(rounds),
            *_few_rounds(settings["rounds"]),
        ),
        settings=settings,
        baseline_facts=baseline_facts,
        candidate_facts=candidate_facts,
        quality=quality,
        hardware={**hardware.cpu(), "gpus": [asdict(gpu) for gpu in hardware.gpus()]},
        versions=_versions(),
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
    prompts: Sequence[str], max_tokens: int, concurrency: Sequence[int], rounds: int, seed: int
) -> dict[str, Any]:
    """What was asked of both sides, for the report."""
    return {
        "prompts": len(prompts),
        "requests": [len(enough(prompts, level)) for level in concurrency],
        "max_tokens": max_tokens,
        "concurrency": list(concurrency),
        "rounds": rounds,
        "seed": seed,
    }


def enough(prompts: Sequence[str], level: int) -> list[str]:
    """The prompts of one round, again and again until every client has two: else fewer would be at work."""
    return list(itertools.islice(itertools.cycle(prompts), max(len(prompts), 2 * level)))


def _run_round(side: str, endpoint: Endpoint, prompts: Sequence[str], max_tokens: int, level: int) -> Round:
    start = time.perf_counter()
    with ThreadPoolExecutor(level) as clients:
        asked = enough(prompts, level)
        timings = tuple(clients.map(lambda p: measure(endpoint, p, max_tokens=max_tokens), asked))
    return Round(side=side, concurrency=level, wall_s=time.perf_counter() - start, timings=timings)


def _values(rounds: Sequence[AnyRound], side: str, level: int, metric: str) -> list[float]:
    return [x for r in rounds if (r.side, r.concurrency) == (side, level) for x in r.samples(metric)]


def _backends(*facts: dict[str, Any] | None) -> tuple[str, ...]:
    """Where the sides were not served alike, more than the models differs."""
    first, second = ((known or {}).get("backend") for known in facts)
    if first is None or second is None or first == second:
        return ()
    return (f"The sides ran in different backends, {first} and {second}: the ratio is of these too.",)


def _notes(rounds: Sequence[AnyRound]) -> tuple[str, ...]:
    """What keeps the two sides from having done equal work."""
    lengths = {side: sorted(x for r in rounds if r.side == side for x in r.lengths) for side in SIDES}
    if lengths["baseline"] == lengths["candidate"]:
        return ()
    means = {side: np.mean(lengths[side]) for side in SIDES}
    return (
        f"Outputs differ in length: {means['baseline']:.1f} tokens a request from the baseline, "
        f"{means['candidate']:.1f} from the candidate. Request latency is not of equal work.",
    )


def _few_rounds(rounds: int) -> tuple[str, ...]:
    """Of so few pairs all fall on one side by chance, and no resampling of them reaches the other."""
    if rounds >= MIN_ROUNDS:
        return ()
    return (
        f"With {rounds} rounds the interval is too narrow: equal sides would seem to differ in about 1 of "
        f"{2 ** (rounds - 1)} comparisons, where 95% means 1 of 20. Give --rounds {MIN_ROUNDS} or more.",
    )
