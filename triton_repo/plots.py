"""The plots of a comparison, as SVG elements; one that has nothing to show is empty."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from triton_repo import svg
from triton_repo.compare import Comparison
from triton_repo.forest import NOTHING, forest
from triton_repo.rounds import FENCE, METRICS, SIDES
from triton_repo.words import number, primary, removed, short, unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"baseline": svg.BASELINE, "candidate": svg.CANDIDATE}
LINES = {"baseline": "--", "candidate": "-"}  # sides are told apart without colours too
MARKERS = {"baseline": "s", "candidate": "o"}


def ratios(comparison: Comparison) -> Markup:
    """Every ratio at the first level with its interval."""
    level = comparison.settings["concurrency"][0]
    rows = [comparison.row(metric, level) for metric in comparison.metrics]
    return forest("ratios", [(short(row.metric), row.ratio) for row in rows])


def lengths(comparison: Comparison) -> Markup:
    """The deciding metric's ratio for prompts and answers of other lengths."""
    metric = primary(comparison).metric
    found = [
        (f"{x.input_tokens} in, {x.output_tokens} out", x.row(metric).ratio) for x in comparison.by_shape
    ]
    return forest("lengths", found)


def distribution(comparison: Comparison) -> Markup:
    """Share of tokens that came within a time, cut at the 99.5th percentile of the slower side."""
    values = comparison.token_gap_ms
    if not values:
        return NOTHING
    shares = np.linspace(0, 1, 401)

    def draw(axes: Axes) -> None:
        for side in SIDES:
            times = np.quantile(values[side], shares)
            axes.plot(times, shares, color=COLOURS[side], ls=LINES[side], label=side, lw=2)
        end = max(float(np.percentile(x, 99.5)) for x in values.values())
        axes.set(xlim=(0, end), ylim=(0, 1.01), xlabel="time between tokens, ms", ylabel="share of tokens")
        axes.legend(loc="lower right")

    half = ", ".join(f"{number(float(np.median(values[side])))} ms of the {side}" for side in SIDES)
    return svg.drawn("distribution", f"Half of the tokens came within {half}", draw, height=2.7)


def spread(comparison: Comparison) -> Markup:
    """Violins of the time between tokens with its percentiles, and a dot for every outlier."""
    values = comparison.token_gap_ms
    if not values:
        return NOTHING
    outside = {side: _outside(np.asarray(values[side])) for side in SIDES}

    def draw(axes: Axes) -> None:
        for place, side in enumerate(SIDES):
            times, colour = np.asarray(values[side]), COLOURS[side]
            inside = times[~np.isin(times, outside[side])]
            if np.ptp(inside) > 0:
                body = axes.violinplot(
                    [inside], [place], orientation="horizontal", showextrema=False, widths=0.7
                )
                for shape in body["bodies"]:  # type: ignore[attr-defined]
                    shape.set(facecolor=colour, edgecolor="none", alpha=0.35)
            percentiles = np.percentile(times, (50, 90, 99))
            axes.plot(percentiles, [place] * 3, "|", color=colour, ms=16, mew=2)
            dots = _thinned(outside[side])
            axes.plot(dots, [place] * len(dots), MARKERS[side], mec=colour, mfc="none", ms=4, ls="none")
        axes.set_yticks(range(len(SIDES)), SIDES)
        axes.tick_params(axis="y", length=0)
        axes.set(ylim=(1.6, -0.6), xlabel="time between tokens, ms", xlim=(0, None))
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False)

    told = ", ".join(f"{len(outside[side])} of the {side}" for side in SIDES)
    return svg.drawn("spread", f"Spread of the time between tokens; outliers: {told}", draw, height=2.7)


def _violin(axes: Axes, values: np.ndarray, place: float, colour: str) -> None:
    if np.ptp(values) == 0:  # has no density
        return
    drawn = axes.violinplot([values], [place], orientation="horizontal", showextrema=False, widths=0.7)
    for body in drawn["bodies"]:  # type: ignore[attr-defined]
        body.set(facecolor=colour, edgecolor="none", alpha=0.35)


def _outside(values: np.ndarray) -> np.ndarray:
    """The outliers, as `rounds.statistics` counts them."""
    low, high = np.percentile(values, (25, 75))
    reach = FENCE * (high - low)
    found: np.ndarray = values[(values < low - reach) | (values > high + reach)]
    return found


def _thinned(values: np.ndarray) -> np.ndarray:
    """No two nearer than the eye can tell, so that a long run stays a small page."""
    if len(values) < 2:
        return values
    grid = np.round(values / values.max() * 400)
    found: np.ndarray = values[np.unique(grid, return_index=True)[1]]
    return found


