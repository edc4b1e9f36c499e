"""Windows of whole blocks that may run in parallel, by the dependency matrix (arXiv 2503.18908)."""

from __future__ import annotations

import numpy as np

from builder.analysis.record import Window
from builder.analysis.variants import whole
from builder.architecture import Architecture


def rank_windows(architecture: Architecture, dependency: np.ndarray, size: int) -> tuple[Window, ...]:
    """Windows of `size` full blocks in a row, the least dependent first, none overlapping a better one.

    `dependency` is [m, m]. A window is as dependent as the largest entry of its part of the matrix; of
    equal ones the smaller sum is better, then the earlier window.
    """
    found = []
    for first in range(len(architecture.layers) - size + 1):
        part = slice(first, first + size)
        if all(whole(layer) for layer in architecture.layers[part]):
            square = dependency[part, part]
            found.append(
                Window(first=first, last=first + size - 1, max=float(square.max()), sum=float(square.sum()))
            )
    chosen: list[Window] = []
    for window in sorted(found, key=lambda w: (w.max, w.sum, w.first)):
        if all(window.last < other.first or other.last < window.first for other in chosen):
            chosen.append(window)
    return tuple(chosen)
