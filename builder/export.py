"""Write a Checkpoint as a Hugging Face directory: nemotron-nas, or Llama or Qwen2 where layers are alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder import manifest, nemotron_nas
from builder.architecture import Architecture, Layer, Linear
from builder.checkpoint import Checkpoint
from builder.config import FFN_MULTIPLE, ffn_mult
from builder.huggingface import hf_name
from builder.model_class import DECILM, LLAMA, QWEN, model_class
from builder.storage import json_bytes, read_json
from builder.surgery.ffn import pad_widths
from builder.surgery.parallel import check_sequential
from builder.team import Team
from builder.tensors import Expression
from builder.writer import Progress

MODEL_TYPES = {DECILM: "nemotron-nas", LLAMA: "llama", QWEN: "qwen2"}

SHARD_BYTES = 5_000_000_000
# Files that travel with a model unchanged.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
CODE = ("configuration_decilm.py", "modeling_decilm.py")


def write(
    checkpoint: Checkpoint,
    source: Path,
    output: Path,
    *,
    facts: Mapping[str, Any] | None = None,
    team: Team | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Architecture:
    """Write `checkpoint`, made from the model directory `source`; returns the padded Architecture.

    `facts` go into the manifest. Raises UserError for what the format cannot say, and where the
    output exists or the disk is full; nothing is left behind then.
    """
    team = team or Team()
    kind = team.together(lambda: _kind(checkpoint.architecture))
    if kind == DECILM:
        checkpoint = pad_widths(checkpoint, FFN_MULTIPLE)
    shards = _shards({hf_name(name): x for name, x in checkpoint.tensors.items()})
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    texts = {"config.json": json_bytes(_config(checkpoint, source, kind))}
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        texts["model.safetensors.index.json"] = json_bytes(_index(names, shards))
    texts |= {name: (source / name).read_bytes() for name in COMPANIONS if (source / name).is_file()}
    if kind == DECILM:
        code = Path(nemotron_nas.__path__[0])
        texts |= {name: (code / name).read_bytes() for name in CODE}
    manifest.write_directory(
        output,
        dict(zip(names, shards, strict=True)),
        texts,
        {"kind": "hugging-face", "source": checkpoint.digest, **(facts or {})},
        team=team,
        threads=threads,
        progress=progress,
    )
    return checkpoint.architecture


def _kind(architecture: Architecture) -> str:
    kind = model_class(architecture)
    check_sequential(architecture, f"a Hugging Face directory ({MODEL_TYPES[kind]})")
    return kind


def _index(names: list[str], shards: list[dict[str, Expression]]) -> dict[str, Any]:
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(x.num_bytes for shard in shards for x in shard.values())
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _shards(tensors: dict[str, Expression]) -> list[dict[str, Expression]]:
    shards: list[dict[str, Expression]] = [{}]
    size = 0
    for name, x in tensors.items():
        if shards[-1] and size + x.num_bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = x
        size += x.num_bytes
    return shards


def _config(checkpoint: Checkpoint, source: Path, kind: str) -> dict[str, Any]:
    a = checkpoint.architecture
    given = read_json(source / "config.json")
    rope = a.rope.to_mapping()
    values: dict[str, Any] = {
        "architectures": [kind],
        "model_type": MODEL_TYPES[kind],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": given.get("bos_token_id"),
        "eos_token_id": given.get("eos_token_id"),
        "pad_token_id": given.get("pad_token_id"),
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "hidden_size": a.hidden_size,
        "initializer_range": given.get("initializer_range", 0.02),
        "intermediate_size": max(x.intermediate_size for x in a.layers) or a.hidden_size,
        "max_position_embeddings": a.max_position_embeddings,
        "mlp_bias": False,
        "num_attention_heads": a.num_attention_heads,
        "num_hidden_layers": len(a.layers),
        "num_key_value_heads": max(x.num_key_value_heads for x in a.layers) or a.num_attention_heads,
        "rms_norm_eps": a.norm_eps,
        # Readers of today and of yesterday want one spelling each.
        "rope_theta": a.rope.theta,
        "rope_scaling": rope,
        "rope_parameters": {"rope_theta": a.rope.theta, "rope_type": "default", **(rope or {})},
        "tie_word_embeddings": a.tie_word_embeddings,
        "torch_dtype": checkpoint.dtype,
        "use_cache": True,
        "vocab_size": a.vocab_size,
    }
    if kind == QWEN:  # its biases are the model type's own
        del values["attention_bias"], values["mlp_bias"]
        values["use_sliding_window"] = False
    if kind == DECILM:
        values["auto_map"] = {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
        }
        values["block_configs"] = [_block(a, layer) for layer in a.layers]
        values["fused_from_layers"] = [list(layer.members) for layer in a.layers]
    return values


def _block(architecture: Architecture, layer: Layer) -> dict[str, Any]:
    attention: dict[str, Any] = {"n_heads_in_group": None, "no_op": True, "replace_with_linear": False}
    attention |= {"num_sink_tokens": None, "sparsify": None, "unshifted_sink": False}
    attention |= {"use_prefill_window_in_sink_attention": False, "window_length": None}
    ffn: dict[str, Any] = {"ffn_mult": None, "no_op": True, "replace_with_linear": False, "sparsify": None}
    if isinstance(layer.attention, Linear):
        attention |= {"no_op": False, "replace_with_linear": True}
    elif layer.attention:
        group = architecture.num_attention_heads // layer.num_key_value_heads
        attention |= {"n_heads_in_group": group, "no_op": False}
    if isinstance(layer.ffn, Linear):
        ffn |= {"no_op": False, "replace_with_linear": True}
    elif layer.ffn:
        ffn |= {"ffn_mult": ffn_mult(layer.intermediate_size, architecture.hidden_size), "no_op": False}
    return {"attention": attention, "ffn": ffn}
