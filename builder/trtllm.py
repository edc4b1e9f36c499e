"""The TensorRT-LLM checkpoint format: config.json and rankN.safetensors, N = pp_rank * tp_size + tp_rank.

Written for TensorRT-LLM 0.20 to 1.2. Models with unlike layers are DeciLMForCausalLM with
`layer_configs`; an unchanged Llama stays LlamaForCausalLM. Layer numbers are local to a stage.
TensorRT-LLM's `fc` is the SiLU branch (gate_proj), its `gate` the other one (up_proj).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from builder.architecture import FFN, Architecture, Attention, Layer, Rope
from builder.checkpoint import Checkpoint, tensor_shapes
from builder.errors import UserError
from builder.storage import (
    Progress,
    headers_digest,
    output_directory,
    read_header,
    read_json,
    write_json,
    write_safetensors,
)
from builder.surgery.sharding import check_stages, pad_widths, shard, stage_layers
from builder.tensors import Expression, Slice

DTYPES = ("float32", "bfloat16", "float16")
MAX_ELEMENTS = 2**31 - 1  # of one TensorRT weight
DECILM, LLAMA = "DeciLMForCausalLM", "LlamaForCausalLM"

OUTSIDE_NAMES = {
    "embedding.weight": "transformer.vocab_embedding.weight",
    "norm.weight": "transformer.ln_f.weight",
    "lm_head.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.qkv": "attention.qkv",
    "attention.o": "attention.dense",
    "ffn_norm": "post_layernorm",
    "ffn.gate": "{ffn}.fc",
    "ffn.up": "{ffn}.gate",
    "ffn.down": "{ffn}.proj",
}


def trtllm_name(name: str, architecture: str, first_layer: int = 0) -> str:
    """The name of a decoder tensor in a rank file whose stage begins at `first_layer`."""
    if name in OUTSIDE_NAMES:
        return OUTSIDE_NAMES[name]
    _, index, rest = name.split(".", 2)
    local = LAYER_NAMES[rest.removesuffix(".weight")].format(ffn="mlp" if architecture == LLAMA else "ffn")
    return f"transformer.layers.{int(index) - first_layer}.{local}.weight"


def convert(
    checkpoint: Checkpoint,
    output: Path,
    *,
    tp_size: int = 1,
    pp_size: int = 1,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Architecture:
    """Stream `checkpoint` into a TensorRT-LLM checkpoint directory; returns the padded Architecture.

    Raises UserError for a tp_size or pp_size that does not fit, a weight TensorRT refuses, a full
    disk, or an output that exists; nothing is left behind then.
    """
    whole = prepare(checkpoint, tp_size, pp_size, dtype)
    kind = LLAMA if whole.architecture.uniform else DECILM
    ranks = [_rank_tensors(whole, kind, tp_size, pp_size, r) for r in range(tp_size * pp_size)]
    num_bytes = sum(x.num_bytes for tensors in ranks for x in tensors.values())
    with output_directory(output, num_bytes) as directory:
        write_json(directory / "config.json", config(whole, kind, tp_size, pp_size))
        for rank, tensors in enumerate(ranks):
            write_safetensors(directory / f"rank{rank}.safetensors", tensors, progress)
    return whole.architecture


def prepare(checkpoint: Checkpoint, tp_size: int, pp_size: int, dtype: str | None) -> Checkpoint:
    """The checkpoint with target dtype and padded widths, every limit checked."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(
            f"dtype: {dtype!r} is no TensorRT-LLM weight dtype; choose one of {', '.join(DTYPES)}"
        )
    dtype = dtype or checkpoint.dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype: the model is {dtype}; choose one of {', '.join(DTYPES)} with --dtype")
    whole = pad_widths(checkpoint.cast(dtype), tp_size)
    check_stages(whole.architecture, pp_size)
    _check_elements(whole.architecture.shard(tp_size), tp_size)
    return whole


