"""The terms of the loss, each a sum over tokens: batches add up, over micro-batches and over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from builder.training.buckets import Buckets, in_buckets

NAMES = ("cosine", "kl", "lm")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Of each term; the logits are divided by `temperature` for KL, which is then scaled by its square."""

    cosine: float = 1.0
    kl: float = 1.0
    lm: float = 0.0
    temperature: float = 1.0

    @property
    def parent(self) -> bool:
        """Whether the parent has a say."""
        return bool(self.cosine or self.kl)


def cosine_distance(student: Sequence[Tensor], parent: Sequence[Tensor]) -> Tensor:
    """Sum over tokens of 1 - cos(student's, parent's hidden states), the mean over the pairs of layers.

    Each pair is [B, T, hidden_size] twice (arXiv 2411.19146, 4).
    """
    total = sum(
        (1 - F.cosine_similarity(x.float(), y.float(), dim=-1)).sum()
        for x, y in zip(student, parent, strict=True)
    )
    return torch.as_tensor(total) / max(1, len(student))


def divergence(student: Tensor, parent: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over tokens of KL(parent || student) in nats times temperature^2, of logits [B, T, vocab_size].

    The square keeps the gradient's size (arXiv 1503.02531, 2).
    """
    log_probs = F.log_softmax(student.float() / temperature, -1)
    truth = F.log_softmax(parent.float() / temperature, -1)
    return F.kl_div(log_probs, truth, log_target=True, reduction="sum") * temperature**2


def bucket_divergence(student: Tensor, parent: Buckets, temperature: float = 1.0) -> Tensor:
    """`divergence` from a parent of which only buckets are known; logits [B, T, vocab_size].

    All tokens without a bucket of their own are one event: the result is at most that of `divergence` (the
    log-sum inequality), and the same where every token has its own bucket.
    """
    log_probs = in_buckets(F.log_softmax(student.float() / temperature, -1), parent.ids)
    return F.kl_div(log_probs, parent.log_probs, log_target=True, reduction="sum") * temperature**2


def next_token(logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Sum of -log p(target) over the places of `counted`; logits [B, T, vocab_size], the rest [B, T]."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * counted.flatten()).sum()
