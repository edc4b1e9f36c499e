"""Cut a checkpoint into the shares of pipeline stages and tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import replace

from builder.architecture import FFN, Architecture
from builder.checkpoint import Checkpoint, assemble
from builder.errors import UserError
from builder.tensors import Expression, Slice, pad


def pad_widths(checkpoint: Checkpoint, multiple: int) -> Checkpoint:
    """Pad every FFN to a multiple of `multiple` with zero channels, which changes no output."""
    layers, tensors = [], []
    for index, layer in enumerate(checkpoint.architecture.layers):
        part = checkpoint.layer(index)
        if layer.ffn:
            width = -(-layer.ffn.intermediate_size // multiple) * multiple
            layer = replace(layer, ffn=FFN(intermediate_size=width))
            for name, axis in (("gate", 0), ("up", 0), ("down", 1)):
                part[f"ffn.{name}.weight"] = pad(part[f"ffn.{name}.weight"], axis, width)
        layers.append(layer)
        tensors.append(part)
    return assemble(checkpoint, replace(checkpoint.architecture, layers=tuple(layers)), tensors)


def stage_layers(num_layers: int, pp_size: int, stage: int) -> range:
    """The layers of a pipeline stage; the first num_layers % pp_size stages get one more."""
    size, more = divmod(num_layers, pp_size)
    first = stage * size + min(stage, more)
    return range(first, first + size + (stage < more))


def check_stages(architecture: Architecture, pp_size: int) -> None:
    """Raise UserError where a stage would own no attention layer: TensorRT-LLM cannot run it."""
    if not 1 <= pp_size <= len(architecture.layers):
        raise UserError(f"pp_size: {pp_size} does not fit {len(architecture.layers)} layers")
    for stage in range(pp_size):
        layers = stage_layers(len(architecture.layers), pp_size, stage)
        if all(architecture.layers[i].attention is None for i in layers):
            raise UserError(
                f"pp_size: {pp_size} leaves stage {stage} (layers {layers[0]}-{layers[-1]}) "
                "without attention, which TensorRT-LLM cannot run; choose a smaller --pp"
            )


def shard(checkpoint: Checkpoint, tp_size: int, rank: int) -> Checkpoint:
    """Rank `rank`'s share: rows of q, k, v, gate, up and lm_head, columns of o and down.

    KV head r * kv // tp_size is repeated where there are more ranks than KV heads. lm_head's rows
    are padded with zeros to a multiple of tp_size. The embedding and the norms stay whole.
    """
    whole = checkpoint.architecture
    local = whole.shard(tp_size)
    layers = []
    for index, layer in enumerate(whole.layers):
        part = checkpoint.layer(index)
        for name in ("attention.q", "ffn.gate", "ffn.up"):
            if f"{name}.weight" in part:
                part[f"{name}.weight"] = _share(part[f"{name}.weight"], 0, tp_size, rank)
        for name in ("attention.o", "ffn.down"):
            if f"{name}.weight" in part:
                part[f"{name}.weight"] = _share(part[f"{name}.weight"], 1, tp_size, rank)
        if layer.attention:
            for name in ("attention.k.weight", "attention.v.weight"):
                part[name] = _kv_share(part[name], layer.attention.num_key_value_heads, tp_size, rank)
        layers.append(part)
    outside = dict(checkpoint.outside_layers())
    if not local.tie_word_embeddings:
        head = outside.get("lm_head.weight", outside["embedding.weight"])
        outside["lm_head.weight"] = _share(pad(head, 0, local.lm_head_size * tp_size), 0, tp_size, rank)
    return assemble(checkpoint, local, layers, outside)


def _share(x: Expression, axis: int, tp_size: int, rank: int) -> Expression:
    size = x.shape[axis] // tp_size
    return x if tp_size == 1 else Slice(x, axis, rank * size, (rank + 1) * size)


def _kv_share(x: Expression, kv_heads: int, tp_size: int, rank: int) -> Expression:
    if tp_size <= kv_heads:
        return _share(x, 0, tp_size, rank)
    head_dim = x.shape[0] // kv_heads
    first = rank * kv_heads // tp_size * head_dim
    return Slice(x, 0, first, first + head_dim)