def _check_elements(local: Architecture, tp_size: int) -> None:
    for index, layer in enumerate(local.layers):
        if layer.ffn is None:
            continue
        joined = 2 * layer.ffn.intermediate_size * local.hidden_size
        if joined > MAX_ELEMENTS:
            fits = MAX_ELEMENTS // (2 * local.hidden_size) * tp_size
            raise UserError(
                f"layer {index}: the joined gate and up weight has {joined:,} elements a rank, "
                f"TensorRT takes {MAX_ELEMENTS:,}; fuse to width {fits:,} at most or raise --tp {tp_size}"
            )


def config(checkpoint: Checkpoint, kind: str, tp_size: int, pp_size: int) -> dict[str, Any]:
    """config.json; the keys are those of TensorRT-LLM's PretrainedConfig and DeciLMConfig."""
    a = checkpoint.architecture
    widest = max((x.ffn.intermediate_size for x in a.layers if x.ffn), default=a.hidden_size)
    most_kv = max((x.attention.num_key_value_heads for x in a.layers if x.attention), default=1)
    values: dict[str, Any] = {
        "architecture": kind,
        "dtype": checkpoint.dtype,
        "logits_dtype": "float32",
        "hidden_size": a.hidden_size,
        "num_hidden_layers": len(a.layers),
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": most_kv,
        "head_size": a.head_dim,
        "intermediate_size": widest,
        "hidden_act": "silu",
        "vocab_size": a.vocab_size,
        "max_position_embeddings": a.max_position_embeddings,
        "norm_epsilon": a.norm_eps,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": a.rope.theta,
        "rotary_scaling": a.rope.to_mapping(),
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": tp_size * pp_size, "tp_size": tp_size, "pp_size": pp_size},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }
    if kind == DECILM:
        values["layer_configs"] = [_layer_config(layer) for layer in a.layers]
    return values


def _layer_config(layer: Layer) -> dict[str, Any]:
    kv = layer.attention.num_key_value_heads if layer.attention else None
    width = layer.ffn.intermediate_size if layer.ffn else None
    return {
        "attention": {"impl": "attention" if layer.attention else "no_op", "num_key_value_heads": kv},
        "ffn": {"impl": "mlp" if layer.ffn else "no_op", "intermediate_size": width},
    }


def _rank_tensors(
    whole: Checkpoint, kind: str, tp_size: int, pp_size: int, rank: int
) -> dict[str, Expression]:
    stage, tp_rank = divmod(rank, tp_size)
    layers = stage_layers(len(whole.architecture.layers), pp_size, stage)
    tensors = {}
    for name, x in shard(whole, tp_size, tp_rank).decoder_tensors().items():
        if _on_stage(name, layers, stage, pp_size):
            tensors[trtllm_name(name, kind, layers.start)] = x
    return tensors


def _on_stage(name: str, layers: range, stage: int, pp_size: int) -> bool:
    if name == "embedding.weight":
        return stage == 0
    if name in ("norm.weight", "lm_head.weight"):
        return stage == pp_size - 1
    return int(name.split(".")[1]) in layers


@dataclass(frozen=True, kw_only=True)
class TrtllmCheckpoint:
    """A TensorRT-LLM checkpoint directory; `architecture` is that of the whole model."""

    directory: Path
    kind: str
    architecture: Architecture
    tp_size: int
    pp_size: int
    dtype: str
    digest: str

    def rank(self, rank: int) -> Checkpoint:
        """One tensor-parallel rank's share (pp_size 1). Raises UserError by file and tensor."""
        assert self.pp_size == 1, "one stage"
        file = self.directory / f"rank{rank}.safetensors"
        local = replace(self.architecture.shard(self.tp_size), tie_word_embeddings=False)
        sources: Mapping[str, Expression] = read_header(file)
        tensors: dict[str, Expression] = {}
        for name, shape in _decoder_shapes(local).items():
            stored = trtllm_name(name, self.kind)
            x = sources.get(stored)
            if x is None:
                raise UserError(f"{file}: tensor {stored!r} is missing; convert the model again")
            if x.shape != shape or x.dtype != self.dtype:
                raise UserError(
                    f"{file}: tensor {stored!r} is {x.dtype} {list(x.shape)}, "
                    f"config.json says {self.dtype} {list(shape)}"
                )
            tensors[name] = x
        return Checkpoint(
            architecture=local, tensors=_split_qkv(tensors, local), dtype=self.dtype, digest=self.digest
        )


def _decoder_shapes(local: Architecture) -> dict[str, tuple[int, ...]]:
    shapes = tensor_shapes(local)
    for index, layer in enumerate(local.layers):
        if layer.attention:
            prefix = f"layers.{index}.attention."
            rows = sum(shapes.pop(f"{prefix}{n}.weight")[0] for n in "qkv")
            shapes[f"{prefix}qkv.weight"] = (rows, local.hidden_size)
    return shapes


def _split_qkv(tensors: dict[str, Expression], local: Architecture) -> dict[str, Expression]:
    split = dict(tensors)
    for index, layer in enumerate(local.layers):
        if layer.attention:
            prefix = f"layers.{index}.attention."
            joined, kv_size = (
                split.pop(f"{prefix}qkv.weight"),
                layer.attention.num_key_value_heads * local.head_dim,
            )
            bounds = (0, local.q_size, local.q_size + kv_size, local.q_size + 2 * kv_size)
            for name, first, last in zip("qkv", bounds, bounds[1:], strict=False):
                split[f"{prefix}{name}.weight"] = Slice(joined, 0, first, last)
    return split


def read(directory: Path) -> TrtllmCheckpoint:
    """Read a checkpoint directory's config. Raises UserError naming the field that is off."""
    file = directory / "config.json"
    values = read_json(file)
    kind = values.get("architecture")
    if kind not in (DECILM, LLAMA):
        raise UserError(
            f"{file}: architecture {kind!r} is not {DECILM} or {LLAMA}; write it with `ffn-fusion convert`"
        )
    if (values.get("quantization") or {}).get("quant_algo"):
        raise UserError(f"{file}: quant_algo {values['quantization']['quant_algo']!r} is not supported here")
    try:
        architecture = _read_architecture(values)
        mapping = values["mapping"]
        tp_size, pp_size, dtype = int(mapping["tp_size"]), int(mapping["pp_size"]), str(values["dtype"])
    except KeyError as error:
        raise UserError(f"{file}: key {error} is missing; convert the model again") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: {error}; convert the model again") from None
    if dtype not in DTYPES:
        raise UserError(f"{file}: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    files = [directory / f"rank{r}.safetensors" for r in range(tp_size * pp_size)]
    for rank_file in files:
        if not rank_file.is_file():
            raise UserError(f"{rank_file}: missing; convert the model again")
    return TrtllmCheckpoint(
        directory=directory,
        kind=kind,
        architecture=architecture,
        tp_size=tp_size,
        pp_size=pp_size,
        dtype=dtype,
        digest=headers_digest(file, files),
    )


def _read_architecture(values: dict[str, Any]) -> Architecture:
    count = int(values["num_hidden_layers"])
    uniform = {
        "attention": {"num_key_value_heads": values["num_key_value_heads"]},
        "ffn": {"intermediate_size": values["intermediate_size"]},
    }
    entries = values.get("layer_configs") or [uniform] * count
    if len(entries) != count:
        raise ValueError(f"layer_configs has {len(entries)} entries, num_hidden_layers is {count}")
    layers = []
    for index, entry in enumerate(entries):
        kv, width = entry["attention"]["num_key_value_heads"], entry["ffn"]["intermediate_size"]
        attention = Attention(num_key_value_heads=int(kv)) if kv is not None else None
        ffn = FFN(intermediate_size=int(width)) if width is not None else None
        layers.append(Layer(attention=attention, ffn=ffn, members=(index,)))
    return Architecture(
        hidden_size=int(values["hidden_size"]),
        num_attention_heads=int(values["num_attention_heads"]),
        head_dim=int(values["head_size"]),
        vocab_size=int(values["vocab_size"]),
        max_position_embeddings=int(values["max_position_embeddings"]),
        norm_eps=float(values["norm_epsilon"]),
        rope=Rope.from_mapping(values["rotary_base"], values["rotary_scaling"]),
        tie_word_embeddings=False,
        layers=tuple(layers),
    )
