"""What each layer can become, and what is known of its cost in quality.

Scores are those of Puzzle (arXiv 2411.19146): KL(parent || child) with that one block replaced, in nats
per token, and they are added. A layer that is fused does not read what the members before it add.
Its own contribution h then changes: by a relative sqrt(2 M[i][l]) for each member i, to second order, M
being the cosine distance of h with and without block i. The changes point much the same way, so they are
added, and a KL grows with the square of a change: fusing layer l after members a .. l-1 scores

    scale * (KL of losing l's FFN) * 2 (sum over i of sqrt(M[i][l]))^2

at most the KL of losing it. `scale` is 1, or what makes the scores of the analysis's own fused groups add
up to what was measured of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from builder.architecture import FFN, Architecture, Attention, Layer, Linear
from builder.errors import UserError
from builder.plan import Plan
from builder.surgery.fusion import Group

if TYPE_CHECKING:
    from builder.analysis.record import Analysis

AttentionPart = Attention | Linear | None
FFNPart = FFN | Linear | None
P = TypeVar("P", AttentionPart, FFNPart)
Key = tuple[int, str, int]  # layer, "attention" or "ffn", KV heads or width that are left


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Quality costs in nats per token; nothing is known of what is not there."""

    alternatives: Mapping[Key, float] = field(default_factory=dict)
    # layer -> fusing it with the one before it, and what each further one before that costs more
    fusing: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    dependency: Sequence[Sequence[float]] | None = None  # M, rows the dropped block
    channels: Mapping[int, np.ndarray] = field(default_factory=dict)  # layer -> importance, [width]

    @classmethod
    def of(cls, analysis: Analysis, channels: Mapping[int, np.ndarray]) -> Scores:
        """The scores of an analysis; KL below zero, which is rounding, counts as none."""
        known: dict[Key, float] = {}
        for index, layer in enumerate(analysis.layers):
            for name in ("attention", "ffn"):
                importance = getattr(layer, name)
                if importance is not None:
                    known[index, name, 0] = max(0.0, importance.kl)
        known |= {(x.layer, x.part, x.size): max(0.0, x.kl) for x in analysis.alternatives}
        return cls(
            alternatives=known,
            fusing=_fusing(analysis, known),
            dependency=analysis.dependency.dropped or analysis.dependency.model,
            channels=channels,
        )

    def kept_channels(self, layer: int, width: int) -> tuple[int, ...]:
        """The `width` most important channels of a layer's FFN, ascending; ties go to the first."""
        order = np.argsort(-self.channels[layer], kind="stable")
        return tuple(sorted(map(int, order[:width])))


def _fusing(analysis: Analysis, known: Mapping[Key, float]) -> dict[int, tuple[float, ...]]:
    matrix = analysis.dependency.dropped or analysis.dependency.model
    scores = {
        layer: _further(known[layer, "ffn", 0], [matrix[i][layer] for i in range(layer - 1, -1, -1)])
        for layer in range(1, analysis.num_layers)
        if (layer, "ffn", 0) in known
    }
    predicted = measured = 0.0
    for group in analysis.groups:
        members = range(group.first + 1, group.last + 1)
        predicted += sum(sum(scores.get(layer, ())[: layer - group.first]) for layer in members)
        measured += max(0.0, group.fused.kl - group.sequential.kl)
    scale = measured / predicted if predicted else 1.0
    return {layer: tuple(scale * x for x in further) for layer, further in scores.items()}


def _further(lost: float, distances: Sequence[float]) -> tuple[float, ...]:
    """What each member before a layer adds to its score, the nearest first."""
    changes = np.cumsum(np.sqrt(np.maximum(distances, 0.0)))
    totals = lost * np.minimum(1.0, 2 * changes**2)
    return tuple(map(float, np.diff(totals, prepend=0.0)))


@dataclass(frozen=True, kw_only=True)
class Option(Generic[P]):
    """One thing that an attention or an FFN can be. `kl` is None where nobody measured it."""

    part: P
    kl: float | None = 0.0
    changed: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """At least one option each."""

    attention: tuple[Option[AttentionPart], ...]
    ffn: tuple[Option[FFNPart], ...]


