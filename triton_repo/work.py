"""Whether both sides of a comparison did equal work: requests beside each other, their lengths and texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from triton_repo.rounds import SIDES, AnyRound, Round


def unequal(rounds: Sequence[AnyRound]) -> tuple[str, ...]:
    """A sentence for what differs: lengths, which make request latency unfair, or else the texts."""
    sides = [[r for r in rounds if r.side == side] for side in SIDES]
    lengths = [[x for r in side for x in r.lengths] for side in sides]
    share = _unlike(*lengths)
    if share:
        means = [np.mean(x) for x in lengths]
        return (
            f"Outputs differ in length: {means[0]:.1f} tokens a request from the baseline, {means[1]:.1f} "
            f"from the candidate; {share:.0%} of the requests are of unlike length. Request latency is "
            "not of equal work.",
        )
    texts = [[t.text for r in side if isinstance(r, Round) for t in r.timings] for side in sides]
    differ = _unlike(*texts)
    if not differ:
        return ()
    return (f"Outputs have equal lengths; {differ:.0%} of the requests are answered with unlike texts.",)


def _unlike(first: Sequence[object], second: Sequence[object]) -> float:
    """The share of pairs that differ; both sides send the same requests in the same order."""
    pairs = list(zip(first, second, strict=False))
    missing = abs(len(first) - len(second))
    return (sum(a != b for a, b in pairs) + missing) / max(1, len(pairs) + missing)
