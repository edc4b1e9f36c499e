"""Quality of a checkpoint on text: perplexity, divergence from its parent, the same likeliest tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from builder.checkpoint import Checkpoint
from builder.decoder import Context, RMSNorm, alone, load, load_block, rope_frequencies, run, to_tensor
from builder.errors import UserError
from builder.training.mapping import Pair
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
    `parent_loss` are None without a parent. `cosine` [count, pairs] is of the hidden states that the layers
    of each of `pairs` leave, a layer of the model and one of the parent.
    """

    places: int
    loss: Tensor
    parent_loss: Tensor | None = None
    kl: Tensor | None = None
    agreed: Tensor | None = None
    pairs: tuple[Pair, ...] = ()
    cosine: Tensor | None = None


@torch.no_grad()
def score(
    checkpoint: Checkpoint,
    samples: Tensor,
    parent: Checkpoint | None = None,
    *,
    pairs: Sequence[Pair] = (),
    batch: int = 8,
    progress: Progress | None = None,
) -> Scores:
    """Run `samples` [count, length] of tokens through the reference decoder, and through its parent's.

    In float32. `pairs` of layers of the model and of its parent, in order, have their hidden states compared
    at the input tokens; a pair inside a window of parallel blocks, which leaves no state, is passed over.
    Memory is the hidden states of all samples of both, the blocks of one step and the logits of one sample;
    `progress` gets the bytes of each step's weights. Raises UserError where the two have unlike vocabularies.
    """
    vocab_size = checkpoint.architecture.vocab_size
    if parent is not None and parent.architecture.vocab_size != vocab_size:
        raise UserError(
            f"parent: vocab_size {parent.architecture.vocab_size}, the model has {vocab_size}; KL compares "
            "models of one vocabulary, give the model's own parent"
        )
    inputs, targets = samples[:, :-1], samples[:, 1:]
    model = _Pass(checkpoint, inputs, batch, progress)
    beside = None if parent is None else _Pass(parent, inputs, batch, progress)
    compared, cosines = _compare(model, beside, pairs) if beside else ([], [])
    for walked in (model, beside):
        if walked is not None:
            walked.finish()
    rows = [
        _sample_sums(model.logits(i), targets[i], None if beside is None else beside.logits(i))
        for i in range(len(samples))
    ]
    if not all(map(math.isfinite, (x for row in rows for x in row))):
        raise UserError("model: its logits, or its parent's, are not finite numbers; `ffn-fusion verify` it")
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]
    names = ("loss", "parent_loss", "kl", "agreed")
    return Scores(
        places=targets.shape[1],
        **dict(zip(names, columns, strict=False)),
        pairs=tuple(compared),
        cosine=torch.stack(cosines, 1) if cosines else None,
    )


class _Pass:
    """A model that `inputs` [count, length] go through step by step; `hidden` is what the last step left."""

    def __init__(self, checkpoint: Checkpoint, inputs: Tensor, batch: int, progress: Progress | None) -> None:
        self.checkpoint, self.batch, self.progress = checkpoint, batch, progress
        self.architecture, self.tensors = checkpoint.architecture, checkpoint.decoder_tensors()
        rope = self.architecture.rope
        self.hidden = to_tensor(self.tensors["embedding.weight"], torch.float32)[inputs]
        frequencies = rope_frequencies(rope, self.architecture.head_dim)
        positions = torch.arange(inputs.shape[1])[None]
        self.context = Context(positions, frequencies, torch.float32, rope.magnitude)
        self.steps = list(self.architecture.steps)[::-1]
        self.last = -1  # the layer whose state `hidden` is

    def step(self) -> None:
        """Run the next step."""
        step = self.steps.pop()
        blocks = [load_block(self.architecture, i, self.tensors, torch.float32) for i in step]
        for part in self.hidden.split(self.batch):
            part.copy_(run(blocks, part, self.context, alone))
        if self.progress:
            self.progress(sum(x.num_bytes for i in step for x in self.checkpoint.layer(i).values()))
        self.last = step[-1]

    def reach(self, layer: int) -> bool:
        """Run up to `layer`; False where it leaves no state, being inside a window of parallel blocks."""
        while self.steps and self.steps[-1][0] <= layer:
            self.step()
        return self.last == layer

    def finish(self) -> None:
        """Run all that is left, and load what makes logits."""
        while self.steps:
            self.step()
        self.norm = RMSNorm(self.architecture.hidden_size, self.architecture.norm_eps)
        self.norm.weight.data = to_tensor(self.tensors["norm.weight"], torch.float32)
        self.head = to_tensor(self.tensors["lm_head.weight"], torch.float32)

    def logits(self, index: int) -> Tensor:
        """Of one sample, [length, vocab_size]."""
        return F.linear(self.norm(self.hidden[index]), self.head)


def _compare(model: _Pass, parent: _Pass, pairs: Sequence[Pair]) -> tuple[list[Pair], list[Tensor]]:
    """The pairs whose layers both leave a state, and the mean cosine of each sample's states, [count]."""
    compared, cosines = [], []
    for ours, theirs in pairs:
        reached = [model.reach(ours), parent.reach(theirs)]
        if all(reached):
            batches = zip(model.hidden.split(model.batch), parent.hidden.split(parent.batch), strict=True)
            means = [F.cosine_similarity(x, y, dim=-1).double().mean(1) for x, y in batches]
            compared.append((ours, theirs))
            cosines.append(torch.cat(means))
    return compared, cosines


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
    hidden_cosine: tuple[LayerCosine, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LayerCosine:
    """How alike the hidden states are that a layer of the model and one of its parent leave."""

    layer: int
    parent_layer: int
    cosine: Estimate


def summarize(scores: Scores, seed: int = 0) -> Evaluation:
    """The scores as means with intervals; perplexity is exp of the mean loss."""
    kl, agreed = (
        None if x is None else estimate(x / scores.places, seed) for x in (scores.kl, scores.agreed)
    )
    parent = None if scores.parent_loss is None else _perplexity(scores.parent_loss / scores.places, seed)
    columns = () if scores.cosine is None else scores.cosine.unbind(1)
    return Evaluation(
        perplexity=_perplexity(scores.loss / scores.places, seed),
        parent_perplexity=parent,
        kl=kl,
        top1=agreed,
        hidden_cosine=tuple(
            LayerCosine(layer=ours, parent_layer=theirs, cosine=estimate(column, seed))
            for (ours, theirs), column in zip(scores.pairs, columns, strict=True)
        ),
    )


def _perplexity(losses: Tensor, seed: int) -> Estimate:
    mean = estimate(losses, seed)
    if max(mean.value, mean.high or 0.0) > MAX_LOSS:
        raise UserError(f"model: a loss of {mean.value:.0f} nats per token; it is no language model any more")
    low, high = (None if x is None else math.exp(x) for x in (mean.low, mean.high))
    return Estimate(value=math.exp(mean.value), low=low, high=high)
