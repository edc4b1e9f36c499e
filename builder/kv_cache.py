"""The reference decoder with a KV cache, for generation in whole batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from builder.architecture import Architecture, Attention
from builder.decoder import Block, Context, Decoder, SelfAttention, rotate


class CachedAttention(SelfAttention):
    """Keeps K and V of all tokens so far: a whole prompt comes first, then one token at a time."""

    def __init__(self, architecture: Architecture, attention: Attention) -> None:
        super().__init__(architecture, attention)
        self.kept: tuple[Tensor, Tensor] | None = None  # both [B, KV heads, T, head_dim]

    def forward(self, x: Tensor, context: Context) -> Tensor:
        batch, length, _ = x.shape
        heads, kv = self.num_heads, self.num_key_value_heads
        q, k, v = self.qkv(x).view(batch, length, heads + 2 * kv, -1).split([heads, kv, kv], dim=2)
        q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        first = self.kept is None
        assert first or length == 1, "only a prompt has many tokens"
        if self.kept:
            k, v = torch.cat((self.kept[0], k), 2), torch.cat((self.kept[1], v), 2)
        self.kept = k, v
        out = F.scaled_dot_product_attention(q, k, v, is_causal=first, enable_gqa=heads > kv)
        return cast(Tensor, self.o(out.transpose(1, 2).reshape(batch, length, -1)))


def with_cache(decoder: Decoder) -> Decoder:
    """A decoder of the same weights, which are not copied, and an empty cache."""
    architecture = decoder.architecture
    with torch.device("meta"):
        cached = Decoder(architecture)
        for block, layer in zip(cast(Sequence[Block], cached.layers), architecture.layers, strict=True):
            if isinstance(layer.attention, Attention):
                block.attention = CachedAttention(architecture, layer.attention)
    cached.load_state_dict(decoder.state_dict(), strict=True, assign=True)
    cached.rope_frequencies = decoder.rope_frequencies
    return cached.eval().requires_grad_(False)
