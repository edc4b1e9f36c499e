"""Attention made smaller: dropped from layers, or with fewer KV heads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from builder.architecture import Attention, Layer
from builder.arithmetic import PoolHeads, cast
from builder.checkpoint import Change, Checkpoint, rewrite
from builder.errors import UserError
from builder.tensors import Expression


def drop_attention(checkpoint: Checkpoint, layers: Collection[int]) -> Checkpoint:
    """Remove attention and its norm from `layers`; their FFNs then read the residual stream alone.

    Raises UserError where there is none to drop.
    """
    return rewrite(checkpoint, dict.fromkeys(layers, _without_attention), "drop_attention")


def pool_kv_heads(checkpoint: Checkpoint, kv_heads: Mapping[int, int]) -> Checkpoint:
    """Give layers fewer KV heads, each the mean of neighbouring ones (GQA, arXiv 2305.13245, 2.1).

    `kv_heads` maps layers to their new number of KV heads. Raises UserError where that does not
    divide the old one, or the layer has no attention.
    """
    size = checkpoint.architecture.head_dim
    changes = {index: _pool(heads, size, checkpoint.dtype) for index, heads in kv_heads.items()}
    return rewrite(checkpoint, changes, "kv_heads")


def _without_attention(layer: Layer, part: dict[str, Expression]) -> tuple[Layer, dict[str, Expression]]:
    if layer.attention is None:
        raise UserError("has no attention; leave it out")
    left = {name: x for name, x in part.items() if not name.startswith("attention")}
    return replace(layer, attention=None), left


def _pool(heads: int, head_dim: int, dtype: str) -> Change:
    def change(layer: Layer, part: dict[str, Expression]) -> tuple[Layer, dict[str, Expression]]:
        if not isinstance(layer.attention, Attention):
            raise UserError("has no KV heads; leave it out")
        old = layer.num_key_value_heads
        if not 1 <= heads < old or old % heads:
            raise UserError(f"has {old} KV heads, which cannot become {heads}; give a smaller divisor")
        pooled = {
            name: cast(PoolHeads(x, heads, head_dim), dtype)
            for name, x in part.items()
            if name.startswith(("attention.k.", "attention.v."))
        }
        return replace(layer, attention=replace(layer.attention, num_key_value_heads=heads)), part | pooled

    return change
