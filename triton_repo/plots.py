"""The figures of the report, as SVG that takes its colours from the page's style sheet."""

from __future__ import annotations

import html
import io
import re
from typing import TYPE_CHECKING

import numpy as np

from builder.errors import UserError
from triton_repo.compare import SIDES, Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What matplotlib draws with, and what the page makes of it: light and dark come from CSS.
COLOURS = {"baseline": "#8a8f98", "candidate": "#2f80ed"}
INK = "#808080"
CSS = {COLOURS["baseline"]: "var(--baseline)", COLOURS["candidate"]: "var(--candidate)", INK: "currentColor"}
WIDTH = 4.8  # inches; small, so that text stays readable on a phone
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    "font.size": 11,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}
SHORT = {
    "ttft_ms": "first token",
    "inter_token_ms": "inter-token",
    "latency_ms": "request",
    "tokens_per_s": "tokens/s",
}
MARKERS = ("o", "s", "D", "^", "v", "P", "X")


def require() -> None:
    """Raise UserError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("matplotlib is missing; pip install 'ffn-fusion[report]'") from None


def distribution(comparison: Comparison) -> str:
    """Share of tokens that came within a time, cut at the 99.5th percentile of the slower side."""
    figure, axes = _axes(3.0)
    limit = max(np.percentile(values, 99.5) for values in comparison.inter_token_ms.values())
    for side in SIDES:
        times, shares = steps(comparison.inter_token_ms[side])
        axes.step(times, shares, where="post", color=COLOURS[side], label=side, lw=2)
    axes.set(xlim=(0, limit), ylim=(0, 1.01), xlabel="inter-token latency, ms", ylabel="share of tokens")
    axes.legend(frameon=False, loc="lower right")
    return _svg(figure, "distribution", "Share of tokens within a time, of both sides")


def steps(values: list[float], points: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """The empirical distribution at no more than `points` values, so that the page stays small."""
    ordered = np.sort(values)
    picked = np.unique(np.linspace(0, len(ordered) - 1, min(points, len(ordered))).round().astype(int))
    return ordered[picked], (picked + 1) / len(ordered)


def concurrency(comparison: Comparison) -> str:
    """Median request latency at every concurrency, whiskers to the 99th percentile."""
    figure, axes = _axes(3.0)
    levels = comparison.settings["concurrency"]
    for number, side in enumerate(SIDES):
        rows = [getattr(comparison.row("latency_ms", level), side) for level in levels]
        places = [i + (number - 0.5) * 0.14 for i in range(len(levels))]
        reach = [[0.0] * len(rows), [max(0.0, r.p99 - r.p50) for r in rows]]
        medians = [r.p50 for r in rows]
        axes.errorbar(
            places, medians, yerr=reach, color=COLOURS[side], label=side, marker="o", capsize=4, lw=2
        )
    axes.set_xticks(range(len(levels)), [str(level) for level in levels])
    axes.set(xlabel="clients at once", ylabel="request latency, ms", ylim=(0, None))
    axes.legend(frameon=False, loc="upper left")
    axes.margins(x=0.12)
    return _svg(figure, "concurrency", "Request latency of both sides over concurrency")


def intervals(comparison: Comparison) -> str:
    """The speedup of every metric at every concurrency with its interval; 1 is no difference."""
    levels = comparison.settings["concurrency"]
    figure, axes = _axes(0.26 * len(SHORT) * (len(levels) + 1) + 0.9)
    labels = []
    for group, metric in enumerate(SHORT):
        for number, level in enumerate(levels):
            speedup = comparison.row(metric, level).speedup
            place = -(group * (len(levels) + 1) + number)
            axes.plot([speedup.low, speedup.high], [place, place], color=COLOURS["candidate"], lw=2)
            marker = MARKERS[number % len(MARKERS)]
            axes.plot(speedup.value, place, marker, color=COLOURS["candidate"], ms=6)
            labels.append((place, f"{SHORT[metric]}, {level}" if number == 0 else str(level)))
    axes.axvline(1, color=INK, lw=1, ls="--")
    axes.set_yticks([place for place, _ in labels], [text for _, text in labels])
    axes.set(xlabel="times faster than the baseline")
    axes.grid(visible=False)
    axes.grid(axis="x", color=INK, alpha=0.2)
    return _svg(figure, "intervals", "Speedup of every metric with its 95% interval")


def shares(removed: list[tuple[str, int, int]]) -> str:
    """What is left of each count (name, baseline, candidate) as a share of the baseline's."""
    shown = [(name, 100 * after / before) for name, before, after in removed if before][::-1]
    if not shown:
        return ""
    figure, axes = _axes(0.42 * len(shown) + 0.8)
    names, values = [name for name, _ in shown], [value for _, value in shown]
    axes.barh(names, [100] * len(names), color=COLOURS["baseline"], alpha=0.3)
    bars = axes.barh(names, values, color=COLOURS["candidate"])
    axes.bar_label(bars, [f"{value:.0f}%" for value in values], padding=4)
    axes.set(xlabel="candidate, % of baseline", xlim=(0, max(118, *(1.18 * value for value in values))))
    axes.grid(visible=False)
    return _svg(figure, "shares", "Counts of the candidate as a share of the baseline's")


def _axes(height: float) -> tuple[Figure, Axes]:
    require()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=INK, alpha=0.2)
    return figure, axes


def _svg(figure: Figure, name: str, label: str) -> str:
    """The <svg> element: named for screen readers, ids unlike those of other figures, CSS colours."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for drawn, css in CSS.items():
        text = text.replace(drawn, css)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
