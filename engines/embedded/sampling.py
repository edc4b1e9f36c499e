"""From logits to tokens: greedy, or drawn after temperature, top-k and top-p.

In numpy: its argmax and its partial sorts of a row of the vocabulary are many times as fast as torch's
on a CPU. Nothing sorts a whole row.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engines.embedded.penalties import Row, adjustments
from engines.embedded.request import Request

Tokens = NDArray[np.int64]

_COLDEST = 1e-6  # temperatures below are this: greedy but for logits that are equal in the last digits
_GROUPS = 1024  # of a row, to find its largest values without sorting it
_BLOCK = 128  # weights summed at once when drawing


class Sampler:
    """Makes the tokens of one request, drawing from its own generator, one number a token."""

    def __init__(self, request: Request) -> None:
        self._greedy = request.greedy
        self._temperature = max(request.temperature or 1.0, _COLDEST)  # 0 is greedy, of the logits themselves
        self._top_k = request.top_k or 0
        self._top_p = 1.0 if request.top_p is None else request.top_p
        self._random = random.Random(request.seed)
        self._adjustments = adjustments(request, self._temperature)
        self._tokens = list(request.input_ids)
        self._wants_log_probs = request.return_log_probs

    def next(self, row: Row) -> tuple[int, float | None]:
        """The next token after logits [V], which are changed in place, and its log-probability if wanted.

        Any token where bad words mask them all.
        """
        for adjustment in self._adjustments:
            adjustment.apply(row, self._tokens)
        token = int(row.argmax()) if self._greedy else self._draw(row)
        if self._adjustments:
            self._tokens.append(token)
        return token, log_prob(row, token, self._temperature) if self._wants_log_probs else None

    def _draw(self, row: Row) -> int:
        tokens, weights = distribution(
            row, temperature=self._temperature, top_k=self._top_k, top_p=self._top_p
        )
        place = pick(weights, self._random.random())
        return place if tokens is None else int(tokens[place])


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> tuple[list[int], list[float | None]]:
    """A token id for every row of logits [B, V], float32 on the CPU, and its log-probability if wanted.

    Changes logits in place. A row's token depends on that row and its sampler alone.
    """
    rows = logits.numpy()
    made = [sampler.next(row) for row, sampler in zip(rows, samplers, strict=True)]
    return [token for token, _ in made], [value for _, value in made]


def log_prob(row: Row, token: int, temperature: float) -> float:
    """The natural logarithm of softmax(row / temperature)[token], over all of logits [V].

    What TensorRT-LLM returns with normalize_log_probs false: of the penalised logits, before top-k and
    top-p (cpp/tensorrt_llm/kernels/samplingTopKKernels.cu). With true, the default of its older
    releases, it would be over the top_k tokens alone, so always 0 for a greedy request.
    """
    top = row.max()
    if top == -np.inf:
        return -float("inf")
    total = _weights(row, top, temperature).sum(dtype=np.float64)
    return float((row[token] - top) / temperature - np.log(total))


def distribution(
    row: Row, *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tokens | None, NDArray[np.float32]]:
    """The tokens that may be drawn of logits [V], in ascending order, and their weights.

    Weights are probabilities times an unknown factor. None stands for all tokens. Of tokens whose equal
    logits are on both sides of a cut, those with the lower ids stay.
    """
    tokens, values = None, row
    if 0 < top_k < len(row):
        tokens = _largest(row, top_k)
        values = row[tokens]
    weights = _weights(values, values.max(), temperature)
    if top_p < 1:
        kept = _nucleus(weights, top_p)
        tokens, weights = kept if tokens is None else tokens[kept], weights[kept]
    return tokens, weights


def pick(weights: NDArray[np.float32], share: float) -> int:
    """The index whose part of the sum of `weights` holds `share` of that sum, 0 <= share < 1.

    Never one of weight 0. Blocks are looked at first, for the sums of a whole vocabulary are slow.
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64).cumsum()
    point = share * sums[-1]
    block = _place(sums, point)
    start = block * _BLOCK
    inside = weights[start : start + _BLOCK].cumsum(dtype=np.float64)
    return start + _place(inside, point - (sums[block - 1] if block else 0.0))


def _place(sums: NDArray[np.float64], point: float) -> int:
    """Where in ascending sums `point` falls; rounding may put it beyond the last."""
    index = int(np.searchsorted(sums, point, side="right"))
    return index if index < len(sums) else int(np.searchsorted(sums, sums[-1], side="left"))


def _weights(values: Row, top: np.float32, temperature: float) -> NDArray[np.float32]:
    """exp of the distance to the largest value; 1 for all where everything is masked."""
    if top == -np.inf:
        return np.ones_like(values)
    scaled = values - top
    scaled *= np.float32(1 / temperature)
    return np.exp(scaled, out=scaled)


def _floor(values: Row, count: int) -> np.float32:
    """A number that at least `count` of values reach, and few more: the count-th of the groups' largest."""
    size = len(values) // _GROUPS
    if size < 2 or count > _GROUPS // 2:
        return np.partition(values, -count)[-count]
    groups = values[: size * _GROUPS].reshape(size, _GROUPS).max(0)
    return np.partition(groups, -count)[-count]


def _largest(values: Row, count: int) -> Tokens:
    """Ascending indices of the `count` largest values."""
    near = np.flatnonzero(values >= _floor(values, count))
    among = values[near]
    return near[_cut(among, np.partition(among, -count)[-count], count)]


def _nucleus(weights: NDArray[np.float32], top_p: float) -> Tokens:
    """Ascending indices of the fewest weights whose sum reaches `top_p` of all."""
    total = weights.sum(dtype=np.float64)
    wanted = top_p * total
    near = weights[weights >= _floor(weights, min(len(weights), _GROUPS // 2))]
    if near.sum(dtype=np.float64) < wanted:  # all below this together are no more than what is left out
        near = weights[weights >= (1 - top_p) * total / len(weights)]
    falling = np.sort(near)[::-1]
    last = min(int(np.searchsorted(falling.cumsum(dtype=np.float64), wanted)), len(falling) - 1)
    return _cut(weights, falling[last], last + 1)


def _cut(values: Row, last: np.float32, count: int) -> Tokens:
    """Ascending indices of the `count` largest, the smallest of which is `last`."""
    kept = values >= last
    surplus = np.count_nonzero(kept) - count
    if surplus:
        kept[np.flatnonzero(values == last)[-surplus:]] = False
    return np.flatnonzero(kept)
