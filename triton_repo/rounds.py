"""What a round of measuring gives, and the statistics and ratios of many rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import t as student

from triton_repo.client import RequestTiming

SIDES = ("baseline", "candidate")
METRICS = {
    "ttft_ms": "time to first token",
    "inter_token_ms": "inter-token latency",  # a request's mean
    "token_gap_ms": "time between tokens",
    "latency_ms": "request latency",
    "tokens_per_s": "tokens/s",
    "user_tokens_per_s": "tokens/s a request",
    "goodput_per_s": "requests/s within the targets",
}
SHOWN, CALLED = 0.95, 0.99  # coverage of the interval that is shown, and of the one that decides
FENCE = 3.0  # quartile ranges beyond the quartiles, from where a value is an outlier


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of all values of a metric."""

    p50: float
    p90: float
    p99: float
    mean: float
    count: int
    outliers: int = 0  # values further than `FENCE` quartile ranges from the quartiles; all figures have them


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What a request must keep to be counted as good, in ms; None asks nothing. `inter_token` is its mean."""

    ttft: float | None = None
    inter_token: float | None = None
    latency: float | None = None

    def met(self, timing: RequestTiming) -> bool:
        values = {
            "ttft": timing.ttft_s,
            "inter_token": timing.mean_gap_s,
            "latency": timing.latency_s,
        }
        limits = {name: getattr(self, name) for name in values}
        return all(limit is None or 1e3 * values[name] <= limit for name, limit in limits.items())


@dataclass(frozen=True, kw_only=True)
class Round:
    """All requests of one side in one round; `concurrency` is clients, or requests/s of an open loop."""

    side: str
    concurrency: float
    wall_s: float
    timings: tuple[RequestTiming, ...]
    targets: Targets | None = None

    def samples(self, metric: str) -> list[float]:
        """The round's values of a metric, in ms or tokens/s (one value: the round's throughput).

        Inter-token latency is a request's mean, as aiperf has it: tokens often arrive two at a time, and the
        median of such gaps jumps between the short and the long ones.
        """
        if metric == "ttft_ms":
            return [1e3 * t.ttft_s for t in self.timings]
        if metric == "inter_token_ms":
            return [1e3 * t.mean_gap_s for t in self.timings if t.inter_token_s]
        if metric == "token_gap_ms":
            return [1e3 * x for t in self.timings for x in t.inter_token_s]
        if metric == "latency_ms":
            return [1e3 * t.latency_s for t in self.timings]
        if metric == "tokens_per_s":
            return [sum(t.num_chunks for t in self.timings) / self.wall_s]
        if metric == "goodput_per_s" and self.targets is not None:
            return [sum(map(self.targets.met, self.timings)) / self.wall_s]
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
    concurrency: float
    values: Mapping[str, tuple[float, ...]]
    lengths: tuple[float, ...]  # tokens of every answer, or their mean
    summaries: Mapping[str, Statistics] = field(default_factory=dict)

    def samples(self, metric: str) -> list[float]:
        """The run's values of a metric; empty where the tool does not have it."""
        return list(self.values.get(metric, ()))


AnyRound = Round | RecordedRound


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """candidate / baseline: the geometric mean over pairs of rounds, and its 95% interval.

    `differs` says that the 99% interval leaves 1 out: of equal sides one comparison in a hundred seems to.
    """

    value: float
    low: float
    high: float
    differs: bool


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric at one concurrency."""

    metric: str
    concurrency: float
    baseline: Statistics
    candidate: Statistics
    ratio: Ratio
    baseline_rounds: tuple[float, ...] = ()  # the median of each round, in their order
    candidate_rounds: tuple[float, ...] = ()


def row(rounds: Sequence[AnyRound], metric: str, level: float) -> Row:
    """The statistics and the ratio of one metric at one concurrency."""
    groups = {side: [r for r in rounds if (r.side, r.concurrency) == (side, level)] for side in SIDES}
    samples = {side: [r.samples(metric) for r in groups[side]] for side in SIDES}
    return Row(
        metric=metric,
        concurrency=level,
        baseline=_statistics(groups["baseline"], metric),
        candidate=_statistics(groups["candidate"], metric),
        ratio=ratio(samples["baseline"], samples["candidate"]),
        baseline_rounds=tuple(float(np.median(x)) for x in samples["baseline"]),
        candidate_rounds=tuple(float(np.median(x)) for x in samples["candidate"]),
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
    middle: dict[str, Any] = {
        name: float(np.median([getattr(run, name) for run in runs])) for name in ("p50", "p90", "p99")
    }
    return Statistics(**middle, mean=sum(run.mean * run.count for run in runs) / count, count=count)


def statistics(values: Sequence[float]) -> Statistics:
    """Percentiles by linear interpolation."""
    p25, p50, p75, p90, p99 = (float(x) for x in np.percentile(values, (25, 50, 75, 90, 99)))
    reach = FENCE * (p75 - p25)
    outside = sum(not p25 - reach <= x <= p75 + reach for x in values)
    mean = float(np.mean(values))
    return Statistics(p50=p50, p90=p90, p99=p99, mean=mean, count=len(values), outliers=outside)


def ratio(baseline: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]) -> Ratio:
    """Ratio of the rounds' medians, and Student's t interval of its logarithm over pairs of rounds.

    The rounds of a pair run next to each other, so a slow moment of the machine hits both, and values within
    a round are not independent: a pair is one observation. Few are too few for a bootstrap: of 8 pairs its
    95% interval leaves the true ratio out in 14% of comparisons, of 5 in 15%, in simulation.
    """
    pairs = zip(baseline, candidate, strict=False)
    medians = np.array([[np.median(first), np.median(second)] for first, second in pairs])
    if not (medians > 0).all():  # of a goodput: no logarithm, and nothing to compare
        return Ratio(value=math.nan, low=math.nan, high=math.nan, differs=False)
    logs = np.log(medians[:, 1] / medians[:, 0])
    mean, error = float(logs.mean()), float(logs.std(ddof=1) / math.sqrt(len(logs)))
    shown, called = (float(student.ppf((1 + level) / 2, len(logs) - 1)) * error for level in (SHOWN, CALLED))
    return Ratio(
        value=math.exp(mean),
        low=math.exp(mean - shown),
        high=math.exp(mean + shown),
        differs=abs(mean) > called,
    )
