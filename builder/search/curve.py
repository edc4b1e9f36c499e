"""What an FFN costs over its width, as the search's program can say it.

A convex curve, such as max(issuing kernels, reading weights), is the largest of some lines. Measured against
the steepest of them, saved + slope * width, an FFN has an excess

    excess(width) = max over pieces of (height - fall * width), at least 0

and fusing FFNs of widths w_1 .. w_n takes (n - 1) * saved + sum excess(w_i) - excess(sum w_i) seconds less.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

from builder.architecture import FFN
from builder.search.latency import Costs

MAX_PIECES = 8  # more and the curve counts as one that is not convex
TOLERANCE = 1e-6  # of slopes, relative to the steepest


@dataclass(frozen=True, kw_only=True)
class Curve:
    """`saved`: seconds that each fusing saves at least; `excess_of` has every width that can be alone.

    A curve that is not convex has no pieces and no excess, and `saved` is the least that any two
    widths can save.
    """

    saved: float
    pieces: tuple[tuple[float, float], ...]  # (height in seconds, fall in seconds per channel)
    excess_of: dict[int, float]

    @classmethod
    def of(cls, costs: Costs, widths: Collection[int], total: int) -> Curve:
        """The curve of FFNs of these widths and of their sums up to `total`."""
        sums = sorted({n * w for w in widths for n in range(1, max(total // w, 1) + 1)})
        seconds = [costs.ffn(FFN(intermediate_size=w)) for w in sums]
        none = dict.fromkeys(widths, 0.0)
        if len(sums) < 2:
            return cls(saved=0.0, pieces=(), excess_of=none)
        lines = _lines(sums, seconds)
        if lines is None:
            saved = _least_saving(dict(zip(sums, seconds, strict=True)), widths, total, costs)
            return cls(saved=saved, pieces=(), excess_of=none)
        base, slope = lines[-1]
        known = dict(zip(sums, seconds, strict=True))
        excess = {w: max(0.0, known[w] - base - slope * w) for w in widths}
        if max(excess.values()) <= TOLERANCE * max(seconds):
            return cls(saved=base, pieces=(), excess_of=none)
        pieces = tuple((height - base, slope - steep) for height, steep in lines[:-1])
        return cls(saved=base, pieces=pieces, excess_of=excess)


def _lines(widths: list[int], seconds: list[float]) -> list[tuple[float, float]] | None:
    """(height, slope) of the lines whose largest the points are, the flattest first; None where none are."""
    points = list(zip(widths, seconds, strict=True))
    slopes = [(s - r) / (w - v) for (v, r), (w, s) in pairwise(points)]
    tolerance = TOLERANCE * max(abs(x) for x in slopes)
    lines: list[tuple[float, float]] = []
    for (width, second), slope in zip(points, slopes, strict=False):
        if lines and slope < lines[-1][1] - tolerance:
            return None
        if not lines or slope > lines[-1][1] + tolerance:
            lines.append((second - slope * width, slope))
    return lines if len(lines) <= MAX_PIECES else None


def _least_saving(known: dict[int, float], widths: Collection[int], total: int, costs: Costs) -> float:
    """The least that one FFN saves against two, over what may come before and each width."""
    least = [
        known[before] + known[width] - costs.ffn(FFN(intermediate_size=before + width))
        for before in known
        for width in widths
        if before + width <= total
    ]
    return min(least, default=0.0)
