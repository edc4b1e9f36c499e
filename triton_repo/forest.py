"""Ratios with their intervals, one below the other, beside a line at 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from triton_repo import svg
from triton_repo.rounds import Ratio
from triton_repo.words import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOTHING = Markup("")


def forest(name: str, found: Sequence[tuple[str, Ratio]]) -> Markup:
    """A dot and its interval in each line, filled where a difference is called, beside a line at 1."""
    found = [(text, ratio) for text, ratio in found if ratio.value > 0]
    if not found:
        return NOTHING

    def draw(axes: Axes) -> None:
        for place, (_, ratio) in enumerate(found):
            colour = svg.CANDIDATE if ratio.differs else svg.BASELINE
            axes.plot([ratio.low, ratio.high], [place, place], color=colour, lw=2.5, solid_capstyle="butt")
            fill = colour if ratio.differs else "none"
            axes.plot([ratio.value], [place], marker="o", ms=8, mec=colour, mfc=fill, mew=2, ls="none")
            where = axes.get_yaxis_transform()
            axes.text(1.03, place, interval(ratio), transform=where, va="center", color=svg.INK)
        axes.axvline(1, color=svg.INK, lw=1)
        axes.set_yticks(range(len(found)), [text for text, _ in found])
        axes.tick_params(axis="y", length=0)
        axes.set(ylim=(len(found) - 0.4, -0.6), xlabel="candidate / baseline, 95% interval", xscale="log")
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False)
        _round_ticks(axes, [x for _, ratio in found for x in (ratio.low, ratio.high)])

    told = "; ".join(f"{text} {interval(ratio)}" for text, ratio in found)
    label = f"Candidate over baseline, with 95% intervals: {told}"
    return svg.drawn(name, label, draw, height=0.26 * len(found) + 0.6)


def _round_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Round numbers on a logarithmic axis that holds the values and 1."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

    low, high = min(*values, 0.96), max(*values, 1.04)
    span = math.log(high / low)
    axes.set_xlim(low * math.exp(-0.06 * span), high * math.exp(0.06 * span))
    ticks = [1.0]
    for x in MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high):
        if x > 0 and all(abs(math.log(x / tick)) > span / 7 for tick in ticks):
            ticks.append(float(x))
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
