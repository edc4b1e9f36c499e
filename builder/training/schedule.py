"""The learning rate of a step: a linear warm-up, then a cosine down to a share of the peak."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, *, peak: float, warmup: float, final: float) -> float:
    """Of `step` (from 0) of `steps`; `warmup` and `final` are shares of the steps and of the peak.

    The last step has final * peak (arXiv 1608.03983 without restarts).
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(1, steps - 1 - rising)
    return peak * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)
