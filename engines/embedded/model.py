"""One rank's decoder as the engine runs it: a decode step, and the prompt of one request.

The weights have the names of `builder.decoder`, whose tensors these equal; a weight of 8 bits has its rows'
scales beside it. What computes is `Numbers.operators`: the CPU's kernels, or plain torch for CUDA.

K and V live in a pool of blocks of BLOCK_SIZE tokens, for each attention layer keys
[num_blocks, kv heads, head_dim, BLOCK_SIZE] and values [num_blocks, kv heads, BLOCK_SIZE, head_dim].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from builder.architecture import FFN, Architecture, Attention
from builder.decoder import Collective, RMSNorm, rope_frequencies
from engines.embedded.operators import Operators, Rotation
from engines.embedded.step import BLOCK_SIZE

Cache = list[Tensor]  # [keys, values] of each attention layer
INT8, FP8 = "int8", "fp8"
SMALL_BATCH = 4  # up to here, products row by row are faster than tiles

_WEIGHTS = {INT8: torch.int8, FP8: torch.float8_e4m3fn}


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """How numbers are kept and multiplied.

    `dtype` is that of activations, and of weights unless `quant` is "int8" or "fp8".
    """

    dtype: torch.dtype
    quant: str | None
    operators: Operators

    @property
    def of_lm_head(self) -> Numbers:
        """FP8 leaves lm_head as it is, as `builder.quantization` does."""
        return replace(self, quant=None) if self.quant == FP8 else self


class Projection(nn.Module):
    """x times a weight, transposed; [B, columns] to [B, rows]."""

    def __init__(self, rows: int, columns: int, numbers: Numbers, bias: bool = False):
        super().__init__()
        self.operators = numbers.operators
        kind = _WEIGHTS[numbers.quant] if numbers.quant else numbers.dtype
        # Parameters, though no one trains them: AOTInductor copies buffers while it compiles.
        self.weight = _constant(rows, columns, dtype=kind)
        self.scale = _constant(rows, dtype=torch.float32) if numbers.quant else None
        self.bias = _constant(rows, dtype=numbers.dtype) if bias else None

    def forward(self, x: Tensor, logits: bool = False) -> Tensor:
        return self.operators.linear(x, self.weight, self.scale, self.bias, logits)


def _constant(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class SelfAttention(nn.Module):
    """Grouped-query attention over this rank's heads; qkv rows are [Q; K; V]."""

    def __init__(self, architecture: Architecture, attention: Attention, numbers: Numbers):
        super().__init__()
        self.operators, self.heads = numbers.operators, architecture.num_attention_heads
        rows = (self.heads + 2 * attention.num_key_value_heads) * architecture.head_dim
        self.qkv = Projection(rows, architecture.hidden_size, numbers, attention.bias)
        self.o = Projection(architecture.hidden_size, architecture.q_size, numbers)

    def decode(
        self, x: Tensor, rotation: Rotation, cache: Cache, tables: Tensor, positions: Tensor
    ) -> Tensor:
        """One token of each of B requests over all its tokens so far."""
        keys, values = cache
        return self.o(
            self.operators.decode_attention(
                self.qkv(x), rotation, keys, values, tables, positions, self.heads
            )
        )

    def prefill(self, x: Tensor, rotation: Rotation, cache: Cache, table: Tensor) -> Tensor:
        """The T tokens of one prompt over each other."""
        keys, values = cache
        return self.o(self.operators.prompt_attention(self.qkv(x), rotation, keys, values, table, self.heads))


class FeedForward(nn.Module):
    """SwiGLU over this rank's share of the width."""

    def __init__(self, hidden_size: int, ffn: FFN, numbers: Numbers) -> None:
        super().__init__()
        self.operators = numbers.operators
        self.gate = Projection(ffn.intermediate_size, hidden_size, numbers)
        self.up = Projection(ffn.intermediate_size, hidden_size, numbers)
        self.down = Projection(hidden_size, ffn.intermediate_size, numbers)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate, self.up
        return self.down(self.operators.swiglu(x, gate.weight, up.weight, gate.scale, up.scale))


