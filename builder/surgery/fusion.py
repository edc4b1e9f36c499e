"""FFN Fusion (arXiv 2503.18908): a run of attention-free layers becomes one wide FFN.

y = x + sum_j FFN_j(n_j(x)) is one FFN whose gate and up rows, and down columns, are the members'
side by side (theorem 3.1). The sum is exact; what is approximated is reading one x instead of a
sequence of them.
"""

from __future__ import annotations

from typing import Literal

from builder.architecture import FFN, Architecture, Layer, Linear, Window
from builder.arithmetic import Divide, NormBase, ScaleColumns, cast
from builder.checkpoint import Checkpoint, assemble
from builder.errors import UserError
from builder.surgery.parallel import check_groups, renumber
from builder.tensors import Expression, concat

Group = Window
Norm = Literal["fold", "last"]


def default_groups(architecture: Architecture, *, include_last: bool = False) -> list[Group]:
    """Every run of attention-free layers without its last one, the sensitive one, where two remain."""
    groups = []
    for first, last in architecture.attention_free_runs():
        members = [i for i in range(first, last + 1) if not architecture.layers[i].empty]
        if not include_last:
            members.pop()
        if len(members) > 1:
            groups.append((members[0], members[-1]))
    return groups


def fuse(checkpoint: Checkpoint, groups: list[Group], norm: Norm = "fold") -> Checkpoint:
    """Replace each group of layers by one.

    `fold` moves every member's norm weight into its gate and up columns, which is exact for any
    common norm weight; `last` gives all members the last one's, as an ablation. Empty layers in a
    group compute nothing and go. Raises UserError for a group that overlaps another or a parallel
    window, or holds a layer that is not a lone FFN.
    """
    _check_groups(checkpoint.architecture, groups)
    old, last_of = checkpoint.architecture.layers, dict(groups)
    layers: list[Layer] = []
    tensors: list[dict[str, Expression]] = []
    places: dict[int, int] = {}
    index = 0
    while index < len(old):
        last = last_of.get(index, index)
        members = [i for i in range(index, last + 1) if last == index or not old[i].empty]
        places |= dict.fromkeys(members, len(layers))
        if last == index:
            layers.append(old[index])
            tensors.append(checkpoint.layer(index))
        else:
            layers.append(_fused_layer([old[i] for i in members]))
            tensors.append(_fused_tensors([checkpoint.layer(i) for i in members], checkpoint.dtype, norm))
        index = last + 1
    return assemble(checkpoint, renumber(checkpoint.architecture, tuple(layers), places), tensors)


def remove_empty(checkpoint: Checkpoint) -> Checkpoint:
    """Without the layers that have neither attention nor FFN.

    Raises UserError where none would be left, or fewer than two of a parallel window.
    """
    kept = [i for i, layer in enumerate(checkpoint.architecture.layers) if not layer.empty]
    if not kept:
        raise UserError("plan: no layer would be left; drop less")
    if len(kept) == len(checkpoint.architecture.layers):
        return checkpoint
    layers = tuple(checkpoint.architecture.layers[i] for i in kept)
    tensors = [checkpoint.layer(i) for i in kept]
    places = {old: new for new, old in enumerate(kept)}
    return assemble(checkpoint, renumber(checkpoint.architecture, layers, places), tensors)


def _check_groups(architecture: Architecture, groups: list[Group]) -> None:
    previous = -1
    for first, last in sorted(groups):
        if not 0 <= first < last < len(architecture.layers):
            raise UserError(
                f"fuse: group {first}-{last} is no run of two or more of the layers "
                f"0-{len(architecture.layers) - 1}"
            )
        if first <= previous:
            raise UserError(f"fuse: group {first}-{last} overlaps another; layers belong to one group")
        for index in range(first, last + 1):
            layer = architecture.layers[index]
            if layer.attention is not None:
                raise UserError(
                    f"fuse: group {first}-{last} crosses layer {index}, which has attention; "
                    f"drop it (--drop-attention {index}) or split the group"
                )
            if isinstance(layer.ffn, Linear):
                raise UserError(
                    f"fuse: group {first}-{last} crosses layer {index}, whose FFN is a matrix; split it"
                )
        if sum(not layer.empty for layer in architecture.layers[first : last + 1]) < 2:
            raise UserError(f"fuse: group {first}-{last} has fewer than two FFNs; leave it out")
        previous = last
    check_groups(architecture, groups)


def _fused_layer(members: list[Layer]) -> Layer:
    width = sum(layer.intermediate_size for layer in members)
    origins = tuple(origin for layer in members for origin in layer.members)
    return Layer(attention=None, ffn=FFN(intermediate_size=width), members=origins)


def _fused_tensors(members: list[dict[str, Expression]], dtype: str, norm: Norm) -> dict[str, Expression]:
    norms = [m["ffn_norm.weight"] for m in members]
    gates = [m["ffn.gate.weight"] for m in members]
    ups = [m["ffn.up.weight"] for m in members]
    base = norms[-1]
    if norm == "fold":
        base = NormBase(tuple(norms))
        ratios = [Divide(x, base) for x in norms]
        gates = [cast(ScaleColumns(x, r), dtype) for x, r in zip(gates, ratios, strict=True)]
        ups = [cast(ScaleColumns(x, r), dtype) for x, r in zip(ups, ratios, strict=True)]
    return {
        "ffn_norm.weight": base,
        "ffn.gate.weight": concat(gates, 0),
        "ffn.up.weight": concat(ups, 0),
        "ffn.down.weight": concat([m["ffn.down.weight"] for m in members], 1),
    }