@dataclass(frozen=True, kw_only=True)
class Pins:
    """What is decided by hand: layers that stay as they are, and the choices of a plan.

    A plan that names groups has them as they are; runs it does not name are the search's.
    """

    keep_attention: frozenset[int] = frozenset()
    keep_ffn: frozenset[int] = frozenset()
    plan: Plan = field(default_factory=Plan)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups that are decided, from the first FFN that is left in each to the last."""
        groups = []
        for first, last in sorted(self.plan.fuse or ()):
            members = [i for i in range(first, last + 1) if i not in self.plan.drop_ffn]
            groups.append((members[0], members[-1]))
        return tuple(groups)


@dataclass(frozen=True, kw_only=True)
class Space:
    """Everything that can be chosen; `fusing` is by layer what `Scores` has, None where nothing is known."""

    architecture: Architecture
    layers: tuple[LayerOptions, ...]
    fusing: tuple[tuple[float, ...] | None, ...]
    groups: tuple[Group, ...] = ()  # decided by hand
    max_width: int  # of a fused FFN, over all ranks

    def with_parts(self, attention: tuple[int, ...], ffn: tuple[int, ...]) -> Architecture:
        """The architecture with these options chosen, before anything is fused."""
        layers = tuple(
            replace(layer, attention=options.attention[a].part, ffn=options.ffn[f].part)
            for layer, options, a, f in zip(
                self.architecture.layers, self.layers, attention, ffn, strict=True
            )
        )
        return replace(self.architecture, layers=layers)


def space(
    architecture: Architecture, scores: Scores | None, pins: Pins, max_width: int, tp_size: int = 1
) -> Space:
    """The alternatives that `scores` knows, less what `pins` decides. None offers no alternative.

    Widths that `tp_size` does not divide are left out. Raises UserError for a pin that does not fit.
    """
    _check(architecture, pins)
    known = scores or Scores()
    layers = tuple(
        LayerOptions(
            attention=_attention_options(index, layer, known, pins),
            ffn=_ffn_options(index, layer, known, pins, tp_size),
        )
        for index, layer in enumerate(architecture.layers)
    )
    return Space(
        architecture=architecture,
        layers=_with_groups(layers, pins.groups, max_width),
        fusing=tuple(known.fusing.get(index) for index in range(len(layers))),
        groups=pins.groups,
        max_width=max_width,
    )


def _attention_options(
    index: int, layer: Layer, scores: Scores, pins: Pins
) -> tuple[Option[AttentionPart], ...]:
    whole = layer.attention
    if whole is None:
        return (Option(part=None),)
    if index in pins.plan.drop_attention:
        return (_option(index, "attention", None, scores),)
    keep = Option(part=whole)
    heads = dict(pins.plan.kv_heads).get(index)
    if isinstance(whole, Attention) and heads is not None:
        return (_option(index, "attention", replace(whole, num_key_value_heads=heads), scores),)
    if index in pins.keep_attention:
        return (keep,)
    parts: list[AttentionPart] = []
    for size in _sizes(index, "attention", scores):
        if size == 0:
            parts.append(None)
        elif isinstance(whole, Attention) and size < whole.num_key_value_heads:
            parts.append(replace(whole, num_key_value_heads=size))
    return (keep, *(_option(index, "attention", part, scores) for part in parts))


def _ffn_options(
    index: int, layer: Layer, scores: Scores, pins: Pins, tp_size: int
) -> tuple[Option[FFNPart], ...]:
    whole = layer.ffn
    if whole is None:
        return (Option(part=None),)
    if index in pins.plan.drop_ffn:
        return (_option(index, "ffn", None, scores),)
    channels = dict(pins.plan.ffn_channels).get(index)
    if channels is not None:
        return (_option(index, "ffn", FFN(intermediate_size=len(set(channels))), scores),)
    keep = Option(part=whole)
    if index in pins.keep_ffn:
        return (keep,)
    parts: list[FFNPart] = []
    for size in _sizes(index, "ffn", scores):
        if size == 0:
            parts.append(None)
        elif size < layer.intermediate_size and size % tp_size == 0 and index in scores.channels:
            parts.append(FFN(intermediate_size=size))
    return (keep, *(_option(index, "ffn", part, scores) for part in parts))


def _sizes(index: int, name: str, scores: Scores) -> list[int]:
    """The sizes that have a score, the largest first."""
    return sorted(
        (s for layer, part, s in scores.alternatives if (layer, part) == (index, name)), reverse=True
    )


def _option(index: int, name: str, part: P, scores: Scores) -> Option[P]:
    size = part_size(part)
    return Option(part=part, kl=scores.alternatives.get((index, name, size)), changed=True)


def part_size(part: AttentionPart | FFNPart) -> int:
    """KV heads or width, as an analysis names an alternative; 0 where nothing is left."""
    if isinstance(part, Attention):
        return part.num_key_value_heads
    return part.intermediate_size if isinstance(part, FFN) else 0


def _with_groups(
    layers: tuple[LayerOptions, ...], groups: tuple[Group, ...], max_width: int
) -> tuple[LayerOptions, ...]:
    """Groups decided by hand take the attention away and keep the FFNs they hold."""
    changed = list(layers)
    for first, last in groups:
        for index in range(first, last + 1):
            free = tuple(x for x in layers[index].attention if x.part is None)
            if not free:
                raise UserError(
                    f"fuse: group {first}-{last} crosses layer {index}, which keeps its attention; give "
                    f"--drop-attention {index} or split the group"
                )
            ffns = tuple(x for x in layers[index].ffn if isinstance(x.part, FFN))
            changed[index] = LayerOptions(attention=free, ffn=ffns or layers[index].ffn)
            if any(isinstance(x.part, Linear) for x in changed[index].ffn):
                raise UserError(
                    f"fuse: group {first}-{last} crosses layer {index}, whose FFN is a matrix; split it"
                )
        width = sum(min(part_size(x.part) for x in y.ffn) for y in changed[first : last + 1])
        if width > max_width:
            raise UserError(
                f"fuse: group {first}-{last} is {width:,} wide, {max_width:,} is the most for one weight of "
                "TensorRT and for --profile; split it"
            )
    return tuple(changed)


def _check(architecture: Architecture, pins: Pins) -> None:
    plan, layers = pins.plan, architecture.layers
    named: dict[str, Collection[int]] = {
        "keep_attention": pins.keep_attention,
        "keep_ffn": pins.keep_ffn,
        "drop_attention": plan.drop_attention,
        "drop_ffn": plan.drop_ffn,
        "kv_heads": dict(plan.kv_heads),
        "ffn_channels": dict(plan.ffn_channels),
    }
    for key, indices in named.items():
        part = "ffn" if "ffn" in key else "attention"
        for index in sorted(indices):
            if not 0 <= index < len(layers):
                raise UserError(f"{key}: layer {index} does not exist; the model has 0-{len(layers) - 1}")
            if getattr(layers[index], part) is None and not key.startswith("keep"):
                raise UserError(f"{key}: layer {index} has no {_TITLES[part]}; leave it out")
    _check_groups(pins, len(layers))
    for part in ("attention", "ffn"):
        changed = {index for key in named if part in key and "keep" not in key for index in named[key]}
        both = sorted(changed & set(named[f"keep_{part}"]))
        if both:
            raise UserError(f"keep_{part}: layer {both[0]} is changed by hand as well; name it once")


def _check_groups(pins: Pins, num_layers: int) -> None:
    previous = -1
    for first, last in sorted(pins.plan.fuse or ()):
        if not 0 <= first < last < num_layers:
            raise UserError(
                f"fuse: group {first}-{last} is no run of two or more of the layers 0-{num_layers - 1}"
            )
        if first <= previous:
            raise UserError(f"fuse: group {first}-{last} overlaps another; layers belong to one group")
        if not any(i not in pins.plan.drop_ffn for i in range(first, last)):
            raise UserError(f"fuse: group {first}-{last} has fewer than two FFNs; leave it out")
        previous = last


_TITLES = {"attention": "attention", "ffn": "FFN"}