Attend = Callable[[SelfAttention, Tensor], Tensor]  # an attention and its input [B, hidden_size]


class Matrix(nn.Module):
    """One matrix in the place of an attention or FFN; it is whole, so nothing is summed over ranks."""

    def __init__(self, architecture: Architecture, numbers: Numbers) -> None:
        super().__init__()
        self.linear = Projection(architecture.linear_size, architecture.hidden_size, numbers)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Block(nn.Module):
    """One layer; either half may be absent."""

    attention_norm: RMSNorm
    ffn_norm: RMSNorm

    def __init__(
        self,
        architecture: Architecture,
        index: int,
        numbers: Numbers,
        all_reduce: Collective,
    ):
        super().__init__()
        layer, hidden, eps = architecture.layers[index], architecture.hidden_size, architecture.norm_eps
        self.all_reduce = all_reduce
        self.attention: SelfAttention | Matrix | None = None
        self.ffn: FeedForward | Matrix | None = None
        if layer.attention:
            self.attention_norm = RMSNorm(hidden, eps)
            self.attention = (
                SelfAttention(architecture, layer.attention, numbers)
                if isinstance(layer.attention, Attention)
                else Matrix(architecture, numbers)
            )
        if layer.ffn:
            self.ffn_norm = RMSNorm(hidden, eps)
            self.ffn = (
                FeedForward(hidden, layer.ffn, numbers)
                if isinstance(layer.ffn, FFN)
                else Matrix(architecture, numbers)
            )

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """x and what both halves add."""
        if isinstance(self.attention, SelfAttention):
            x = x + self.all_reduce(attend(self.attention, self.attention_norm(x)))
        elif self.attention is not None:
            x = x + self.attention(self.attention_norm(x))
        if isinstance(self.ffn, FeedForward):
            x = x + self.all_reduce(self.ffn(self.ffn_norm(x)))
        elif self.ffn is not None:
            x = x + self.ffn(self.ffn_norm(x))
        return x

    def attend(self, x: Tensor, attend: Attend) -> Tensor:
        """attention(norm(x)), zeros without attention; a rank's share of it but for a Matrix."""
        if isinstance(self.attention, SelfAttention):
            return attend(self.attention, self.attention_norm(x))
        return torch.zeros_like(x) if self.attention is None else self.attention(self.attention_norm(x))

    def feed(self, x: Tensor) -> Tensor:
        """ffn(norm(x)), zeros without FFN; a rank's share of it but for a Matrix."""
        return torch.zeros_like(x) if self.ffn is None else self.ffn(self.ffn_norm(x))


def in_parallel(blocks: Sequence[Block], x: Tensor, attend: Attend, all_reduce: Collective) -> Tensor:
    """What `builder.decoder.in_parallel` computes, x [B, hidden_size]; two all-reduces.

    A row has the same sums in every batch: each is of single elements, in the order of the blocks.
    """
    added = [b.attend(x, attend) for b in blocks]
    split = [i for i, b in enumerate(blocks) if isinstance(b.attention, SelfAttention)]
    if split:
        message = torch.stack([added[i] for i in split])  # [k, B, hidden_size]
        for i, summed in zip(split, all_reduce(message).unbind(), strict=True):
            added[i] = summed
    fed = [b.feed(x + a) for b, a in zip(blocks, added, strict=True)]
    shares = [f for f, b in zip(fed, blocks, strict=True) if isinstance(b.ffn, FeedForward)]
    whole = [f for f, b in zip(fed, blocks, strict=True) if not isinstance(b.ffn, FeedForward)]
    y = sum((*added, *whole), x)
    return y + all_reduce(sum(shares[1:], shares[0])) if shares else y


