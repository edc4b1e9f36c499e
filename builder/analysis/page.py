"""The report of an analysis: its directory, with one page that loads nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from builder.analysis import plots
from builder.analysis.record import Analysis
from builder.analysis.study import save
from builder.analysis.summary import inside, measured_on, sentences, span
from builder.errors import UserError
from builder.storage import output_directory

PAGE = "analysis.html"
ABOUT = {
    "dependency": "The model as it is: how much block j's contribution changes when block i is dropped. Dark "
    "squares on the diagonal are blocks that may run in parallel.",
    "dependency_dropped": "After the planned drops: a dark square is a run of FFNs that may be fused.",
    "importance": "What is lost without one attention, one FFN or one whole block.",
    "explain": "x is a block's input, f(x) its output, h(x) what it adds. Regions that fuse well are low "
    "in the first two.",
    "groups": "Each run of FFNs as it is, fused, in reversed order and gone, against the undropped parent.",
}


def check_output(directory: Path) -> None:
    """Refuse an output directory, or a machine that cannot plot, before minutes are spent on measuring."""
    if directory.exists():
        raise UserError(f"{directory}: exists; remove it or choose another output directory")
    if not directory.absolute().parent.is_dir():
        raise UserError(f"{directory.absolute().parent}: no such directory; create it first")
    plots.check()


def write(analysis: Analysis, channels: dict[int, np.ndarray], directory: Path, model: str) -> None:
    """Write analysis.json, channels.safetensors, the PNGs and analysis.html into the new directory.

    Raises UserError where the directory exists.
    """
    with output_directory(directory) as partial:
        save(analysis, channels, partial)
        images = plots.save(plots.figures(analysis), partial)
        (partial / PAGE).write_text(render(analysis, images, model), encoding="utf-8")


def render(analysis: Analysis, images: dict[str, str], model: str) -> str:
    """The page of an analysis and its SVG elements."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("builder.analysis", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        a=analysis,
        model=model,
        headline=_headline(analysis),
        sentences=sentences(analysis),
        measured=measured_on(analysis),
        images={name: Markup(element) for name, element in images.items()},
        about=ABOUT,
        outcomes={name: label for name, (label, _) in plots.OUTCOMES.items()},
        span=span,
        inside=inside,
        smaller=_smaller(analysis),
    )


def _headline(analysis: Analysis) -> str:
    """What was asked about, first."""
    if analysis.groups:
        fused = ", ".join(f"{span(g.first, g.last)} fused: KL {g.fused.kl:.4f}" for g in analysis.groups)
        return f"{fused} to the parent, {analysis.groups[0].sequential.kl:.4f} before"
    costs = [x.attention.kl for x in analysis.layers if x.attention is not None]
    if not costs:
        return f"{analysis.num_layers} layers"
    return f"{analysis.num_layers} layers: one attention less costs {min(costs):.4f} nats per token or more"


def _smaller(analysis: Analysis) -> dict[str, list[tuple[int, dict[int, float]]]]:
    """By part, each layer's KL at every size."""
    tables: dict[str, dict[int, dict[int, float]]] = {"attention": {}, "ffn": {}}
    for x in analysis.alternatives:
        tables[x.part].setdefault(x.layer, {})[x.size] = x.kl
    return {part: sorted(rows.items()) for part, rows in tables.items()}
