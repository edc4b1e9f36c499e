"""One way through the layers for a model and all its variants.

A variant needs no layer before its change: it starts from the model's own hidden states there. At every
layer one block serves the model and each variant that began earlier, so m layers cost m + (m - 1) + ... =
m (m + 1) / 2 block evaluations for the model and all dropped blocks, and one block at a time is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from builder.analysis.sums import Direction, Sums, cosine_distance
from builder.analysis.trunk import Passage, Trunk
from builder.analysis.variants import Variant
from builder.decoder import Block, Context

Progress = Callable[[int], None]  # called with the blocks just run
LOCAL = ("block", "attention", "ffn")  # dropped parts, whose layer's output is compared


@dataclass(frozen=True, kw_only=True)
class Swept:
    """Hidden states [B, T, hidden] after the last layer, of each batch: the model's and its variants'."""

    model: list[Tensor]
    variants: dict[Variant, list[Tensor]]


def sweep(
    trunk: Trunk,
    hidden: Sequence[Tensor],
    variants: Sequence[Variant],
    sums: Sums,
    *,
    name: str,
    keep: Callable[[Variant], bool] = lambda variant: True,
    progress: Progress | None = None,
) -> Swept:
    """Run batches of embeddings [B, T, hidden] through a model and its variants.

    Adds the dependency of every later block on a dropped one to `sums` as ("dependency", name, i, j), and
    for dropped parts the distance of the layer's output as ("cosine", part, i). Variants that `keep`
    refuses are measured but not returned.
    """
    context = trunk.context(hidden[0].shape[1])
    model = list(hidden)
    running: dict[Variant, list[Tensor]] = {}
    begins = {i: list(group) for i, group in groupby(sorted(variants, key=_first), key=_first)}
    for index in range(len(trunk.layers)):
        block = trunk.block(index)
        points = [trunk.passage(index, block, x, context) for x in model]
        sums.add(("evaluations", name), len(points))
        step = _Step(trunk, index, block, points, context, sums, name)
        for variant, states in running.items():
            if variant.resume <= index:
                step.follow(variant, states)
                if progress:
                    progress(len(states))
        model = [point.output for point in points]
        for variant in begins.get(index, ()):
            running[variant] = variant.start(block, points, context)
            if variant.key[0] in LOCAL:
                for state, output in zip(running[variant], model, strict=True):
                    sums.add(("cosine", name, *variant.key), cosine_distance(output, state).double().sum())
        if progress:
            progress(len(points))
    return Swept(model=model, variants={v: states for v, states in running.items() if keep(v)})


def _first(variant: Variant) -> int:
    return variant.first


class _Step:
    """One layer, for what comes to it."""

    def __init__(
        self,
        trunk: Trunk,
        index: int,
        block: Block,
        points: Sequence[Passage],
        context: Context,
        sums: Sums,
        name: str,
    ) -> None:
        self.trunk, self.index, self.context, self.sums, self.name = trunk, index, context, sums, name
        self.block = block
        self.directions = [Direction.of(point.contribution) for point in points]

    def follow(self, variant: Variant, states: list[Tensor]) -> None:
        """Move a variant's states, one for each batch, past the layer."""
        for number, x in enumerate(states):
            passage = self.trunk.passage(self.index, self.block, x, self.context)
            if variant.drops_block:
                distance = self.directions[number].distance(Direction.of(passage.contribution))
                key = ("dependency", self.name, variant.first, self.index)
                self.sums.add(key, distance.double().sum())
            states[number] = passage.output
        self.sums.add(("evaluations", self.name, variant.kind), len(states))
