"""Documents that share a sequence and do not see each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from builder.decoder import Context

Lengths = tuple[tuple[int, ...], ...]  # of the documents of each sequence of a batch, in order


class PackedContext(Context):
    """Causal attention inside each document, the positions of which begin at 0.

    `lengths` add up to T for each of B sequences. Documents are attended to one after the other, so that
    neither a mask [T, T] nor the work outside the diagonal's blocks is needed.
    """

    def __init__(
        self, lengths: Sequence[Sequence[int]], frequencies: Tensor, dtype: torch.dtype, magnitude: float
    ) -> None:
        rows = [torch.cat([torch.arange(n) for n in row]) for row in lengths]
        super().__init__(torch.stack(rows).to(frequencies.device), frequencies, dtype, magnitude)
        self.lengths = [n for row in lengths for n in row]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `Context.attend`: [B, heads, T, head_dim] of q, k and v, the latter of fewer heads."""
        in_a_row = (x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k, v))  # [1, heads, B * T, head_dim]
        apart = (x.split(self.lengths, dim=2) for x in in_a_row)
        seen = [Context.attend(self, *document) for document in zip(*apart, strict=True)]
        return torch.cat(seen, 2)[0].unflatten(1, (q.shape[0], -1)).transpose(0, 1)
