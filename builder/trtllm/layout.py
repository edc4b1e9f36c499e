"""Names and config.json of a TensorRT-LLM checkpoint, 0.20 to 1.2.

Models with unlike layers are DeciLMForCausalLM with `layer_configs`; a plain Llama stays
LlamaForCausalLM, a plain Qwen2 stays Qwen2ForCausalLM. Layer numbers are local to a stage.
TensorRT-LLM's `fc` is the SiLU branch (gate_proj), its `gate` the other one (up_proj). A matrix in
the place of an attention or FFN is called as the part it replaces.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from builder.architecture import Architecture, Layer, Linear
from builder.errors import UserError
from builder.model_class import DECILM, LLAMA, QWEN, model_class
from builder.rope import Rope, yarn_magnitude

DTYPES = ("float32", "bfloat16", "float16")
KINDS = (DECILM, LLAMA, QWEN)

OUTSIDE_NAMES = {
    "embedding.weight": "transformer.vocab_embedding.weight",
    "norm.weight": "transformer.ln_f.weight",
    "lm_head.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.qkv": "attention.qkv",
    "attention.o": "attention.dense",
    "attention.linear": "attention",
    "attention": "attention",
    "ffn_norm": "post_layernorm",
    "ffn.gate": "{ffn}.fc",
    "ffn.up": "{ffn}.gate",
    "ffn.down": "{ffn}.proj",
    "ffn.linear": "{ffn}",
}


def trtllm_name(name: str, kind: str, first_layer: int = 0) -> str:
    """The name of a decoder tensor in a rank file whose stage begins at `first_layer`."""
    if name in OUTSIDE_NAMES:
        return OUTSIDE_NAMES[name]
    _, index, rest = name.split(".", 2)
    module, _, what = rest.rpartition(".")
    local = LAYER_NAMES[module].format(ffn="ffn" if kind == DECILM else "mlp")
    return f"transformer.layers.{int(index) - first_layer}.{local}.{what}"


def on_stage(name: str, layers: range, stage: int, pp_size: int) -> bool:
    """Whether a decoder tensor lies on a pipeline stage that holds `layers`."""
    if name == "embedding.weight":
        return stage == 0
    if name in ("norm.weight", "lm_head.weight"):
        return stage == pp_size - 1
    return int(name.split(".")[1]) in layers


def config(
    architecture: Architecture,
    dtype: str,
    *,
    tp_size: int = 1,
    pp_size: int = 1,
    quantized: bool = False,
    kv_cache_quantized: bool = False,
) -> dict[str, Any]:
    """config.json; the keys are those of TensorRT-LLM's PretrainedConfig, DeciLMConfig and QWenConfig."""
    a, kind = architecture, model_class(architecture)
    quantization: dict[str, Any] = {
        "quant_algo": "FP8" if quantized else None,
        "kv_cache_quant_algo": "FP8" if kv_cache_quantized else None,
    }
    if quantized:
        quantization["exclude_modules"] = ["lm_head"]
    values: dict[str, Any] = {
        "architecture": kind,
        "dtype": dtype,
        "logits_dtype": "float32",
        "hidden_size": a.hidden_size,
        "num_hidden_layers": len(a.layers),
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": max(x.num_key_value_heads for x in a.layers) or 1,
        "head_size": a.head_dim,
        "intermediate_size": max(x.intermediate_size for x in a.layers) or a.hidden_size,
        "hidden_act": "silu",
        "vocab_size": a.vocab_size,
        "max_position_embeddings": a.max_position_embeddings,
        "norm_epsilon": a.norm_eps,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": a.rope.theta,
        "rotary_scaling": rotary_scaling(a.rope),
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": tp_size * pp_size, "tp_size": tp_size, "pp_size": pp_size},
        "quantization": quantization,
    }
    if kind == DECILM:
        values["layer_configs"] = [_layer_config(layer) for layer in a.layers]
    if kind == QWEN:
        values |= {"qwen_type": "qwen2", "attn_bias": True, "mlp_bias": False}
        values |= {"seq_length": a.max_position_embeddings, "tie_word_embeddings": False}
    return values


def rotary_scaling(rope: Rope) -> dict[str, Any] | None:
    """`rotary_scaling`: Hugging Face's, but that yarn's magnitude is told by `mscale` alone.

    TensorRT-LLM reads no attention_factor, rounds yarn's range, and multiplies by
    (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1). Raises UserError for a yarn
    that this cannot say.
    """
    values = rope.to_mapping()
    if values is None or rope.kind != "yarn":
        return values
    if values.get("truncate") is False:
        raise UserError("rope_scaling.truncate: false is not known to TensorRT-LLM, which rounds the range")
    factor, magnitude = values["factor"], rope.magnitude
    if factor <= 1 and magnitude != 1:
        raise UserError(f"rope_scaling.attention_factor: {magnitude} cannot be said at factor {factor}")
    mscale = (magnitude - 1) / (0.1 * math.log(factor)) if factor > 1 else 1.0
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": values["original_max_position_embeddings"],
        "beta_fast": values.get("beta_fast", 32.0),
        "beta_slow": values.get("beta_slow", 1.0),
        "mscale": mscale,
        "mscale_all_dim": 0.0,
    }


def read_rope(theta: float, scaling: dict[str, Any] | None) -> Rope:
    """The Rope that `rotary_base` and `rotary_scaling` describe. Raises UserError."""
    rope = Rope.from_mapping(theta, scaling)
    numbers = dict(rope.scaling)
    if rope.kind != "yarn" or numbers.get("mscale_all_dim"):
        return rope
    mscale = numbers.pop("mscale", 1.0)
    numbers.pop("mscale_all_dim", None)
    numbers["attention_factor"] = yarn_magnitude(numbers["factor"], mscale)
    return replace(rope, scaling=tuple(numbers.items()))


def _layer_config(layer: Layer) -> dict[str, Any]:
    attention, ffn = layer.attention, layer.ffn
    return {
        "attention": {
            "impl": _implementation(attention, "attention"),
            "num_key_value_heads": layer.num_key_value_heads or None,
        },
        "ffn": {"impl": _implementation(ffn, "mlp"), "intermediate_size": layer.intermediate_size or None},
    }


def _implementation(part: object, whole: str) -> str:
    if part is None:
        return "no_op"
    return "linear" if isinstance(part, Linear) else whole
