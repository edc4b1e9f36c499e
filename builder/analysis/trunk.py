"""A model's blocks, all in memory or one at a time, and what a block does with its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from builder.architecture import Layer
from builder.checkpoint import Checkpoint
from builder.decoder import Block, Context, SelfAttention, load_block, rope_frequencies, to_tensor


@dataclass(frozen=True, kw_only=True)
class Passage:
    """x [B, T, hidden] through a block: what attention and FFN added to it, None where there is none."""

    x: Tensor
    attention: Tensor | None
    ffn: Tensor | None

    @property
    def between(self) -> Tensor:
        """The residual stream between attention and FFN."""
        return self.x if self.attention is None else self.x + self.attention

    @property
    def output(self) -> Tensor:
        """The residual stream after the block, summed in the decoder's order."""
        return self.between if self.ffn is None else self.between + self.ffn

    @property
    def contribution(self) -> Tensor:
        """output - x, without the digits that adding to x loses."""
        parts = [part for part in (self.attention, self.ffn) if part is not None]
        return sum(parts[1:], parts[0]) if parts else torch.zeros_like(self.x)


class Trunk:
    """The layers of a checkpoint; `resident` keeps in memory what was once read.

    A trunk over another one, of a model with the same number of layers, takes the blocks from it whose
    tensors are the same or fewer: what a plan drops is skipped, not read again.
    """

    def __init__(self, checkpoint: Checkpoint, *, resident: bool, over: Trunk | None = None) -> None:
        self.checkpoint, self.over = checkpoint, over
        self.resident = resident
        self.tensors = checkpoint.decoder_tensors()
        self._blocks: dict[int, Block] = {}
        self._embedding: Tensor | None = None

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.checkpoint.architecture.layers

    def block(self, index: int) -> Block:
        """One layer's block, with no less than the layer has."""
        if index in self._blocks:
            return self._blocks[index]
        if self.over is not None and self._same(self.over.checkpoint, index):
            return self.over.block(index)
        block = load_block(self.checkpoint.architecture, index, self.tensors)
        if self.resident:
            self._blocks[index] = block
        return block

    def _same(self, other: Checkpoint, index: int) -> bool:
        theirs = other.layer(index)
        return all(x is theirs.get(name) for name, x in self.checkpoint.layer(index).items())

    def context(self, length: int) -> Context:
        """The angles of positions 0 to `length`, for any batch."""
        architecture = self.checkpoint.architecture
        frequencies = rope_frequencies(architecture.rope, architecture.head_dim)
        dtype = getattr(torch, self.checkpoint.dtype)
        return Context(torch.arange(length)[None], frequencies, dtype, architecture.rope.magnitude)

    def embed(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Hidden states [B, T, hidden] of each of the batches [B, T]."""
        weight = self._embedding
        if weight is None:
            weight = to_tensor(self.checkpoint.tensors["embedding.weight"])
            self._embedding = weight if self.resident else None
        return [weight[tokens] for tokens in batches]

    def passage(self, index: int, block: Block, x: Tensor, context: Context) -> Passage:
        """What layer `index` does with x."""
        layer = self.layers[index]
        attention = attend(block, x, context) if layer.attention else None
        between = x if attention is None else x + attention
        return Passage(x=x, attention=attention, ffn=feed(block, between) if layer.ffn else None)


def attend(block: Block, x: Tensor, context: Context) -> Tensor:
    """What the block's attention adds to x."""
    assert block.attention is not None, "the layer has one"
    normed = block.attention_norm(x)
    if isinstance(block.attention, SelfAttention):
        return block.attention(normed, context)
    return block.attention(normed)


def feed(block: Block, x: Tensor) -> Tensor:
    """What the block's FFN adds to x."""
    assert block.ffn is not None, "the layer has one"
    return block.ffn(block.ffn_norm(x))
