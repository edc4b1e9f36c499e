"""Baseline against candidate: the same prompts, in interleaved rounds, as distributions and ratios.

Rounds alternate ABBA, so a drift of the machine meets both alike. Within a round `concurrency` clients
work through the prompts, each sending its next request when the last has ended (closed loop).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from triton_repo.client import Endpoint, RequestTiming, measure

VERSION = 1
SIDES = ("baseline", "candidate")
METRICS = {
    "ttft_ms": "time to first token",
    "inter_token_ms": "inter-token latency",
    "latency_ms": "request latency",
    "tokens_per_s": "tokens/s",
}
RESAMPLES = 2000
DEFAULT_PROMPTS = (
    "def main(argv=None):\n",
    "import os\nimport sys\n\n",
    "class Node:\n    def __init__(self",
    "The function returns the number of",
)


@dataclass(frozen=True, kw_only=True)
class Round:
    """All requests of one side in one round."""

    side: str
    concurrency: int
    wall_s: float
    timings: tuple[RequestTiming, ...]

    def samples(self, metric: str) -> list[float]:
        """The round's values of a metric, in ms or tokens/s (one value: the round's throughput)."""
        if metric == "ttft_ms":
            return [1e3 * t.ttft_s for t in self.timings]
        if metric == "inter_token_ms":
            return [1e3 * x for t in self.timings for x in t.inter_token_s]
        if metric == "latency_ms":
            return [1e3 * t.latency_s for t in self.timings]
        return [sum(t.num_chunks for t in self.timings) / self.wall_s]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of all values of a metric."""

    p50: float
    p90: float
    p99: float
    mean: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """candidate / baseline of the medians, with the 95% bootstrap interval over rounds."""

    value: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether the interval leaves 1 out."""
        return not self.low <= 1 <= self.high


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric at one concurrency."""

    metric: str
    concurrency: int
    baseline: Statistics
    candidate: Statistics
    ratio: Ratio


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything the report shows."""

    rows: tuple[Row, ...]
    inter_token_ms: dict[str, list[float]]  # all values of each side at the first concurrency
    notes: tuple[str, ...]
    settings: dict[str, Any]
    baseline_facts: dict[str, Any] | None
    candidate_facts: dict[str, Any] | None
    quality: dict[str, Any] | None
    hardware: dict[str, Any]

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
    progress: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Measure both endpoints, greedily, `rounds` rounds a side at each concurrency after a warm-up.

    Raises UserError where a server fails.
    """
    ends = dict(zip(SIDES, (baseline, candidate), strict=True))
    measured: list[Round] = []
    for level in concurrency:
        for end in (*ends.values(), *ends.values()):  # warm-up, not counted
            _run_round("", end, prompts, max_tokens, level)
        for number in range(rounds):
            progress(f"concurrency {level}, round {number + 1} of {rounds}")
            order = SIDES if number % 2 == 0 else SIDES[::-1]
            measured += [_run_round(side, ends[side], prompts, max_tokens, level) for side in order]
    from engines import hardware

    return Comparison(
        rows=tuple(row(measured, metric, level, seed) for level in concurrency for metric in METRICS),
        inter_token_ms={side: _values(measured, side, concurrency[0], "inter_token_ms") for side in SIDES},
        notes=_notes(measured),
        settings={
            "prompts": len(prompts),
            "max_tokens": max_tokens,
            "concurrency": list(concurrency),
            "rounds": rounds,
            "seed": seed,
        },
        baseline_facts=baseline_facts,
        candidate_facts=candidate_facts,
        quality=quality,
        hardware={**hardware.cpu(), "gpus": [asdict(gpu) for gpu in hardware.gpus()]},
    )


def _run_round(side: str, endpoint: Endpoint, prompts: Sequence[str], max_tokens: int, level: int) -> Round:
    start = time.perf_counter()
    with ThreadPoolExecutor(level) as clients:
        timings = tuple(clients.map(lambda p: measure(endpoint, p, max_tokens=max_tokens), prompts))
    return Round(side=side, concurrency=level, wall_s=time.perf_counter() - start, timings=timings)


def _values(rounds: Sequence[Round], side: str, level: int, metric: str) -> list[float]:
    return [x for r in rounds if (r.side, r.concurrency) == (side, level) for x in r.samples(metric)]


def row(rounds: Sequence[Round], metric: str, level: int, seed: int) -> Row:
    """The statistics and the ratio of one metric at one concurrency."""
    groups = {
        side: [r.samples(metric) for r in rounds if (r.side, r.concurrency) == (side, level)]
        for side in SIDES
    }
    return Row(
        metric=metric,
        concurrency=level,
        baseline=statistics([x for g in groups["baseline"] for x in g]),
        candidate=statistics([x for g in groups["candidate"] for x in g]),
        ratio=ratio(groups["baseline"], groups["candidate"], seed),
    )


def statistics(values: Sequence[float]) -> Statistics:
    """Percentiles by linear interpolation."""
    p50, p90, p99 = (float(x) for x in np.percentile(values, (50, 90, 99)))
    return Statistics(p50=p50, p90=p90, p99=p99, mean=float(np.mean(values)), count=len(values))


def ratio(baseline: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]], seed: int) -> Ratio:
    """Ratio of medians and its percentile bootstrap interval.

    Rounds run in pairs next to each other, so whole pairs are drawn with replacement: values within a
    round are not independent, and a slow moment of the machine hits both of a pair.
    """
    sides = [[np.asarray(r) for r in side] for side in (baseline, candidate)]
    count = min(map(len, sides))
    generator = np.random.default_rng(seed)
    draws = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        picked = generator.integers(0, count, count)
        low, high = (np.median(np.concatenate([side[j] for j in picked])) for side in sides)
        draws[i] = high / low
    value = np.median(np.concatenate(sides[1])) / np.median(np.concatenate(sides[0]))
    low, high = np.percentile(draws, (2.5, 97.5))
    return Ratio(value=float(value), low=float(low), high=float(high))


def _notes(rounds: Sequence[Round]) -> tuple[str, ...]:
    """What keeps the two sides from having done equal work."""
    lengths = {side: {t.num_chunks for r in rounds if r.side == side for t in r.timings} for side in SIDES}
    if lengths["baseline"] == lengths["candidate"] and len(lengths["baseline"]) == 1:
        return ()
    means = {s: np.mean([t.num_chunks for r in rounds if r.side == s for t in r.timings]) for s in SIDES}
    return (
        f"Outputs differ in length: {means['baseline']:.1f} tokens a request from the baseline, "
        f"{means['candidate']:.1f} from the candidate. Request latency is not of equal work.",
    )
