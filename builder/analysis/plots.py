"""Figures of an analysis, as PNG files and as SVG for its page."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from builder.analysis.record import Analysis, Matrix
from builder.errors import UserError

INK = "#808080"  # read on light and on dark, like the colours
COLOURS = {"attention": "#2f80ed", "ffn": "#e07b39", "block": "#8a8f98"}
NAMES = {"attention": "attention", "ffn": "FFN", "block": "block"}
EXPLAIN = {
    "input_output": ("cosdist(x, f(x))", "#2f80ed"),
    "ratio": ("|h(x)| / |x|", "#e07b39"),
    "input_contribution": ("cosdist(x, h(x))", "#8a8f98"),
}
OUTCOMES = {
    "sequential": ("one after the other", "#8a8f98"),
    "fused": ("fused", "#2f80ed"),
    "reversed": ("reversed order", "#3a9d8f"),
    "fused_with_last": ("fused with the last", "#9b6dd6"),
    "removed": ("removed", "#e07b39"),
}
FLOOR = 1e-6  # shown for less, on logarithmic axes
DECADES = 4  # below its largest entry a heat map is dark


def check() -> None:
    """Raise UserError where matplotlib is missing, before minutes are spent."""
    _pyplot()


def figures(analysis: Analysis) -> dict[str, Any]:
    """matplotlib figures by the name of their file."""
    model, dropped = analysis.dependency.model, analysis.dependency.dropped
    found = {"dependency": heat_map(model, model + (dropped or ()))}
    if dropped is not None:
        found["dependency_dropped"] = heat_map(dropped, model + dropped)
    found["importance"] = importance(analysis)
    found["explain"] = explain(analysis)
    if analysis.groups:
        found["groups"] = groups(analysis)
    return found


def save(found: dict[str, Any], directory: Path) -> dict[str, str]:
    """Write NAME.png of every figure; returns their SVG elements, and closes them."""
    elements = {}
    for name, figure in found.items():
        figure.savefig(directory / f"{name}.png", dpi=150, bbox_inches="tight", facecolor="white")
        elements[name] = _svg(figure, name)
        _pyplot().close(figure)
    return elements


def heat_map(matrix: Matrix, scale: Matrix | None = None) -> Any:
    """Rows are the dropped block, columns the measured one; a logarithmic scale that all of `scale` fits."""
    from matplotlib.colors import LogNorm

    values, rows = np.array(matrix), np.array(scale or matrix)
    shown = np.where(np.triu(np.ones_like(values), 1) > 0, values, np.nan)
    top = max(float(rows.max()), FLOOR * 10)
    lowest = rows[rows > 0].min() if (rows > 0).any() else FLOOR
    norm = LogNorm(vmin=min(max(lowest, top / 10**DECADES), top / 10), vmax=top, clip=True)
    figure, axes = _axes(5.4, 4.6)
    image = axes.imshow(np.clip(shown, norm.vmin, None), norm=norm, cmap="plasma", interpolation="nearest")
    axes.set(xlabel="measured block", ylabel="dropped block")
    axes.grid(visible=False)
    _whole_numbers(axes.xaxis, axes.yaxis)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.outline.set_visible(False)
    bar.set_label("cosine distance of the contribution")
    return figure


def importance(analysis: Analysis) -> Any:
    """KL and cosine distance of every dropped part."""
    figure, (above, below) = _panels(2)
    for axes, field, label in (
        (above, "kl", "KL, nats per token"),
        (below, "cosine", "cosine distance"),
    ):
        for part, colour in COLOURS.items():
            points = [(i, getattr(layer, part)) for i, layer in enumerate(analysis.layers)]
            points = [(i, max(getattr(x, field), FLOOR)) for i, x in points if x is not None]
            axes.plot(*zip(*points, strict=True), marker="o", ms=4, lw=1.6, color=colour, label=NAMES[part])
        axes.set(yscale="log", ylabel=label)
    above.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    below.set(xlabel="layer without it")
    return figure


def explain(analysis: Analysis) -> Any:
    """The three curves of explainability."""
    figure, axes = _axes(7.2, 3.2)
    for field, (label, colour) in EXPLAIN.items():
        values = [max(getattr(layer.explain, field), FLOOR) for layer in analysis.layers]
        axes.plot(values, marker="o", ms=4, lw=1.6, color=colour, label=label)
    axes.set(yscale="log", xlabel="layer")
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    _whole_numbers(axes.xaxis)
    return figure


def groups(analysis: Analysis) -> Any:
    """KL to the parent of every group's outcomes."""
    figure, axes = _axes(7.2, 0.9 + 1.1 * len(analysis.groups))
    height = 0.8 / len(OUTCOMES)
    for number, (name, (label, colour)) in enumerate(OUTCOMES.items()):
        found = [(place, getattr(group, name)) for place, group in enumerate(analysis.groups)]
        rows = [(place + number * height, max(x.kl, FLOOR)) for place, x in found if x is not None]
        if rows:
            bars = axes.barh(*zip(*rows, strict=True), height=height * 0.9, color=colour, label=label)
            axes.bar_label(bars, [f"{kl:.4f}" for _, kl in rows], padding=3, fontsize=9)
    middle = [place + 0.4 - height / 2 for place in range(len(analysis.groups))]
    axes.set_yticks(middle, [f"{g.first}-{g.last}" for g in analysis.groups])
    axes.invert_yaxis()
    axes.set(xlabel="KL to the parent, nats per token", ylabel="group")
    axes.margins(x=0.12)
    axes.grid(visible=False)
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), fontsize=9)
    return figure


def _pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError("matplotlib is missing; pip install 'ffn-fusion[report]'") from None
    matplotlib.use("svg")
    from matplotlib import pyplot

    style: dict[str, object] = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11}
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style |= dict.fromkeys(names, INK)
    pyplot.rcParams.update(style)  # type: ignore[arg-type]
    return pyplot


def _axes(width: float, height: float) -> tuple[Any, Any]:
    figure, axes = _pyplot().subplots(figsize=(width, height))
    _plain(axes)
    return figure, axes


def _panels(count: int) -> tuple[Any, Any]:
    figure, panels = _pyplot().subplots(count, 1, figsize=(7.2, 2.6 * count), sharex=True)
    for axes in panels:
        _plain(axes)
        _whole_numbers(axes.xaxis)
    return figure, panels


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=INK, alpha=0.2)


def _whole_numbers(*lines: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in lines:
        axis.set_major_locator(MaxNLocator(integer=True))


def _svg(figure: Any, name: str) -> str:
    """An SVG element whose ids, which a page of several shares, begin with the figure's name."""
    buffer = io.StringIO()
    _pyplot().rcParams["svg.hashsalt"] = name
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
