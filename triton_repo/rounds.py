"""What a round of measuring gives, and the statistics and ratios of many rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from triton_repo.client import RequestTiming

SIDES = ("baseline", "candidate")
METRICS = {
    "ttft_ms": "time to first token",
    "inter_token_ms": "inter-token latency",
    "latency_ms": "request latency",
    "tokens_per_s": "tokens/s",
    "user_tokens_per_s": "tokens/s a request",
}
RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of all values of a metric."""

    p50: float
    p90: float
    p99: float
    mean: float
    count: int


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
        if metric == "tokens_per_s":
            return [sum(t.num_chunks for t in self.timings) / self.wall_s]
        return []

    @property
    def lengths(self) -> tuple[float, ...]:
        """Tokens of every answer."""
        return tuple(t.num_chunks for t in self.timings)


@dataclass(frozen=True, kw_only=True)
class RecordedRound:
    """One run of a benchmark tool, in the tool's own metrics.

    Where the tool gives percentiles of the run and not the values behind them, they are in `summaries`
    and the run's one value is its median.
    """

    side: str
    concurrency: int
    values: Mapping[str, tuple[float, ...]]
    lengths: tuple[float, ...]  # tokens of every answer, or their mean
    summaries: Mapping[str, Statistics] = field(default_factory=dict)

    def samples(self, metric: str) -> list[float]:
        """The run's values of a metric; empty where the tool does not have it."""
        return list(self.values.get(metric, ()))


AnyRound = Round | RecordedRound


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


def row(rounds: Sequence[AnyRound], metric: str, level: int, seed: int) -> Row:
    """The statistics and the ratio of one metric at one concurrency."""
    groups = {side: [r for r in rounds if (r.side, r.concurrency) == (side, level)] for side in SIDES}
    samples = {side: [r.samples(metric) for r in groups[side]] for side in SIDES}
    return Row(
        metric=metric,
        concurrency=level,
        baseline=_statistics(groups["baseline"], metric),
        candidate=_statistics(groups["candidate"], metric),
        ratio=ratio(samples["baseline"], samples["candidate"], seed),
    )


def _statistics(rounds: Sequence[AnyRound], metric: str) -> Statistics:
    summaries = [
        r.summaries[metric] for r in rounds if isinstance(r, RecordedRound) and metric in r.summaries
    ]
    if summaries:
        return combined(summaries)
    return statistics([x for r in rounds for x in r.samples(metric)])


def combined(runs: Sequence[Statistics]) -> Statistics:
    """Of several runs whose values are not known: medians of their percentiles, the mean of all."""
    count = sum(run.count for run in runs)
    middle = {name: float(np.median([getattr(run, name) for run in runs])) for name in ("p50", "p90", "p99")}
    return Statistics(**middle, mean=sum(run.mean * run.count for run in runs) / count, count=count)


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
