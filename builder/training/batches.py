"""A stream of tokens cut into sequences without padding, in an order that a seed decides.

A sequence may hold the end of one document and the beginning of the next. Attention crosses the border unless
documents are kept apart. What a step reads is a function of (seed, stage, step) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from builder.errors import UserError
from builder.training.data import Stream
from builder.training.packing import Lengths


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences that are run at once: `tokens` [B, context + 1] of int64.

    `counted` [B, context] of float32 says whether the next token is to be learnt. `lengths` are those of
    each sequence's documents where they are kept apart.
    """

    tokens: Tensor
    counted: Tensor
    lengths: Lengths | None

    def to(self, device: torch.device) -> Batch:
        """The same elsewhere."""
        return replace(self, tokens=self.tokens.to(device), counted=self.counted.to(device))


class Batches:
    """Sequences of `context` + 1 tokens of a stream, `sequences` for each step of a stage.

    Every epoch cuts the stream at another offset and shuffles the sequences. With `separate` documents are
    kept apart. Raises UserError where the stream has fewer sequences than one step takes, or does not say
    where documents begin.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        context: int,
        sequences: int,
        seed: int,
        stage: int,
        separate: bool = False,
    ) -> None:
        self.stream, self.context, self.sequences = stream, context, sequences
        self.seed, self.stage, self.separate = seed, stage, separate
        self.per_epoch = max(0, (len(stream.ids) - context) // context)  # at any offset
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0))
        if self.per_epoch < sequences:
            raise UserError(
                f"stage {stage + 1}: data: {len(stream.ids):,} tokens are {self.per_epoch} sequences of "
                f"{context} tokens, one step takes {sequences}; give more text, or smaller batch_tokens"
            )
        if separate and stream.documents is None:
            raise UserError(
                f"stage {stage + 1}: separate_documents: .npy data, and the model names no eos_token_id that "
                "would end its documents; give text, or add eos_token_id to config.json"
            )

    def starts(self, step: int) -> list[int]:
        """Where the sequences of a step begin."""
        places = range(step * self.sequences, (step + 1) * self.sequences)
        return [int(self._order(n // self.per_epoch)[n % self.per_epoch]) for n in places]

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch[0] != epoch:
            random = np.random.default_rng((self.seed, self.stage, epoch))
            offset = random.integers(self.context)
            self._epoch = epoch, random.permutation(self.per_epoch) * self.context + offset
        return self._epoch[1]

    def batch(self, starts: Sequence[int]) -> Batch:
        """The sequences that begin at `starts`."""
        return Batch(tokens=self.tokens(starts), counted=self.counted(starts), lengths=self.lengths(starts))

    def tokens(self, starts: Sequence[int]) -> Tensor:
        """[sequences, context + 1] of int64."""
        rows = [self.stream.ids[x : x + self.context + 1].astype(np.int64) for x in starts]
        return torch.from_numpy(np.stack(rows))

    def counted(self, starts: Sequence[int]) -> Tensor:
        """Whether each next token is to be learnt, [sequences, context] of float32.

        The first of a document that is kept apart is not: nothing tells of it.
        """
        rows = np.ones((len(starts), self.context), np.float32)
        for row, x in zip(rows, starts, strict=True):
            if self.stream.learnt is not None:
                row[:] = self.stream.learnt[x + 1 : x + self.context + 1]
            if self.separate:
                row[self._begins(x, x + self.context + 1) - x - 1] = 0
        return torch.from_numpy(rows)

    def lengths(self, starts: Sequence[int]) -> Lengths | None:
        """Of the documents of each sequence, the first and the last of which may be cut; None together."""
        if not self.separate:
            return None
        ends = [(x, x + self.context) for x in starts]
        return tuple(tuple(np.diff([x, *self._begins(x, end), end]).tolist()) for x, end in ends)

    def _begins(self, start: int, end: int) -> np.ndarray:
        """Where documents begin between two places, both excluded."""
        assert self.stream.documents is not None
        first = np.searchsorted(self.stream.documents, start, side="right")
        return self.stream.documents[first : np.searchsorted(self.stream.documents, end, side="left")]