class EngineDecoder(nn.Module):
    """What both programs share; weights are empty until they are loaded."""

    rope_frequencies: Tensor

    def __init__(self, architecture: Architecture, numbers: Numbers, all_reduce: Collective) -> None:
        super().__init__()
        self.architecture, self.all_reduce = architecture, all_reduce
        self.embedding = nn.Embedding(architecture.vocab_size, architecture.hidden_size, dtype=numbers.dtype)
        self.layers = nn.ModuleList(
            Block(architecture, i, numbers, all_reduce) for i in range(len(architecture.layers))
        )
        self.norm = RMSNorm(architecture.hidden_size, architecture.norm_eps)
        self.lm_head = Projection(architecture.lm_head_size, architecture.hidden_size, numbers.of_lm_head)
        frequencies = rope_frequencies(architecture.rope, architecture.head_dim)
        self.register_buffer("rope_frequencies", frequencies, persistent=False)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.weight = nn.Parameter(module.weight.detach().to(numbers.dtype))
        self.eval().requires_grad_(False)

    def rotation(self, positions: Tensor) -> Rotation:
        """Angles of tokens at `positions` [B]."""
        angles = positions.unsqueeze(1).float() * self.rope_frequencies
        magnitude = self.architecture.rope.magnitude
        return Rotation(cos=angles.cos() * magnitude, sin=angles.sin() * magnitude)

    def hidden(self, tokens: Tensor, attend: Attend) -> Tensor:
        """[B, hidden_size] after the last norm."""
        x, layers = self.embedding(tokens), cast(Sequence[Block], self.layers)
        for step in self.architecture.steps:
            blocks = [layers[i] for i in step]
            x = in_parallel(blocks, x, attend, self.all_reduce) if len(blocks) > 1 else blocks[0](x, attend)
        return self.norm(x)


class Decode(EngineDecoder):
    """A decode step."""

    def forward(self, tokens: Tensor, positions: Tensor, tables: Tensor, cache: Cache) -> Tensor:
        """Float32 logits [B, lm_head_size] after `tokens` [B] at `positions` [B].

        Row b of `tables` [B, blocks of a request] names the cache blocks of request b.
        """
        rotation, pairs = self.rotation(positions), _pairs(cache)

        def attend(attention: SelfAttention, x: Tensor) -> Tensor:
            return attention.decode(x, rotation, next(pairs), tables, positions)

        return self.lm_head(self.hidden(tokens, attend), True)


class Prefill(EngineDecoder):
    """A prompt."""

    def forward(self, tokens: Tensor, table: Tensor, cache: Cache) -> Tensor:
        """Float32 logits [1, lm_head_size] after the prompt `tokens` [T], kept in the blocks `table`."""
        rotation, pairs = self.rotation(torch.arange(tokens.shape[0], device=tokens.device)), _pairs(cache)

        def attend(attention: SelfAttention, x: Tensor) -> Tensor:
            return attention.prefill(x, rotation, next(pairs), table)

        return self.lm_head(self.hidden(tokens, attend).narrow(0, tokens.shape[0] - 1, 1), True)


def _pairs(cache: Cache) -> Iterator[Cache]:
    """Keys and values of each attention layer."""
    return (cache[i : i + 2] for i in range(0, len(cache), 2))


# decode1 is a decode step of one request, which CUDA compiles by itself.
PROGRAMS = {"decode": Decode, "decode1": Decode, "prefill": Prefill}


def new_cache(
    architecture: Architecture, num_blocks: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Cache:
    """An empty pool for a rank's share of the heads."""
    size = architecture.head_dim
    return [
        torch.zeros(num_blocks, layer.num_key_value_heads, *shape, dtype=dtype, device=device)
        for layer in architecture.layers
        if layer.num_key_value_heads
        for shape in ((size, BLOCK_SIZE), (BLOCK_SIZE, size))
    ]