def in_rounds(comparison: Comparison) -> Markup:
    """The deciding metric's median in each round, so that a drift of the machine is seen."""
    row = primary(comparison)
    if not row.baseline_rounds:
        return NOTHING
    values = {"baseline": row.baseline_rounds, "candidate": row.candidate_rounds}

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        for side, medians in values.items():
            axes.plot(range(1, len(medians) + 1), medians, label=side, **_line(side))
        axes.set(xlabel="round", ylabel=f"{METRICS[row.metric]}, ms (p50)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(y=0.25)
        axes.legend(loc="upper right", ncols=2)

    told = " and ".join(
        f"{number(min(x))} to {number(max(x))} ms of the {side}" for side, x in values.items()
    )
    return svg.drawn("in_rounds", f"Medians of the rounds, {told}", draw, height=2.7)


def _line(side: str) -> dict[str, Any]:
    return {"color": COLOURS[side], "ls": LINES[side], "marker": MARKERS[side], "lw": 2, "ms": 5}


def over_load(comparison: Comparison) -> list[Markup]:
    """Each metric at every level: medians, times with a whisker to the 99th percentile."""
    if len(comparison.settings["concurrency"]) < 2:
        return []
    return [_over_load(comparison, metric) for metric in comparison.metrics]


def _over_load(comparison: Comparison, metric: str) -> Markup:
    levels = comparison.settings["concurrency"]
    rows = [comparison.row(metric, level) for level in levels]
    timed = metric.endswith("_ms")

    def draw(axes: Axes) -> None:
        for shift, side in zip((-0.06, 0.06), SIDES, strict=True):
            found = [getattr(row, side) for row in rows]
            up = [max(0.0, x.p99 - x.p50) if timed else 0.0 for x in found]
            reach = [[0.0] * len(up), up] if timed else None
            places = [i + shift for i in range(len(levels))]
            axes.errorbar(places, [x.p50 for x in found], yerr=reach, capsize=4, label=side, **_line(side))
        axes.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
        what = f"{METRICS[metric]}{', ms' if timed else ''}"
        axes.set(xlabel=unit(comparison), title=what, ylim=(0, None))
        axes.margins(y=0.2)
        axes.legend(loc="best")

    told = "; ".join(
        f"at {row.concurrency:g}, {number(row.baseline.p50)} against {number(row.candidate.p50)}"
        for row in rows
    )
    return svg.drawn(f"load-{metric}", f"{METRICS[metric]}, medians: {told}", draw, height=2.7)


def trade(comparison: Comparison) -> Markup:
    """What all clients get, against what one waits for: a point a level."""
    levels, metrics = comparison.settings["concurrency"], ("inter_token_ms", "tokens_per_s")
    if len(levels) < 2 or not set(metrics) <= set(comparison.metrics):
        return NOTHING
    points = {
        side: [[getattr(comparison.row(metric, level), side).p50 for level in levels] for metric in metrics]
        for side in SIDES
    }

    def draw(axes: Axes) -> None:
        for side, (waits, rates) in points.items():
            axes.plot(waits, rates, label=side, **_line(side))
            for level, wait, rate in zip(levels, waits, rates, strict=True):
                axes.annotate(f"{level:g}", (wait, rate), (6, -12), textcoords="offset points", fontsize=9)
        axes.set(title="tokens/s of all", xlabel="inter-token latency, ms (p50)", ylim=(0, None))
        axes.margins(0.15)
        axes.legend(loc="lower right")

    label = f"Tokens/s of all over inter-token latency, a point for each number of {unit(comparison)}"
    return svg.drawn("trade", label, draw, height=2.7)


def what_is_left(comparison: Comparison) -> Markup:
    """What is left of each count, as a share of the baseline's."""
    counts = [(name, 100 * after / before) for name, before, after in removed(comparison) if before]
    if not counts:
        return NOTHING

    def draw(axes: Axes) -> None:
        names, shares = [name for name, _ in counts], [share for _, share in counts]
        axes.barh(names, [100] * len(names), color=svg.BASELINE, alpha=0.3)
        bars = axes.barh(names, shares, color=svg.CANDIDATE)
        axes.bar_label(bars, [f"{share:.0f}%" for share in shares], padding=4)
        axes.set(xlabel="candidate, % of baseline", xlim=(0, max(118, *shares)))
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.grid(visible=False)

    told = ", ".join(f"{name} {share:.0f}%" for name, share in counts)
    return svg.drawn("left", f"Candidate in % of the baseline: {told}", draw, height=0.32 * len(counts) + 0.7)


PLOTS: dict[str, Callable[[Comparison], Markup]] = {
    "ratios": ratios,
    "spread": spread,
    "distribution": distribution,
    "in_rounds": in_rounds,
    "trade": trade,
    "lengths": lengths,
    "what_is_left": what_is_left,
}
