"""Quality of a checkpoint on text: perplexity, divergence from its parent, the same likeliest tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from builder.checkpoint import Checkpoint
from builder.decoder import Context, RMSNorm, alone, load, load_block, rope_frequencies, run, to_tensor
from builder.errors import UserError
from builder.writer import Progress

RESAMPLES = 2000  # of the bootstrap
MAX_LOSS = 700.0  # nats whose exp is a float64


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


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Sums over the `places` next tokens of each sample, [count] in float64, in nats.

    `kl` is KL(parent || model), `agreed` counts places where both find the same token likeliest; they and
    `parent_loss` are None without a parent.
    """

    places: int
    loss: Tensor
    parent_loss: Tensor | None = None
    kl: Tensor | None = None
    agreed: Tensor | None = None


@torch.no_grad()
def score(
    checkpoint: Checkpoint,
    samples: Tensor,
    parent: Checkpoint | None = None,
    *,
    batch: int = 8,
    progress: Progress | None = None,
) -> Scores:
    """Run `samples` [count, length] of tokens through the reference decoder, and through its parent's.

    In float32. Memory is the hidden states of all samples of both, the blocks of one step and the logits of
    one sample; `progress` gets the bytes of each step's weights. Raises UserError where the two have unlike
    vocabularies.
    """
    vocab_size = checkpoint.architecture.vocab_size
    if parent is not None and parent.architecture.vocab_size != vocab_size:
        raise UserError(
            f"parent: vocab_size {parent.architecture.vocab_size}, the model has {vocab_size}; KL compares "
            "models of one vocabulary, give the model's own parent"
        )
    inputs, targets = samples[:, :-1], samples[:, 1:]
    logits = _logits(checkpoint, inputs, batch, progress)
    parent_logits = None if parent is None else _logits(parent, inputs, batch, progress)
    rows = [
        _sample_sums(logits(i), targets[i], None if parent_logits is None else parent_logits(i))
        for i in range(len(samples))
    ]
    if not all(map(math.isfinite, (x for row in rows for x in row))):
        raise UserError("model: its logits, or its parent's, are not finite numbers; `ffn-fusion verify` it")
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]
    names = ("loss", "parent_loss", "kl", "agreed")
    return Scores(places=targets.shape[1], **dict(zip(names, columns, strict=False)))


def _logits(
    checkpoint: Checkpoint, inputs: Tensor, batch: int, progress: Progress | None
) -> Callable[[int], Tensor]:
    """The logits [length, vocab_size] of each row of `inputs` [count, length], which all blocks have run."""
    architecture, tensors = checkpoint.architecture, checkpoint.decoder_tensors()
    hidden = to_tensor(tensors["embedding.weight"], torch.float32)[inputs]
    frequencies = rope_frequencies(architecture.rope, architecture.head_dim)
    positions = torch.arange(inputs.shape[1])[None]
    context = Context(positions, frequencies, torch.float32, architecture.rope.magnitude)
    for step in architecture.steps:
        blocks = [load_block(architecture, i, tensors, torch.float32) for i in step]
        for part in hidden.split(batch):
            part.copy_(run(blocks, part, context, alone))
        if progress:
            progress(sum(x.num_bytes for i in step for x in checkpoint.layer(i).values()))
    norm = RMSNorm(architecture.hidden_size, architecture.norm_eps)
    norm.weight.data = to_tensor(tensors["norm.weight"], torch.float32)
    head = to_tensor(tensors["lm_head.weight"], torch.float32)
    return lambda index: F.linear(norm(hidden[index]), head)


def _sample_sums(logits: Tensor, targets: Tensor, parent_logits: Tensor | None) -> tuple[float, ...]:
    """Loss and, with a parent, its loss, KL(parent || model) and agreement, summed over the places."""
    log_probs = F.log_softmax(logits, -1)
    loss = _nll(log_probs, targets)
    if parent_logits is None:
        return (loss,)
    truth = F.log_softmax(parent_logits, -1)
    kl = (truth.exp() * (truth - log_probs)).sum(-1).double().sum()
    agreed = (truth.argmax(-1) == log_probs.argmax(-1)).sum()
    return loss, _nll(truth, targets), float(kl), float(agreed)


def _nll(log_probs: Tensor, targets: Tensor) -> float:
    return -float(log_probs.gather(-1, targets[:, None]).double().sum())


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over samples and its 95% interval, None where one sample tells nothing of it."""

    value: float
    low: float | None
    high: float | None


def estimate(per_sample: Tensor, seed: int = 0) -> Estimate:
    """Mean of `per_sample` [count], and its interval by the percentile bootstrap over samples."""
    values, count = per_sample.double().numpy(), len(per_sample)
    if count < 2:
        return Estimate(value=float(values.mean()), low=None, high=None)
    random = np.random.default_rng(seed)
    means = [values[random.integers(0, count, count)].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5))
    return Estimate(value=float(values.mean()), low=float(low), high=float(high))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What samples tell of a model, and of it beside its parent; `kl` in nats per token, `top1` a share."""

    perplexity: Estimate
    parent_perplexity: Estimate | None
    kl: Estimate | None
    top1: Estimate | None


def summarize(scores: Scores, seed: int = 0) -> Evaluation:
    """The scores as means with intervals; perplexity is exp of the mean loss."""
    kl, agreed = (
        None if x is None else estimate(x / scores.places, seed) for x in (scores.kl, scores.agreed)
    )
    parent = None if scores.parent_loss is None else _perplexity(scores.parent_loss / scores.places, seed)
    return Evaluation(
        perplexity=_perplexity(scores.loss / scores.places, seed),
        parent_perplexity=parent,
        kl=kl,
        top1=agreed,
    )


def _perplexity(losses: Tensor, seed: int) -> Estimate:
    mean = estimate(losses, seed)
    if max(mean.value, mean.high or 0.0) > MAX_LOSS:
        raise UserError(f"model: a loss of {mean.value:.0f} nats per token; it is no language model any more")
    low, high = (None if x is None else math.exp(x) for x in (mean.low, mean.high))
    return Estimate(value=math.exp(mean.value), low=low, high=high)
