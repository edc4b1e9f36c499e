"""What a decoder asks of its device: products and attention. The CPU's are the kernels of `kernels.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.embedded import kernels  # noqa: F401  defines the operators


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Angles of the tokens of one pass, float32 [B, head_dim / 2]."""

    cos: Tensor
    sin: Tensor


class Operators(Protocol):
    """B rows of x at a time; `scale` is that of each row of a quantised weight, float32 [rows]."""

    def linear(
        self, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, logits: bool
    ) -> Tensor:
        """x [B, columns] times a weight [rows, columns], transposed: [B, rows], float32 for `logits`."""

    def swiglu(
        self, x: Tensor, gate: Tensor, up: Tensor, gate_scale: Tensor | None, up_scale: Tensor | None
    ) -> Tensor:
        """silu(gate x) * up x, [B, rows]."""

    def decode_attention(
        self,
        qkv: Tensor,
        rotation: Rotation,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        positions: Tensor,
        heads: int,
    ) -> Tensor:
        """Keep the token of each of B requests at `positions` and mix all its tokens: [B, heads * head_dim].

        Row b of `tables` [B, W] names the blocks of `keys` and `values` that request b has.
        """

    def prompt_attention(
        self, qkv: Tensor, rotation: Rotation, keys: Tensor, values: Tensor, table: Tensor, heads: int
    ) -> Tensor:
        """Keep the T tokens of a prompt in the blocks `table` and mix them: [T, heads * head_dim]."""


@dataclass(frozen=True)
class CPUKernels:
    """The compiled kernels. `tiles` asks for those made for batches of more than SMALL_BATCH."""

    tiles: bool

    def linear(
        self, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, logits: bool
    ) -> Tensor:
        return torch.ops.ffn_fusion.engine_linear(x, weight, scale, bias, self.tiles, logits)

    def swiglu(
        self, x: Tensor, gate: Tensor, up: Tensor, gate_scale: Tensor | None, up_scale: Tensor | None
    ) -> Tensor:
        return torch.ops.ffn_fusion.engine_swiglu(x, gate, up, gate_scale, up_scale, self.tiles)

    def decode_attention(
        self,
        qkv: Tensor,
        rotation: Rotation,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        positions: Tensor,
        heads: int,
    ) -> Tensor:
        return torch.ops.ffn_fusion.engine_attention(
            qkv, rotation.cos, rotation.sin, keys, values, tables, positions, heads
        )

    def prompt_attention(
        self, qkv: Tensor, rotation: Rotation, keys: Tensor, values: Tensor, table: Tensor, heads: int
    ) -> Tensor:
        kv = keys.shape[1]
        stored = torch.ops.ffn_fusion.engine_store_prompt(
            qkv, rotation.cos, rotation.sin, keys, values, table, heads
        )
        return causal(*stored.split([heads, kv, kv]))


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each of T tokens over those up to it: [T, heads * head_dim].

    q is [heads, T, head_dim], k and v are [kv, T, head_dim].
    """
    grouped = q.shape[0] > k.shape[0]
    q, k, v = (part.unsqueeze(0) for part in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return mixed.squeeze(0).transpose(0, 1).reshape(q.shape[2], -1)
