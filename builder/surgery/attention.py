"""Drop the attention of layers; their FFNs then read the residual stream alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from builder.checkpoint import Checkpoint, assemble
from builder.errors import UserError


def drop_attention(checkpoint: Checkpoint, layers: Collection[int]) -> Checkpoint:
    """Remove attention and its norm from `layers`. Raises UserError where there is none to drop."""
    count = len(checkpoint.architecture.layers)
    for index in layers:
        if not 0 <= index < count:
            raise UserError(f"drop_attention: layer {index} does not exist; the model has 0-{count - 1}")
        if checkpoint.architecture.layers[index].attention is None:
            raise UserError(f"drop_attention: layer {index} has no attention; leave it out")
        if checkpoint.architecture.layers[index].ffn is None:
            raise UserError(f"drop_attention: layer {index} has no FFN, nothing would be left; leave it out")
    new_layers = tuple(
        replace(layer, attention=None) if index in layers else layer
        for index, layer in enumerate(checkpoint.architecture.layers)
    )
    tensors = [
        {n: x for n, x in checkpoint.layer(i).items() if i not in layers or not n.startswith("attention")}
        for i in range(count)
    ]
    return assemble(checkpoint, replace(checkpoint.architecture, layers=new_layers), tensors)
