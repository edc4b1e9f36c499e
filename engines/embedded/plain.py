"""The operators in plain torch: what the engine compiles for CUDA. They run on any device.

Numbers are summed in float32. Attention of a decode step is written as products and sums over the blocks
it gathers, not as matrix products: Inductor makes one kernel of the gather and the sum, so that K and V
are read where they lie and not copied first. `vector` is for a batch that is always 1: a product is then a
sum over rows too, which Inductor makes for it itself under `coordinate_descent_tuning`
(torch/_inductor/decomposition.py, `mm`), and 8-bit weights are widened as they are read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from builder.decoder import rotate
from builder.fp8 import FP8_MAX
from engines.embedded.operators import Rotation, causal
from engines.embedded.step import BLOCK_SIZE


@dataclass(frozen=True)
class Plain:
    """See the head of this file; 8-bit weights are e4m3 with a float32 scale a row."""

    vector: bool = False

    def linear(
        self, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, logits: bool
    ) -> Tensor:
        if self.vector:
            out = vector_product(x, weight, scale)
            out = out if bias is None else out + bias.float()
        elif scale is None:
            out = F.linear(x, weight, bias)
        else:
            out = scaled_product(x, weight, scale)
            out = out if bias is None else out + bias
        return out.float() if logits else out.to(x.dtype)

    def swiglu(
        self, x: Tensor, gate: Tensor, up: Tensor, gate_scale: Tensor | None, up_scale: Tensor | None
    ) -> Tensor:
        if self.vector:
            return (F.silu(vector_product(x, gate, gate_scale)) * vector_product(x, up, up_scale)).to(x.dtype)
        gated, raised = (
            self.linear(x, gate, gate_scale, None, False),
            self.linear(x, up, up_scale, None, False),
        )
        return (F.silu(gated.float()) * raised.float()).to(x.dtype)

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
        q, k, v = _rotated(qkv, rotation, heads, keys.shape[1])
        block = tables.gather(1, (positions // BLOCK_SIZE).unsqueeze(1)).squeeze(1)
        _keep(keys, values, k, v, block, positions % BLOCK_SIZE)
        return paged(q, keys, values, tables, positions).to(qkv.dtype)

    def prompt_attention(
        self, qkv: Tensor, rotation: Rotation, keys: Tensor, values: Tensor, table: Tensor, heads: int
    ) -> Tensor:
        q, k, v = _rotated(qkv, rotation, heads, keys.shape[1])
        positions = torch.arange(qkv.shape[0], device=qkv.device)
        _keep(keys, values, k, v, table.gather(0, positions // BLOCK_SIZE), positions % BLOCK_SIZE)
        return causal(*(part.transpose(0, 1) for part in (q, k, v)))


def _keep(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, block: Tensor, offset: Tensor) -> None:
    """Write k and v [T, kv, head_dim] at places `offset` [T] of the blocks `block` [T]."""
    # Written as what keys[block, :, :, offset] = k means, which a torch without CUDA cannot trace for CUDA.
    torch.ops.aten.index_put_(keys, [block, None, None, offset], k)
    torch.ops.aten.index_put_(values, [block, None, offset], v)


def vector_product(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """One row x [1, columns] times a weight [rows, columns], transposed: float32 [1, rows]."""
    out = (weight.float() * x.float()).sum(-1)
    return (out if scale is None else out * scale).unsqueeze(0)


def scaled_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x in e4m3 with a scale a row, times such a weight, transposed; Hopper's row-wise product.

    Other devices than CUDA multiply the same numbers in float32.
    """
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    x_scale = largest / FP8_MAX  # [B, 1]
    small = (wide / x_scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    if x.is_cuda:
        return torch._scaled_mm(
            small,
            weight.t(),
            scale_a=x_scale,
            scale_b=scale.unsqueeze(0),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    return (F.linear(small.float(), weight.float()) * x_scale * scale).to(x.dtype)


def paged(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, positions: Tensor) -> Tensor:
    """Float32 [B, heads * head_dim] of q [B, heads, head_dim] over tokens 0..position of each request."""
    batch, heads, size = q.shape
    kv, span = keys.shape[1], tables.shape[1] * BLOCK_SIZE
    grouped = q.view(batch, 1, kv, heads // kv, size, 1).float() * size**-0.5
    scores = (grouped * _gathered(keys, tables).unsqueeze(3).float()).sum(4)  # [B, W, kv, group, BLOCK_SIZE]
    later = torch.arange(span, device=q.device) > positions.unsqueeze(1)
    masked = scores.masked_fill(later.view(batch, -1, 1, 1, BLOCK_SIZE), float("-inf"))
    shares = masked.permute(0, 2, 3, 1, 4).reshape(batch, kv, heads // kv, span).softmax(-1)
    shares = shares.view(batch, kv, heads // kv, -1, BLOCK_SIZE).permute(0, 3, 1, 2, 4)
    products = shares.unsqueeze(-1) * _gathered(values, tables).unsqueeze(3).float()
    mixed = products.sum((1, 4))  # [B, kv, group, head_dim]
    return mixed.reshape(batch, heads * size)


def _gathered(pool: Tensor, tables: Tensor) -> Tensor:
    """The blocks of each request, [B, W, *block]."""
    return torch.ops.aten.index(pool, [tables])


def _rotated(qkv: Tensor, rotation: Rotation, heads: int, kv: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [T, heads of each, head_dim]; q and k rotated in float32."""
    q, k, v = qkv.view(qkv.shape[0], heads + 2 * kv, -1).split([heads, kv, kv], dim=1)
    cos, sin = rotation.cos.unsqueeze(1), rotation.sin.unsqueeze(1)
    q, k = (rotate(part.float(), cos, sin).to(qkv.dtype) for part in (q, k))
    return q, k, v
