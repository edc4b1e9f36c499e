"""The plots of a comparison, as SVG that a page holds."""

from __future__ import annotations

import io
from typing import Any

from builder.errors import UserError
from triton_repo.compare import Comparison
from triton_repo.rounds import SIDES
from triton_repo.words import SHORT, removed, unit

COLOURS = {"baseline": "#8a8f98", "candidate": "#2f80ed"}  # both read on light and on dark
INK = "#808080"


def pyplot_or_refuse() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError("matplotlib is missing; pip install 'ffn-fusion[report]'") from None
    matplotlib.use("svg")
    from matplotlib import pyplot

    return pyplot


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    pyplot_or_refuse().close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _axes(width: float = 6.0, height: float = 3.2) -> tuple[Any, Any]:
    pyplot = pyplot_or_refuse()
    style = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11, "svg.hashsalt": "report"}
    colours = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    )
    pyplot.rcParams.update({**style, **colours})
    figure, axes = pyplot.subplots(figsize=(width, height))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=INK, alpha=0.2)
    return figure, axes


def distribution(comparison: Comparison) -> str:
    """Share of tokens that came within a time, cut at the 99.5th percentile of the slower side.

    Empty where single values are not known.
    """
    import numpy as np

    if not comparison.inter_token_ms:
        return ""
    figure, axes = _axes()
    limit = max(np.percentile(values, 99.5) for values in comparison.inter_token_ms.values())
    for side in SIDES:
        values = np.sort(comparison.inter_token_ms[side])
        axes.step(values, np.arange(1, len(values) + 1) / len(values), color=COLOURS[side], label=side, lw=2)
    axes.set(xlim=(0, limit), ylim=(0, 1.01), xlabel="inter-token latency, ms", ylabel="share of tokens")
    axes.legend(frameon=False, loc="lower right")
    return _svg(figure)


def ratios(comparison: Comparison) -> str:
    """Every ratio at the first level with its interval, left of 1 being smaller."""
    level = comparison.settings["concurrency"][0]
    rows = [comparison.row(m, level) for m in comparison.metrics if comparison.row(m, level).ratio.value > 0]
    figure, axes = _axes(height=0.42 * len(rows) + 0.8)
    for place, row in enumerate(reversed(rows)):
        ratio = row.ratio
        reach = [[ratio.value - ratio.low], [ratio.high - ratio.value]]
        colour = COLOURS["candidate" if ratio.differs else "baseline"]
        axes.errorbar([ratio.value], [place], xerr=reach, color=colour, marker="o", capsize=4, lw=2)
    axes.axvline(1, color=INK, lw=1, ls="--")
    axes.set_yticks(range(len(rows)), [SHORT[row.metric].partition(",")[0] for row in reversed(rows)])
    axes.set(xlabel="candidate / baseline, 95% interval", xscale="log", ylim=(-0.6, len(rows) - 0.4))
    _plain_ticks(axes, [x for row in rows for x in (row.ratio.low, row.ratio.high)])
    axes.grid(visible=False)
    return _svg(figure)


def _plain_ticks(axes: Any, values: list[float]) -> None:
    """Round numbers on a logarithmic axis, those near to the values."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    low, high = min(*values, 1.0) / 1.1, max(*values, 1.0) * 1.1
    steps = [0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0]
    ticks = [x for x in steps if low <= x <= high]
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(ticks[:: max(1, len(ticks) // 6)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def in_rounds(comparison: Comparison) -> str:
    """The median inter-token latency of each round, so that a drift of the machine is seen."""
    row = comparison.row("inter_token_ms", comparison.settings["concurrency"][0])
    if not row.baseline_rounds:
        return ""
    figure, axes = _axes()
    for side in SIDES:
        values = getattr(row, f"{side}_rounds")
        axes.plot(range(1, len(values) + 1), values, color=COLOURS[side], marker="o", lw=2, label=side)
    axes.set(xlabel="round", ylabel="inter-token latency, ms (p50)", ylim=(0, None))
    axes.legend(frameon=False, loc="lower right")
    return _svg(figure)


def over_load(comparison: Comparison) -> str:
    """Median to 99th percentile of the request latency at every concurrency."""
    figure, axes = _axes()
    levels = comparison.settings["concurrency"]
    for number, side in enumerate(SIDES):
        rows = [getattr(comparison.row("latency_ms", level), side) for level in levels]
        places = [i + (number - 0.5) * 0.12 for i in range(len(levels))]
        medians = [r.p50 for r in rows]
        reach = [[0] * len(rows), [max(0.0, r.p99 - r.p50) for r in rows]]
        axes.errorbar(
            places, medians, yerr=reach, color=COLOURS[side], label=side, marker="o", capsize=4, lw=2
        )
    axes.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
    axes.set(xlabel=unit(comparison), ylabel="request latency, ms (p50 to p99)", ylim=(0, None))
    axes.legend(frameon=False, loc="lower right")
    return _svg(figure)


def what_is_left(comparison: Comparison) -> str:
    """What is left of each count, as a share of the baseline's."""
    counts = [(name, before, after) for name, before, after in removed(comparison) if before]
    if not counts:
        return ""
    figure, axes = _axes(height=0.5 * len(counts) + 0.9)
    names = [name for name, _, _ in counts][::-1]
    shares = [100 * after / before for _, before, after in counts][::-1]
    axes.barh(names, [100] * len(names), color=COLOURS["baseline"], alpha=0.35)
    bars = axes.barh(names, shares, color=COLOURS["candidate"])
    axes.bar_label(bars, [f"{share:.0f}%" for share in shares], padding=4)
    axes.set(xlabel="candidate, % of baseline", xlim=(0, max(115, *shares)))
    axes.grid(visible=False)
    return _svg(figure)
