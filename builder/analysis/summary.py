"""What an analysis says, in sentences: what may be dropped and fused, and why."""

from __future__ import annotations

import numpy as np

from builder.analysis.record import Analysis, GroupAnalysis
from builder.plan import format_numbers

PARTS = {"attention": "attention", "ffn": "FFN"}


def sentences(analysis: Analysis) -> list[str]:
    """From the most to the least important; every figure is in the record."""
    told = [_cheapest(analysis, part) for part in PARTS]
    told += [_group(analysis, group) for group in analysis.groups]
    told += [_needed(analysis), _windows(analysis)]
    return [sentence for sentence in told if sentence]


def measured_on(analysis: Analysis) -> str:
    """The text and the parent's perplexity on it."""
    data = analysis.data
    return (
        f"Perplexity {analysis.baseline.perplexity:.2f} on {data.tokens:,} tokens: {data.samples} samples of "
        f"{data.length}, seed {data.seed}."
    )


def span(first: int, last: int) -> str:
    """`6-12`."""
    return f"{first}-{last}"


def inside(analysis: Analysis, first: int, last: int) -> float:
    """The largest dependency between layers `first` to `last`, after the planned drops."""
    matrix = np.array(analysis.dependency.dropped or analysis.dependency.model)
    return float(matrix[first : last + 1, first : last + 1].max())


def _cheapest(analysis: Analysis, part: str) -> str:
    """The quarter of the layers whose part costs least to drop."""
    found = [(getattr(layer, part), i) for i, layer in enumerate(analysis.layers)]
    costs = sorted((importance.kl, i) for importance, i in found if importance is not None)
    if not costs:
        return ""
    (low, _), (high, dearest) = costs[0], costs[-1]
    cheap = costs[: max(1, len(costs) // 4)]
    layers = format_numbers(tuple(sorted(i for _, i in cheap)))
    return (
        f"Dropping one {PARTS[part]} costs {low:.4f} to {high:.4f} nats per token; cheapest in "
        f"{'layers' if len(cheap) > 1 else 'layer'} {layers} (at most {cheap[-1][0]:.4f}), dearest in layer "
        f"{dearest}."
    )


def _group(analysis: Analysis, group: GroupAnalysis) -> str:
    base = group.sequential.kl
    fused, removed, turned = (x.kl - base for x in (group.fused, group.removed, group.reversed))
    text = (
        f"Fusing {span(group.first, group.last)} costs {fused:+.4f} nats per token over the {base:.4f} "
        f"before, removing those FFNs {removed:+.4f}, running them in reversed order {turned:+.4f}: "
    )
    text += "fuse them" if fused < removed else "removing them costs no more"
    if group.fused_with_last is None:
        return text + "."
    added = group.fused_with_last.kl - base
    return text + f". With the run's last FFN fused too it is {added:+.4f}."


def _needed(analysis: Analysis) -> str:
    """The blocks whose loss changes the later ones most."""
    matrix = np.array(analysis.dependency.model)
    size = len(matrix)
    if size < 3:
        return ""
    means = np.array([matrix[i, i + 1 :].mean() for i in range(size - 1)])
    most = sorted(np.argsort(-means, kind="stable")[:2].tolist())
    above = matrix[np.triu_indices(size, 1)]
    text = (
        f"The later blocks depend most on blocks {most[0]} and {most[1]} (means {means[most[0]]:.3f} and "
        f"{means[most[1]]:.3f}, median of all pairs {np.median(above):.3f})."
    )
    inner = [f"{inside(analysis, g.first, g.last):.3f} in {span(g.first, g.last)}" for g in analysis.groups]
    return text + (f" The largest dependency is {', '.join(inner)}." if inner else "")


def _windows(analysis: Analysis) -> str:
    if not analysis.windows:
        return ""
    best = analysis.windows[0]
    return (
        f"Of windows of whole blocks, {span(best.first, best.last)} is the least dependent (largest entry "
        f"{best.max:.3f}): the first to run in parallel."
    )
