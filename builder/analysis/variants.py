"""Changes of a model, each from one layer on: a part dropped or made smaller, a run of FFNs fused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from builder.analysis.statistics import best_channels
from builder.analysis.sums import Key
from builder.analysis.trunk import Passage, Trunk, attend, feed
from builder.architecture import FFN, Architecture, Attention, Layer
from builder.checkpoint import Checkpoint
from builder.decoder import Block, Context, load_block
from builder.surgery.attention import pool_kv_heads
from builder.surgery.ffn import narrow_ffn
from builder.surgery.fusion import Group

# The hidden states after the change, of each batch that reached the layer.
Start = Callable[[Block, Sequence[Passage], Context], list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model that differs from its trunk in layers `first` to `resume` - 1.

    `start` is called at layer `first` with the trunk's block and its passages there.
    """

    key: Key
    kind: str  # what its block evaluations are counted as
    first: int
    resume: int
    start: Start

    @property
    def drops_block(self) -> bool:
        """Whether it is a row of the dependency matrix."""
        return self.key[0] == "block"


def dropped_blocks(architecture: Architecture) -> list[Variant]:
    """Every layer gone, one at a time; empty ones are gone already."""
    return [
        _variant(("block", i), "dependency", lambda block, points, context: [p.x for p in points])
        for i, layer in enumerate(architecture.layers)
        if not layer.empty
    ]


def dropped_parts(architecture: Architecture) -> list[Variant]:
    """Every attention and every FFN gone, one at a time, where the layer has both."""
    variants = []
    for i, layer in enumerate(architecture.layers):
        if whole(layer):
            variants.append(_variant(("attention", i), "importance", _without_attention))
            variants.append(_variant(("ffn", i), "importance", _without_ffn))
    return variants


def smaller_parts(
    checkpoint: Checkpoint, channels: Mapping[int, np.ndarray], shares: Sequence[float]
) -> list[Variant]:
    """Every attention with fewer KV heads, every FFN with a share of its channels, the best ones."""
    variants = []
    for i, layer in enumerate(checkpoint.architecture.layers):
        for heads in fewer_kv_heads(layer):
            start = partial(_start_pooled, checkpoint, i, heads)
            variants.append(_variant(("kv_heads", i, heads), "alternatives", start))
        for width in narrower_widths(layer, shares):
            start = partial(_start_narrow, checkpoint, i, best_channels(channels[i], width))
            variants.append(_variant(("width", i, width), "alternatives", start))
    return variants


def group_variants(trunk: Trunk, group: Group) -> list[Variant]:
    """The run fused, in reversed order, gone, and fused with the FFN that follows it."""
    first, last = group
    members = [i for i in range(first, last + 1) if not trunk.layers[i].empty]
    starts: dict[str, tuple[int, Start]] = {
        "fused": (last + 1, partial(_start_fused, trunk, members)),
        "reversed": (last + 1, partial(_start_reversed, trunk, members)),
        "removed": (last + 1, lambda block, points, context: [p.x for p in points]),
    }
    following = following_ffn(trunk.checkpoint.architecture, last)
    if following is not None:
        starts["fused_with_last"] = (following + 1, partial(_start_fused, trunk, [*members, following]))
    return [
        Variant(key=(name, first, last), kind="groups", first=first, resume=resume, start=start)
        for name, (resume, start) in starts.items()
    ]


def whole(layer: Layer) -> bool:
    """Whether a layer has both halves."""
    return layer.attention is not None and layer.ffn is not None


def fewer_kv_heads(layer: Layer) -> list[int]:
    """Smaller divisors by powers of two: 4, 2, 1 for 8; nothing where there are no KV heads."""
    heads, sizes = layer.num_key_value_heads, []
    while isinstance(layer.attention, Attention) and heads % 2 == 0:
        heads //= 2
        sizes.append(heads)
    return sizes


def narrower_widths(layer: Layer, shares: Sequence[float]) -> list[int]:
    """These shares of the width, rounded; those that would be the width itself, or nothing, are left out."""
    if not isinstance(layer.ffn, FFN):
        return []
    widths = dict.fromkeys(round(layer.intermediate_size * share) for share in shares)
    return [width for width in widths if 0 < width < layer.intermediate_size]


def following_ffn(architecture: Architecture, last: int) -> int | None:
    """The next FFN of the attention-free run that `last` is in."""
    for first, end in architecture.attention_free_runs():
        if first <= last < end:
            return next(i for i in range(last + 1, end + 1) if not architecture.layers[i].empty)
    return None


def _variant(key: Key, kind: str, start: Start) -> Variant:
    layer = int(key[1])
    return Variant(key=key, kind=kind, first=layer, resume=layer + 1, start=start)


def _without_attention(block: Block, points: Sequence[Passage], context: Context) -> list[Tensor]:
    return [p.x + feed(block, p.x) for p in points]


def _without_ffn(block: Block, points: Sequence[Passage], context: Context) -> list[Tensor]:
    return [p.between for p in points]


def _start_pooled(
    checkpoint: Checkpoint,
    layer: int,
    heads: int,
    block: Block,
    points: Sequence[Passage],
    context: Context,
) -> list[Tensor]:
    pooled = _load(pool_kv_heads(checkpoint, {layer: heads}), layer)
    attended = [p.x + attend(pooled, p.x, context) for p in points]
    return [x + feed(block, x) for x in attended] if block.ffn is not None else attended


def _start_narrow(
    checkpoint: Checkpoint,
    layer: int,
    channels: tuple[int, ...],
    block: Block,
    points: Sequence[Passage],
    context: Context,
) -> list[Tensor]:
    narrow = _load(narrow_ffn(checkpoint, {layer: channels}), layer)
    return [p.between + feed(narrow, p.between) for p in points]


def _load(changed: Checkpoint, layer: int) -> Block:
    return load_block(changed.architecture, layer, changed.decoder_tensors())


def _start_fused(
    trunk: Trunk, members: Sequence[int], block: Block, points: Sequence[Passage], context: Context
) -> list[Tensor]:
    """y = x + sum of FFN_j(n_j(x)), the sum in float32 as one wide product would have it."""
    sums = [torch.zeros_like(p.x, dtype=torch.promote_types(p.x.dtype, torch.float32)) for p in points]
    for index in members:
        member = trunk.block(index)
        for total, point in zip(sums, points, strict=True):
            total += feed(member, point.x)
    return [p.x + total.to(p.x.dtype) for p, total in zip(points, sums, strict=True)]


def _start_reversed(
    trunk: Trunk, members: Sequence[int], block: Block, points: Sequence[Passage], context: Context
) -> list[Tensor]:
    states = [p.x for p in points]
    for index in reversed(members):
        member = trunk.block(index)
        states = [x + feed(member, x) for x in states]
    return states
