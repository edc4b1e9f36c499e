"""Percentiles and their ratio between two sides, with an interval that is honest about few rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
NAMES = (*QUANTILES, "mean")
RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of all values of a metric, in the metric's unit."""

    p50: float
    p90: float
    p99: float
    mean: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """candidate / baseline, with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether the interval leaves 1 out."""
        return not self.low <= 1 <= self.high

    def inverse(self) -> Ratio:
        """baseline / candidate."""
        return Ratio(value=1 / self.value, low=1 / self.high, high=1 / self.low)


def statistics(values: Sequence[float]) -> Statistics:
    """Percentiles by linear interpolation."""
    p50, p90, p99 = (float(x) for x in np.quantile(values, tuple(QUANTILES.values())))
    return Statistics(p50=p50, p90=p90, p99=p99, mean=float(np.mean(values)), count=len(values))


def ratios(
    baseline: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]], seed: int
) -> dict[str, Ratio]:
    """The ratio of each of NAMES, from the values of each round; round i of both sides ran together.

    The standard error of the log ratio is bootstrapped by drawing whole pairs of rounds with replacement:
    values within a round are not independent, and a slow moment of the machine hits both of a pair. The
    interval is Student's t of pairs - 1 degrees of freedom around the log ratio, the bootstrap's
    error scaled by sqrt(n / (n - 1)). The plain percentile interval is too narrow for so few pairs: at
    4 to 8 it finds a difference between equals in one of seven comparisons, not one of twenty.
    Raises ValueError unless two or more pairs have values on both sides.
    """
    pairs = [(b, c) for b, c in zip(baseline, candidate, strict=True) if len(b) and len(c)]
    n = len(pairs)
    if n < 2:
        raise ValueError("two pairs of rounds with values are needed")
    # [RESAMPLES, n]: how often each pair was drawn; the first row is the data itself
    draws = np.random.default_rng(seed).multinomial(n, [1 / n] * n, RESAMPLES)
    counts = np.vstack([np.ones((1, n), dtype=draws.dtype), draws])
    sides = [resampled([pair[side] for pair in pairs], counts) for side in (0, 1)]
    logs = np.log(sides[1] / sides[0])  # [1 + RESAMPLES, NAMES]
    reach = student_t(n - 1) * np.sqrt(n / (n - 1)) * logs[1:].std(axis=0)
    bounds = np.exp(np.stack([logs[0], logs[0] - reach, logs[0] + reach], axis=1))
    return {
        name: Ratio(value=float(value), low=float(low), high=float(high))
        for name, (value, low, high) in zip(NAMES, bounds, strict=True)
    }


def resampled(rounds: Sequence[Sequence[float]], counts: NDArray[np.int64]) -> Array:
    """NAMES of resamples that take round j `counts[i, j]` times: [resamples, NAMES]."""
    values = np.concatenate([np.asarray(r, dtype=np.float64) for r in rounds])
    source = np.repeat(np.arange(len(rounds)), [len(r) for r in rounds])
    order = np.argsort(values, kind="stable")
    values, source = values[order], source[order]
    result = np.empty((len(counts), len(NAMES)))
    for i, row in enumerate(counts):
        weights = row[source]
        ends = np.cumsum(weights)
        places = np.array(tuple(QUANTILES.values())) * (ends[-1] - 1)
        below = np.floor(places)
        low = values[np.searchsorted(ends, below, side="right")]
        high = values[np.searchsorted(ends, np.minimum(below + 1, ends[-1] - 1), side="right")]
        result[i, :-1] = low + (high - low) * (places - below)
        result[i, -1] = values @ weights / ends[-1]
    return result


def student_t(freedom: int) -> float:
    """The two-sided 95% quantile of Student's t, by integrating its density over x = sqrt(freedom) tan a."""
    angles = np.linspace(-np.pi / 2, np.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    cumulative = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    angle = np.interp((1 + CONFIDENCE) / 2, cumulative / cumulative[-1], angles)
    return float(np.sqrt(freedom) * np.tan(angle))
