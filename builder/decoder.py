"""The reference decoder: any Architecture, or one rank's share of it, in torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from builder.architecture import FFN, Architecture, Attention, Linear
from builder.rope import Rope

if TYPE_CHECKING:
    from builder.checkpoint import Checkpoint
    from builder.tensors import Expression

Collective = Callable[[Tensor], Tensor]


def rope_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Angle per position of each pair of dimensions, [head_dim / 2] in float32.

    `llama3` divides long wavelengths by `factor`, keeps short ones and blends between (Llama 3.1).
    `yarn` blends by the number of turns within the original length (arXiv 2309.00071, 3.2).
    transformers' modeling_rope_utils describes the same rules.
    """
    inverse = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    scaling = dict(rope.scaling)
    if rope.kind == "linear":
        return inverse / scaling["factor"]
    if rope.kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        wavelength = 2 * math.pi / inverse
        turns = scaling["original_max_position_embeddings"] / wavelength
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - keep) * inverse / scaling["factor"] + keep * inverse
    if rope.kind == "yarn":
        keep = 1 - _yarn_ramp(rope.theta, scaling, head_dim)
        return (1 - keep) * inverse / scaling["factor"] + keep * inverse
    return inverse


def _yarn_ramp(theta: float, scaling: dict[str, float], head_dim: int) -> Tensor:
    """0 for pairs that turn at least beta_fast times within the original length, 1 for at most beta_slow."""

    def pair(turns: float) -> float:
        length = scaling["original_max_position_embeddings"]
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.get("beta_fast") or 32), pair(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(head_dim // 2).float() - low) / (high - low)).clamp(0, 1)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the statistics in float32 or wider."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim/2) of [B, T, heads, head_dim]; cos and sin are [B, T, 1, head_dim/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class SelfAttention(nn.Module):
    """Causal grouped-query attention over this rank's heads. qkv rows are [Q; K; V]."""

    def __init__(self, architecture: Architecture, attention: Attention) -> None:
        super().__init__()
        self.num_heads = architecture.num_attention_heads
        self.num_key_value_heads = attention.num_key_value_heads
        self.head_dim = architecture.head_dim
        rows = (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim
        self.qkv = nn.Linear(architecture.hidden_size, rows, bias=attention.bias)
        self.o = nn.Linear(self.num_heads * self.head_dim, architecture.hidden_size, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        batch, length, _ = x.shape
        heads, kv = self.num_heads, self.num_key_value_heads
        q, k, v = self.qkv(x).view(batch, length, heads + 2 * kv, -1).split([heads, kv, kv], dim=2)
        q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
        context.see(k, v)
        out = context.attend(*(part.transpose(1, 2) for part in (q, k, v)))
        return self.o(out.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """SwiGLU over this rank's share of the width."""

    def __init__(self, hidden_size: int, ffn: FFN) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, ffn.intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, ffn.intermediate_size, bias=False)
        self.down = nn.Linear(ffn.intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Matrix(nn.Module):
    """One matrix in the place of an attention or FFN; each rank has some rows of it."""

    def __init__(self, architecture: Architecture, gather: Collective) -> None:
        super().__init__()
        self.linear = nn.Linear(architecture.hidden_size, architecture.linear_size, bias=False)
        self.gather = gather

    def forward(self, x: Tensor) -> Tensor:
        return self.gather(self.linear(x))


class Block(nn.Module):
    """One layer; either half may be absent."""

    def __init__(
        self, architecture: Architecture, index: int, all_reduce: Collective, all_gather: Collective
    ) -> None:
        super().__init__()
        layer, hidden, eps = architecture.layers[index], architecture.hidden_size, architecture.norm_eps
        self.all_reduce = all_reduce
        self.attention = self.ffn = None
        if layer.attention:
            self.attention_norm = RMSNorm(hidden, eps)
            self.attention = (
                Matrix(architecture, all_gather)
                if isinstance(layer.attention, Linear)
                else SelfAttention(architecture, layer.attention)
            )
        if layer.ffn:
            self.ffn_norm = RMSNorm(hidden, eps)
            self.ffn = (
                Matrix(architecture, all_gather)
                if isinstance(layer.ffn, Linear)
                else FeedForward(hidden, layer.ffn)
            )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if isinstance(self.attention, SelfAttention):
            x = x + self.all_reduce(self.attention(self.attention_norm(x), context))
        elif self.attention is not None:
            x = x + self.attention(self.attention_norm(x))
        if isinstance(self.ffn, FeedForward):
            x = x + self.all_reduce(self.ffn(self.ffn_norm(x)))
        elif self.ffn is not None:
            x = x + self.ffn(self.ffn_norm(x))
        return x

    def attend(self, x: Tensor, context: Context) -> Tensor:
        """attention(norm(x)), zeros without attention; a rank's share of it but for a Matrix."""
        if isinstance(self.attention, SelfAttention):
            return self.attention(self.attention_norm(x), context)
        return torch.zeros_like(x) if self.attention is None else self.attention(self.attention_norm(x))

    def feed(self, x: Tensor) -> Tensor:
        """ffn(norm(x)), zeros without FFN; a rank's share of it but for a Matrix."""
        return torch.zeros_like(x) if self.ffn is None else self.ffn(self.ffn_norm(x))


def run(blocks: Sequence[Block], x: Tensor, context: Context, all_reduce: Collective) -> Tensor:
    """One of `Architecture.steps`: a block alone, or the blocks of a parallel window."""
    return in_parallel(blocks, x, context, all_reduce) if len(blocks) > 1 else blocks[0](x, context)


def in_parallel(blocks: Sequence[Block], x: Tensor, context: Context, all_reduce: Collective) -> Tensor:
    """Blocks that all read x [B, T, hidden_size]: see `builder.surgery.parallel`.

    Ranks sum twice for all of them: first the attentions in one message [k, B, T, hidden_size], for the
    FFN of each block reads its own; then the FFNs, which every rank has added up.
    """
    added = [b.attend(x, context) for b in blocks]
    split = [i for i, b in enumerate(blocks) if isinstance(b.attention, SelfAttention)]
    if split:
        message = torch.stack([added[i] for i in split])
        for i, summed in zip(split, all_reduce(message).unbind(), strict=True):
            added[i] = summed
    fed = [b.feed(x + a) for b, a in zip(blocks, added, strict=True)]
    shares = [f for f, b in zip(fed, blocks, strict=True) if isinstance(b.ffn, FeedForward)]
    whole = [f for f, b in zip(fed, blocks, strict=True) if not isinstance(b.ffn, FeedForward)]
    y = sum((*added, *whole), x)
    return y + all_reduce(sum(shares[1:], shares[0])) if shares else y


class Context:
    """What all attention layers share in one forward pass: the angles of `positions` [B, T]."""

    def __init__(
        self, positions: Tensor, frequencies: Tensor, dtype: torch.dtype, magnitude: float = 1.0
    ) -> None:
        angles = positions[:, :, None, None].to(frequencies.dtype) * frequencies  # [B, T, 1, head_dim/2]
        self.cos, self.sin = (angles.cos() * magnitude).to(dtype), (angles.sin() * magnitude).to(dtype)

    def see(self, k: Tensor, v: Tensor) -> None:
        """Called with the rotated K and with V [B, T, heads, head_dim] of each attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What places see, causally: all are [B, heads, T, head_dim], k and v perhaps of fewer heads."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] > k.shape[1])


def alone(x: Tensor) -> Tensor:
    """The collective of a single rank."""
    return x


class Decoder(nn.Module):
    """The decoder of an Architecture; for tensor parallelism give one rank's share and the collectives.

    `all_reduce` sums over the ranks; `all_gather` puts their last dimensions side by side, and is
    needed where a layer has a Linear.
    """

    rope_frequencies: Tensor

    def __init__(
        self, architecture: Architecture, *, all_reduce: Collective = alone, all_gather: Collective = alone
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.all_reduce = all_reduce
        self.embedding = nn.Embedding(architecture.vocab_size, architecture.hidden_size)
        self.layers = nn.ModuleList(
            Block(architecture, i, all_reduce, all_gather) for i in range(len(architecture.layers))
        )
        self.norm = RMSNorm(architecture.hidden_size, architecture.norm_eps)
        self.lm_head = nn.Linear(architecture.hidden_size, architecture.lm_head_size, bias=False)
        frequencies = rope_frequencies(architecture.rope, architecture.head_dim)
        self.register_buffer("rope_frequencies", frequencies, persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, T, lm_head_size] of `tokens` [B, T] at `positions` [B, T]; each sees those before it."""
        x = self.embedding(tokens)
        context = Context(positions, self.rope_frequencies, x.dtype, self.architecture.rope.magnitude)
        blocks = cast(Sequence[Block], self.layers)
        for step in self.architecture.steps:
            x = run([blocks[i] for i in step], x, context, self.all_reduce)
        return self.lm_head(self.norm(x))


def load(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    *,
    all_reduce: Collective = alone,
    all_gather: Collective = alone,
) -> Decoder:
    """The decoder of a checkpoint, weights evaluated and in `dtype` (default: the checkpoint's)."""
    architecture = checkpoint.architecture
    with torch.device("meta"):
        decoder = Decoder(architecture, all_reduce=all_reduce, all_gather=all_gather)
    weights = {name: to_tensor(x, dtype) for name, x in checkpoint.decoder_tensors().items()}
    decoder.load_state_dict(weights, strict=True, assign=True)
    decoder.rope_frequencies = rope_frequencies(architecture.rope, architecture.head_dim)
    return decoder.eval().requires_grad_(False)


def load_block(
    architecture: Architecture,
    index: int,
    tensors: Mapping[str, Expression],
    dtype: torch.dtype | None = None,
) -> Block:
    """One layer of `Checkpoint.decoder_tensors`, in `dtype` (default: its own); no other layer is read."""
    with torch.device("meta"):
        block = Block(architecture, index, alone, alone)
    prefix = f"layers.{index}."
    own = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    weights = {n: to_tensor(x, dtype) for n, x in own.items()}
    block.load_state_dict(weights, strict=True, assign=True)
    return block.eval().requires_grad_(False)


def to_tensor(expression: Expression, dtype: torch.dtype | None = None) -> Tensor:
    """Evaluate an expression; bfloat16 crosses from numpy by its bits."""
    array = expression.read_all()
    if expression.dtype == "bfloat16":
        tensor = torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    return tensor if dtype is None else tensor.to(dtype)
