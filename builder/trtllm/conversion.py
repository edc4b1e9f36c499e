"""From a Checkpoint to a TensorRT-LLM checkpoint directory, every limit checked before a byte is written."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from builder import manifest
from builder.architecture import Architecture
from builder.checkpoint import Checkpoint, layer_shapes
from builder.errors import UserError
from builder.model_class import model_class
from builder.quantization import Quantized
from builder.storage import json_bytes
from builder.surgery.ffn import pad_widths
from builder.surgery.parallel import check_sequential
from builder.surgery.sharding import check_stages, shard, stage_layers
from builder.team import Team
from builder.tensors import Expression
from builder.trtllm import layout
from builder.writer import Progress

MAX_ELEMENTS = 2**31 - 1  # of one TensorRT weight


def convert(
    checkpoint: Checkpoint,
    output: Path,
    *,
    tp_size: int = 1,
    pp_size: int = 1,
    dtype: str | None = None,
    fused_mlp: bool = True,
    quantized: Quantized | None = None,
    facts: Mapping[str, Any] | None = None,
    team: Team | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Architecture:
    """Stream `checkpoint` into a TensorRT-LLM checkpoint directory; returns the padded Architecture.

    `quantized` holds FP8 scales made for `prepare(checkpoint, ...)`; `facts` go into the manifest.
    Raises UserError for a tp_size or pp_size that does not fit, a weight TensorRT refuses, a full
    disk, or an output that exists; nothing is left behind then.
    """
    team = team or Team()
    whole = team.together(lambda: prepare(checkpoint, tp_size, pp_size, dtype, fused_mlp))
    values = layout.config(
        whole.architecture,
        whole.dtype,
        tp_size=tp_size,
        pp_size=pp_size,
        quantized=quantized is not None,
        kv_cache_quantized=quantized is not None and quantized.kv_cache,
    )
    manifest.write_directory(
        output,
        weights(whole, tp_size, pp_size, quantized),
        {"config.json": json_bytes(values)},
        {"kind": "tensorrt-llm", "source": checkpoint.digest, **(facts or {})},
        team=team,
        threads=threads,
        progress=progress,
    )
    return whole.architecture


def prepare(
    checkpoint: Checkpoint, tp_size: int, pp_size: int, dtype: str | None = None, fused_mlp: bool = True
) -> Checkpoint:
    """The checkpoint with target dtype and padded widths, every limit checked. Raises UserError.

    `fused_mlp` says whether the engine will join gate and up, as trtllm-build does by default.
    """
    dtype = dtype or checkpoint.dtype
    if dtype not in layout.DTYPES:
        raise UserError(
            f"dtype: {dtype!r} is no TensorRT-LLM weight dtype; choose --dtype {' or '.join(layout.DTYPES)}"
        )
    check_sequential(checkpoint.architecture, "a TensorRT-LLM checkpoint")
    model_class(checkpoint.architecture)
    layout.rotary_scaling(checkpoint.architecture.rope)
    whole = pad_widths(checkpoint.cast(dtype), tp_size)
    check_stages(whole.architecture, pp_size)
    check_elements(whole.architecture, tp_size, fused_mlp)
    return whole


def largest_weight(local: Architecture, index: int, fused_mlp: bool) -> int:
    """Elements of the largest TensorRT weight of a rank's layer: gate and up count as one where joined."""
    layer = local.layers[index]
    qkv = (local.q_size + 2 * layer.num_key_value_heads * local.head_dim) * local.hidden_size
    others = (prod(shape) for shape in layer_shapes(local, index).values())
    return max(_ffn_weight(local, index, fused_mlp), qkv if layer.num_key_value_heads else 0, *others, 0)


def _ffn_weight(local: Architecture, index: int, fused_mlp: bool) -> int:
    return (1 + fused_mlp) * local.layers[index].intermediate_size * local.hidden_size


def check_elements(whole: Architecture, tp_size: int, fused_mlp: bool) -> None:
    """Raise UserError for a weight that TensorRT refuses; the message says what would fit."""
    local = whole.shard(tp_size)
    for index in range(len(local.layers)):
        elements = largest_weight(local, index, fused_mlp)
        if elements <= MAX_ELEMENTS:
            continue
        if elements == _ffn_weight(local, index, fused_mlp):
            what = "joined gate and up weight" if fused_mlp else "gate weight"
            remedy = _what_fits(whole, index, tp_size, fused_mlp)
        else:
            what, remedy = "largest weight of the attention", "raise --tp"
        raise UserError(
            f"layer {index}: the {what} has {elements:,} elements a rank, TensorRT takes "
            f"{MAX_ELEMENTS:,}; {remedy}"
        )
    vocabulary = local.vocab_size * local.hidden_size
    if vocabulary > MAX_ELEMENTS:
        raise UserError(
            f"vocab_size: the embedding has {vocabulary:,} elements, TensorRT takes {MAX_ELEMENTS:,}; "
            "no option makes it smaller"
        )


def _what_fits(whole: Architecture, index: int, tp_size: int, fused_mlp: bool) -> str:
    """The remedies for an FFN that is too wide: smaller groups, larger TP, gate and up not joined."""
    members, width, joined = whole.layers[index].members, whole.layers[index].intermediate_size, 1 + fused_mlp
    fits = MAX_ELEMENTS // (joined * whole.hidden_size) * tp_size
    remedies = []
    per_group = fits * len(members) // width
    if len(members) > 1 and per_group > 0:
        remedies.append(f"fuse groups of {per_group} such FFNs at most (width {fits:,})")
    needed = -(-joined * whole.hidden_size * width // MAX_ELEMENTS)
    larger = [n for n in range(needed, whole.num_attention_heads + 1) if whole.num_attention_heads % n == 0]
    if larger:
        remedies.append(f"raise --tp to {larger[0]}")
    if fused_mlp and width // tp_size * whole.hidden_size <= MAX_ELEMENTS:
        remedies.append("or give --no-fused-mlp and build with use_fused_mlp disabled")
    return ", ".join(remedies) or "no group and no TP would fit"


def weights(
    whole: Checkpoint, tp_size: int, pp_size: int, quantized: Quantized | None = None
) -> dict[str, dict[str, Expression]]:
    """The tensors of every rank file, by file. `whole` comes from `prepare`."""
    if quantized:
        whole = quantized.apply(whole)
    kind = model_class(whole.architecture)
    shares = [shard(whole, tp_size, r).decoder_tensors() for r in range(tp_size)]
    files = {}
    for rank in range(tp_size * pp_size):
        stage, tp_rank = divmod(rank, tp_size)
        layers = stage_layers(len(whole.architecture.layers), pp_size, stage)
        tensors = shares[tp_rank] | (quantized.scales() if quantized else {})
        files[f"rank{rank}.safetensors"] = {
            layout.trtllm_name(name, kind, layers.start): x
            for name, x in tensors.items()
            if layout.on_stage(name, layers, stage, pp_size)
        }
    return files
