"""Cut a checkpoint into the shares of pipeline stages and tensor-parallel ranks."""

from __future__ import annotations

from builder.architecture import Architecture, Attention
from builder.checkpoint import Checkpoint, assemble
from builder.errors import UserError
from builder.tensors import Expression, Slice, pad


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
        if not any(isinstance(architecture.layers[i].attention, Attention) for i in layers):
            raise UserError(
                f"pp_size: {pp_size} leaves stage {stage} (layers {layers[0]}-{layers[-1]}) "
                "without attention, which TensorRT-LLM cannot run; choose a smaller --pp"
            )


# The axis along which a rank's share is cut; K and V have their own rule.
SPLIT_AXES = {
    "attention.q.weight": 0,
    "attention.q.bias": 0,
    "attention.o.weight": 1,
    "attention.linear.weight": 0,
    "ffn.gate.weight": 0,
    "ffn.up.weight": 0,
    "ffn.down.weight": 1,
    "ffn.linear.weight": 0,
}


def shard(checkpoint: Checkpoint, tp_size: int, rank: int) -> Checkpoint:
    """Rank `rank`'s share: rows of q, k, v, gate, up, linears and lm_head, columns of o and down.

    KV head r * kv // tp_size is repeated where there are more ranks than KV heads. lm_head's rows
    are padded with zeros to a multiple of tp_size. The embedding and the norms stay whole.
    """
    whole = checkpoint.architecture
    local = whole.shard(tp_size)
    layers = []
    for index, layer in enumerate(whole.layers):
        part = checkpoint.layer(index)
        for name, x in part.items():
            if name in SPLIT_AXES:
                part[name] = _share(x, SPLIT_AXES[name], tp_size, rank)
            elif name.startswith(("attention.k.", "attention.v.")):
                part[name] = _kv_share(x, layer.num_key_value_heads, tp_size, rank)
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
