"""Whole blocks in parallel (arXiv 2503.18908): all layers of a window read the window's input x.

y = x + sum_i h_i(x), where h_i(x) = a_i + ffn_i(norm_i(x + a_i)) and a_i = attention_i(norm_i(x)).
Weights stay as they are. Ranks then sum twice for a window, not twice for each of its layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from builder.architecture import Architecture, Layer, Window
from builder.errors import UserError


def parallelize(architecture: Architecture, windows: Iterable[Window]) -> Architecture:
    """With these windows as well. Raises UserError where they do not fit its layers or one another."""
    return replace(architecture, parallel=tuple(sorted((*architecture.parallel, *windows))))


def renumber(
    architecture: Architecture, layers: tuple[Layer, ...], places: Mapping[int, int]
) -> Architecture:
    """With other `layers`, of which `places` tells the numbers of the old ones; windows follow theirs.

    Raises UserError for a window of which fewer than two layers are left.
    """
    windows = []
    for first, last in architecture.parallel:
        left = [places[i] for i in range(first, last + 1) if i in places]
        if len(left) < 2:
            raise UserError(
                f"parallel: window {first}-{last} has fewer than two layers left; leave it out, or drop less"
            )
        windows.append((left[0], left[-1]))
    return replace(architecture, layers=layers, parallel=tuple(windows))


def check_groups(architecture: Architecture, groups: Iterable[Window]) -> None:
    """Raise UserError where a group of layers to fuse shares some with a window."""
    for first, last in groups:
        for begin, end in architecture.parallel:
            if first <= end and begin <= last:
                raise UserError(
                    f"fuse: group {first}-{last} shares layers with the parallel window {begin}-{end}; "
                    "leave one of them out"
                )


def check_sequential(architecture: Architecture, form: str) -> None:
    """Raise UserError, by the name of a format that cannot say it, where blocks run in parallel."""
    if not architecture.parallel:
        return
    windows = format_windows(architecture.parallel)
    raise UserError(
        f"parallel: {form} cannot say that the blocks {windows} run in parallel; leave it out of the plan, "
        f"and build the converted checkpoint by `build-engine --backend embedded --parallel-blocks {windows}`"
    )


def format_windows(windows: Iterable[Window]) -> str:
    """`38-41,71-74`."""
    return ",".join(f"{first}-{last}" for first, last in windows)
