"""What a smaller precision costs: the same tokens through the checkpoint and through its quantised weights.

Both run in float32, so the difference is the weights' alone. One layer of all ranks is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from builder import rows, trtllm
from builder.architecture import Architecture
from builder.decoder import (
    Context,
    FeedForward,
    RMSNorm,
    SelfAttention,
    load_block,
    rope_frequencies,
    to_tensor,
)
from builder.errors import UserError
from builder.evaluation import token_windows
from builder.tensorfile import read_header
from builder.tensors import Expression
from builder.text import read_ids
from engines.embedded.session import Request, Session
from engines.manifest import read

Ranks = Sequence[Mapping[str, Expression]]  # each rank's decoder_tensors
Step = Callable[[int, int], None]  # layers done, layers in all

OWN_SEQUENCES, OWN_LENGTH = 8, 64


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the engine's weights change.

    `kl` is KL(checkpoint || engine) per token in nats, `top1` the share of places with the same likeliest
    token. Perplexities are of the text's own next tokens, None where the text is the engine's own.
    """

    num_tokens: int
    kl: float
    top1: float
    perplexity: float | None
    parent_perplexity: float | None

    def describe(self, name: str) -> str:
        """One line."""
        places = f"{self.top1:.2%} of {self.num_tokens} places"
        text = f"{name}: KL {self.kl:.2g}, the likeliest token the same at {places}"
        if self.perplexity is None:
            return f"{text} of its own text"
        return f"{text}, perplexity {self.perplexity:.3f} for {self.parent_perplexity:.3f}"


def own_text(engine: Path, count: int = OWN_SEQUENCES) -> Tensor:
    """Texts that the engine draws at temperature 1, each from another first token: [count, length]."""
    with Session(engine) as session:
        manifest = session.manifest
        length = min(OWN_LENGTH, manifest.max_seq_len)
        step = max(1, manifest.architecture.vocab_size // count)
        requests = [
            Request(input_ids=(i * step,), max_tokens=length - 1, temperature=1.0, seed=i)
            for i in range(min(count, manifest.architecture.vocab_size))
        ]
        running = [(r, session.generate(r)) for r in requests]
        return torch.tensor([[*r.input_ids, *(t for x in g for t in x.token_ids)] for r, g in running])


def read_text(file: Path, tokenizer: Path, length: int = 256, count: int = 8) -> Tensor:
    """Windows of a text file, [up to count, length].

    Raises UserError where the file cannot be read or is shorter than one window.
    """
    return token_windows(read_ids(tokenizer, [file]), length - 1, count)


def cost(checkpoint_dir: Path, engine: Path, windows: Tensor, *, own: bool, step: Step | None = None) -> Cost:
    """Compare a checkpoint with the weights that lie in an engine made of it, on `windows` [count, length].

    `own` says that the text is the engine's. Raises UserError for tokens outside the vocabulary.
    """
    manifest, checkpoint = read(engine), trtllm.read(checkpoint_dir)
    ranks = range(manifest.tp_size)
    parent = [checkpoint.rank(r).cast(manifest.dtype).decoder_tensors() for r in ranks]
    stored = [rows.dequantize(read_header(engine / f"rank{r}.safetensors")) for r in ranks]
    return compare(manifest.architecture.shard(manifest.tp_size), parent, stored, windows, own=own, step=step)


@torch.no_grad()
def compare(
    architecture: Architecture,
    parent: Ranks,
    other: Ranks,
    windows: Tensor,
    *,
    own: bool,
    step: Step | None = None,
) -> Cost:
    """Compare two sets of weights of one architecture, a rank's share, as `cost` does."""
    vocab = parent[0]["embedding.weight"].shape[0]
    if int(windows.max()) >= vocab:
        raise UserError(
            f"data: token {int(windows.max())} is outside vocab_size {vocab}; use the model's tokenizer"
        )
    models = [_Layered(architecture, ranks, windows) for ranks in (parent, other)]
    for index in range(len(architecture.layers)):
        for model in models:
            model.advance(index)
        if step:
            step(index + 1, len(architecture.layers))
    truth, changed = (model.log_probs(vocab)[:, :-1].flatten(0, 1) for model in models)
    targets = windows[:, 1:].flatten()
    perplexities = [None if own else float(F.nll_loss(x, targets).exp()) for x in (changed, truth)]
    return Cost(
        num_tokens=len(targets),
        kl=float(F.kl_div(changed, truth, log_target=True, reduction="batchmean")),
        top1=float((truth.argmax(-1) == changed.argmax(-1)).float().mean()),
        perplexity=perplexities[0],
        parent_perplexity=perplexities[1],
    )


class _Layered:
    """The hidden states of one set of weights, layer by layer."""

    def __init__(self, architecture: Architecture, ranks: Ranks, windows: Tensor) -> None:
        self.architecture, self.ranks = architecture, ranks
        self.starts = {step.start for step in architecture.steps}  # whose layers read what is there then
        self.read = self.x = to_tensor(ranks[0]["embedding.weight"], torch.float32)[windows]
        frequencies = rope_frequencies(architecture.rope, architecture.head_dim)
        positions = torch.arange(windows.shape[1])[None]
        self.context = Context(positions, frequencies, torch.float32, architecture.rope.magnitude)

    def advance(self, index: int) -> None:
        if index in self.starts:
            self.read = self.x
        blocks = [load_block(self.architecture, index, rank, torch.float32) for rank in self.ranks]
        # A matrix is whole on every rank.
        attending = blocks if isinstance(blocks[0].attention, SelfAttention) else blocks[:1]
        feeding = blocks if isinstance(blocks[0].ffn, FeedForward) else blocks[:1]
        added = sum((b.attend(self.read, self.context) for b in attending), torch.zeros_like(self.x))
        self.x = self.x + added
        self.x = self.x + sum((b.feed(self.read + added) for b in feeding), torch.zeros_like(self.x))

    def log_probs(self, vocab: int) -> Tensor:
        norm = RMSNorm(self.architecture.hidden_size, self.architecture.norm_eps)
        norm.weight.data = to_tensor(self.ranks[0]["norm.weight"], torch.float32)
        x = norm(self.x)
        logits = torch.cat(
            [F.linear(x, to_tensor(r["lm_head.weight"], torch.float32)) for r in self.ranks], -1
        )
        return F.log_softmax(logits[..., :vocab], -1)
