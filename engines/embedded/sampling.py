"""From logits to tokens: greedy, or drawn after temperature, top-k and top-p."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from engines.embedded.request import Request


class Sampler:
    """Draws the tokens of one request from its own generator, one number a token."""

    def __init__(self, request: Request) -> None:
        self.greedy = request.greedy
        self._temperature = 1.0 if request.temperature is None else request.temperature
        self._top_k = request.top_k or 0
        self._top_p = 1.0 if request.top_p is None else request.top_p
        self._random = random.Random(request.seed)

    def draw(self, logits: Tensor) -> int:
        """A token id from the logits [V] of one position."""
        tokens, probabilities = distribution(
            logits, temperature=self._temperature, top_k=self._top_k, top_p=self._top_p
        )
        cumulative = probabilities.cumsum(0)
        point = self._random.random() * cumulative[-1]
        index = int(torch.searchsorted(cumulative, point, right=True))
        return int(tokens[min(index, len(tokens) - 1)])


def distribution(
    logits: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn, likeliest first, and their probabilities in float64 (sum 1).

    Equal logits are ordered by token id, so the cuts never depend on the sort.
    """
    tokens = torch.arange(len(logits))
    if 0 < top_k < len(logits):
        tokens = (logits >= logits.topk(top_k).values[-1]).nonzero()[:, 0]
    centred = logits[tokens].double() - logits.max().double()  # no overflow at tiny temperatures
    scaled, order = (centred / temperature).sort(descending=True, stable=True)
    tokens = tokens[order]
    if top_k:
        tokens, scaled = tokens[:top_k], scaled[:top_k]
    probabilities = scaled.softmax(0)
    if top_p < 1:
        reached = probabilities.cumsum(0) - probabilities  # before each token
        keep = int((reached < top_p).sum())
        tokens, probabilities = tokens[:keep], probabilities[:keep] / probabilities[:keep].sum()
    return tokens, probabilities


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """One token id for every row of logits [B, V]."""
    tokens: list[int] = logits.argmax(-1).tolist()
    for row, sampler in enumerate(samplers):
        if not sampler.greedy:
            tokens[row] = sampler.draw(logits[row])
    return tokens
