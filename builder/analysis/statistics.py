"""A first pass over the model: explainability, FFN channels, KV heads.

The channel statistic and its use for narrowing are those of Puzzle (arXiv 2411.19146): a channel counts by
the mean magnitude of its activation times the norm of its column of down. Explainability is that of FFN
Fusion (arXiv 2503.18908).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from builder.analysis.record import Explain, KVHead
from builder.analysis.sums import Key, Sums, cosine_distance
from builder.analysis.trunk import Passage, Trunk
from builder.decoder import Block, Context, FeedForward


def gather(
    trunk: Trunk, hidden: Sequence[Tensor], sums: Sums, progress: Callable[[int], None] | None = None
) -> None:
    """Add what batches of hidden states [B, T, hidden] show of every layer to `sums`."""
    context = _Listening(trunk.context(hidden[0].shape[1]), sums)
    states = list(hidden)
    for index in range(len(trunk.layers)):
        block = trunk.block(index)
        with _watched(block, index, sums):
            context.key = ("kv", index)
            for number, x in enumerate(states):
                passage = trunk.passage(index, block, x, context)
                sums.add(("explain", index), _explain(passage))
                states[number] = passage.output
        sums.add(("evaluations", "statistics"), len(states))
        if progress:
            progress(len(states))


def best_channels(statistic: np.ndarray, width: int) -> tuple[int, ...]:
    """The `width` channels that count most, ascending; of equal ones the first."""
    return tuple(sorted(np.argsort(-statistic, kind="stable")[:width].tolist()))


def explain(sums: Sums, layer: int, tokens: int) -> Explain:
    """The means of a layer."""
    distance, ratio, contribution = (sums.arrays["explain", layer] / tokens).tolist()
    return Explain(input_output=distance, ratio=ratio, input_contribution=contribution)


def kv_heads(sums: Sums, layer: int, tokens: int) -> tuple[KVHead, ...]:
    """The means of a layer's KV heads."""
    k, v, k_off, v_off = sums.arrays["kv", layer] / tokens
    return tuple(
        KVHead(k_norm=float(k[i]), v_norm=float(v[i]), k_spread=float(k_off[i]), v_spread=float(v_off[i]))
        for i in range(len(k))
    )


def channels(sums: Sums, layer: int, tokens: int) -> np.ndarray:
    """mean |activation| x norm of the down column, [width]."""
    return sums.arrays["channels", layer] / tokens


def _explain(passage: Passage) -> Tensor:
    x, h = passage.x, passage.contribution
    ratio = h.float().norm(dim=-1) / x.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    figures = (cosine_distance(x, passage.output), ratio, cosine_distance(x, h))
    return torch.stack([figure.double().sum() for figure in figures])


def _heads(k: Tensor, v: Tensor) -> Tensor:
    """Norms of K and V of [B, T, heads, head_dim] and distances from the heads' mean, [4, heads]."""
    k, v = k.float(), v.float()
    norms = [x.norm(dim=-1) for x in (k, v)]
    off = [(x - x.mean(2, keepdim=True)).norm(dim=-1) for x in (k, v)]
    shares = [a / b.clamp_min(torch.finfo(torch.float32).tiny) for a, b in zip(off, norms, strict=True)]
    return torch.stack([x.double().sum((0, 1)) for x in (*norms, *shares)])


@contextmanager
def _watched(block: Block, index: int, sums: Sums) -> Iterator[None]:
    """Add the magnitudes of an FFN's activations, the input of its down, times the columns' norms."""
    if not isinstance(block.ffn, FeedForward):
        yield
        return
    norms = block.ffn.down.weight.float().norm(dim=0).double()

    def see(module: nn.Module, inputs: tuple[Tensor]) -> None:
        magnitude = inputs[0].float().abs().flatten(0, -2)
        sums.add(("channels", index), magnitude.sum(0, dtype=torch.float64) * norms)

    handle = block.ffn.down.register_forward_pre_hook(see)
    try:
        yield
    finally:
        handle.remove()


class _Listening(Context):
    """Adds what K and V are, K after its rotation, to `sums` under `key`."""

    key: Key

    def __init__(self, context: Context, sums: Sums) -> None:
        self.cos, self.sin, self.sums = context.cos, context.sin, sums

    def see(self, k: Tensor, v: Tensor) -> None:
        self.sums.add(self.key, _heads(k, v))
