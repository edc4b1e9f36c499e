"""The logits of many models on the same tokens: divergence, perplexity, agreement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from builder.analysis.record import Fidelity
from builder.analysis.sums import Key, Sums
from builder.checkpoint import Checkpoint
from builder.decoder import RMSNorm, to_tensor
from builder.errors import UserError
from builder.evaluation import MAX_LOSS

_PIECE = 1 << 24  # logits at once


class Head:
    """The last norm and lm_head of a model."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        architecture = checkpoint.architecture
        self.norm = RMSNorm(architecture.hidden_size, architecture.norm_eps)
        self.norm.weight = torch.nn.Parameter(to_tensor(checkpoint.tensors["norm.weight"]), False)
        name = "embedding.weight" if architecture.tie_word_embeddings else "lm_head.weight"
        self.weight = to_tensor(checkpoint.tensors[name])
        self.rows = max(1, _PIECE // architecture.vocab_size)

    def log_probs(self, x: Tensor) -> Tensor:
        """Of hidden states [rows, hidden], in float32 [rows, vocab]."""
        return F.log_softmax(F.linear(self.norm(x), self.weight).float(), -1)


def score(
    head: Head,
    tokens: Tensor,
    parent: Tensor,
    children: Mapping[Key, Tensor],
    sums: Sums,
) -> None:
    """Add the parent's loss, and each child's KL(parent || child), loss and agreement, to `sums`.

    Hidden states are [B, T, hidden], tokens [B, T]. The divergence is summed over all B T places, the loss
    over the B (T - 1) that have a next token. Logits of a few rows of one model are in memory at a time.
    """
    targets = torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], -1)), 1).flatten()
    hidden = parent.flatten(0, 1)
    sums.add(("targets",), int((targets >= 0).sum()))
    for start in range(0, len(hidden), head.rows):
        piece = slice(start, start + head.rows)
        theirs = head.log_probs(hidden[piece])
        sums.add(("loss",), _loss(theirs, targets[piece]))
        likeliest = theirs.argmax(-1)
        for key, child in children.items():
            ours = head.log_probs(child.flatten(0, 1)[piece])
            divergence = F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
            sums.add(("kl", *key), divergence.double().sum())
            sums.add(("loss", *key), _loss(ours, targets[piece]))
            sums.add(("top1", *key), (ours.argmax(-1) == likeliest).double().sum())


def score_all(
    head: Head,
    tokens: Sequence[Tensor],
    parent: Sequence[Tensor],
    children: Mapping[Key, Sequence[Tensor]],
    sums: Sums,
) -> None:
    """`score` of every batch."""
    for number, (batch, states) in enumerate(zip(tokens, parent, strict=True)):
        score(head, batch, states, {key: x[number] for key, x in children.items()}, sums)


def kl(sums: Sums, key: Key, tokens: int) -> float:
    """Mean KL(parent || child) in nats per token; rounding never takes it below 0."""
    return max(0.0, sums.mean(("kl", *key), tokens))


def perplexity(sums: Sums, key: Key, targets: int) -> float:
    """exp of the mean loss over `targets` tokens."""
    loss = sums.mean(("loss", *key), targets)
    if loss > MAX_LOSS:
        raise UserError(f"model: a loss of {loss:.0f} nats per token; it is no language model any more")
    return math.exp(loss)


def fidelity(sums: Sums, key: Key, tokens: int, targets: int) -> Fidelity:
    """All of them."""
    return Fidelity(
        kl=kl(sums, key, tokens),
        perplexity=perplexity(sums, key, targets),
        top1=sums.mean(("top1", *key), tokens),
    )


def _loss(log_probs: Tensor, targets: Tensor) -> Tensor:
    return F.nll_loss(log_probs, targets, ignore_index=-1, reduction="none").double().sum()
