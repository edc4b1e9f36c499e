"""From traces to the figures reported."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Speed:
    """Of one run over all its sequences."""

    prefill_s: float  # until every sequence has its first token
    decode: float  # tokens per second from then on


def speed(seconds: Sequence[Sequence[float]]) -> Speed:
    """Of the times at which each sequence's tokens came."""
    first = max(times[0] for times in seconds)
    last = max(times[-1] for times in seconds)
    after = sum(time > first for times in seconds for time in times)
    return Speed(first, after / (last - first))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most, to four digits."""
    shown = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in shown.items()}


def ratio(ours: Sequence[float], theirs: Sequence[float], target: float | None) -> dict[str, Any]:
    """Ours over theirs, by rounds."""
    rounds = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    medians = statistics.median(ours) / statistics.median(theirs)
    figures = {"median_of_rounds": round(rounds, 3), "of_medians": round(medians, 3)}
    return figures if target is None else {**figures, "target": target, "met": rounds >= target}


def agreement(tokens: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> dict[str, Any]:
    """How many first tokens are the reference's in each sequence, and the share of all tokens that are."""
    pairs = list(zip(tokens, reference, strict=True))
    prefixes = [common_prefix(a, b) for a, b in pairs]
    same = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=True))
    return {
        "of": len(reference[0]),
        "common_prefix": spread(prefixes),
        "same": round(same / sum(map(len, reference)), 4),
    }


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of first elements that are equal."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def batches_of(names: Sequence[str], need: float, available: float) -> list[list[str]]:
    """Engines that are loaded together: all where memory suffices, else ours with as many as fit.

    `need` is the bytes of one engine. Ours is the first name, and in every set.
    """
    ours, peers = list(names[:1]), list(names[1:])
    beside = max(1, int(available / need) - 1)
    return [ours + peers[n : n + beside] for n in range(0, len(peers), beside)] or [ours]
