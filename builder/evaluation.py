"""Perplexity of a checkpoint on text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from builder.checkpoint import Checkpoint
from builder.decoder import load
from builder.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Quality:
    """`kl` is KL(parent || model) per token in nats, None for the parent itself."""

    perplexity: float
    kl: float | None
    num_tokens: int


def token_windows(ids: list[int], length: int, count: int) -> Tensor:
    """The first `count` windows of `length` + 1 tokens, [count, length + 1]."""
    count = min(count, len(ids) // (length + 1))
    if count < 1:
        raise UserError(f"text: {len(ids)} tokens are too few for one window of {length + 1}; give more text")
    return torch.tensor(ids[: count * (length + 1)]).view(count, length + 1)


@torch.no_grad()
def logits_of(checkpoint: Checkpoint, windows: Tensor, batch: int = 8) -> Tensor:
    """Log-probabilities of the next token at each place, [count, length, vocab_size] in float32."""
    decoder = load(checkpoint, torch.float32)
    positions = torch.arange(windows.shape[1] - 1)
    parts = [decoder(x[:, :-1], positions.expand(len(x), -1)) for x in windows.split(batch)]
    return torch.cat([F.log_softmax(x, -1) for x in parts])


def quality(log_probs: Tensor, windows: Tensor, parent: Tensor | None = None) -> Quality:
    """Perplexity of `windows` under `log_probs` of `logits_of`, and the divergence from the parent's."""
    loss = F.nll_loss(log_probs.flatten(0, 1), windows[:, 1:].flatten())
    kl = None
    if parent is not None:
        kl = float(F.kl_div(log_probs, parent, log_target=True, reduction="sum") / windows[:, 1:].numel())
    return Quality(perplexity=math.exp(loss), kl=kl, num_tokens=windows[:, 1:].numel())
