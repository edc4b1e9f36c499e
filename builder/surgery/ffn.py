"""FFNs made smaller: dropped from layers, or narrowed to some of their channels."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from builder.architecture import FFN, Layer
from builder.checkpoint import Change, Checkpoint, rewrite
from builder.errors import UserError
from builder.tensors import Expression, Take, pad

CHANNEL_AXES = {"ffn.gate.weight": 0, "ffn.up.weight": 0, "ffn.down.weight": 1}


def drop_ffn(checkpoint: Checkpoint, layers: Collection[int]) -> Checkpoint:
    """Remove the FFN and its norm from `layers`. Raises UserError where there is none to drop."""
    return rewrite(checkpoint, dict.fromkeys(layers, _without_ffn), "drop_ffn")


def narrow_ffn(checkpoint: Checkpoint, channels: Mapping[int, Collection[int]]) -> Checkpoint:
    """Keep only the given channels of layers' FFNs: rows of gate and up, columns of down.

    Raises UserError for a layer without an FFN and for channels it does not have.
    """
    changes = {index: _narrow(tuple(sorted(set(kept)))) for index, kept in channels.items()}
    return rewrite(checkpoint, changes, "ffn_channels")


def pad_widths(checkpoint: Checkpoint, multiple: int) -> Checkpoint:
    """Pad every FFN to a multiple of `multiple` with zero channels, which changes no output."""
    layers = enumerate(checkpoint.architecture.layers)
    odd = [i for i, layer in layers if layer.intermediate_size % multiple]
    return rewrite(checkpoint, dict.fromkeys(odd, _padded(multiple)), "ffn_width") if odd else checkpoint


def _without_ffn(layer: Layer, part: dict[str, Expression]) -> tuple[Layer, dict[str, Expression]]:
    if layer.ffn is None:
        raise UserError("has no FFN; leave it out")
    return replace(layer, ffn=None), {n: x for n, x in part.items() if not n.startswith("ffn")}


def _narrow(kept: tuple[int, ...]) -> Change:
    def change(layer: Layer, part: dict[str, Expression]) -> tuple[Layer, dict[str, Expression]]:
        if not isinstance(layer.ffn, FFN):
            raise UserError("has no FFN to narrow; leave it out")
        if not kept or kept[0] < 0 or kept[-1] >= layer.intermediate_size:
            wrong = kept[-1] if kept else "none"
            raise UserError(f"has channels 0-{layer.intermediate_size - 1}; {wrong} was asked for")
        narrow = {name: Take(part[name], axis, kept) for name, axis in CHANNEL_AXES.items()}
        return replace(layer, ffn=FFN(intermediate_size=len(kept))), part | narrow

    return change


def _padded(multiple: int) -> Change:
    def change(layer: Layer, part: dict[str, Expression]) -> tuple[Layer, dict[str, Expression]]:
        width = -(-layer.intermediate_size // multiple) * multiple
        wider = {name: pad(part[name], axis, width) for name, axis in CHANNEL_AXES.items()}
        return replace(layer, ffn=FFN(intermediate_size=width)), part | wider

    return change
