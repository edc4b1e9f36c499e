"""Write a Checkpoint as a Hugging Face directory: nemotron-nas, or plain Llama where layers are alike."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from builder import nemotron_nas
from builder.architecture import Architecture, Layer
from builder.checkpoint import Checkpoint
from builder.huggingface import FFN_MULTIPLE, ffn_mult, hf_name
from builder.storage import Progress, output_directory, read_json, write_json, write_safetensors
from builder.surgery.sharding import pad_widths
from builder.tensors import Expression

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
    checkpoint: Checkpoint, source: Path, output: Path, progress: Progress | None = None
) -> Architecture:
    """Write `checkpoint`, made from the model directory `source`; returns the padded Architecture.

    Raises UserError where the output exists or the disk is full; nothing is left behind then.
    """
    plain = checkpoint.architecture.uniform
    if not plain:
        checkpoint = pad_widths(checkpoint, FFN_MULTIPLE)
    tensors = {hf_name(name): x for name, x in checkpoint.tensors.items()}
    with output_directory(output, sum(x.num_bytes for x in tensors.values())) as directory:
        write_json(directory / "config.json", _config(checkpoint, source, plain))
        _write_weights(directory, tensors, progress)
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)
        if not plain:
            for name in CODE:
                shutil.copyfile(Path(nemotron_nas.__path__[0]) / name, directory / name)
    return checkpoint.architecture


def _write_weights(directory: Path, tensors: dict[str, Expression], progress: Progress | None) -> None:
    shards = _shards(tensors)
    if len(shards) == 1:
        write_safetensors(directory / "model.safetensors", tensors, progress)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(directory / name, shard, progress)
        weight_map.update(dict.fromkeys(shard, name))
    total = sum(x.num_bytes for x in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)


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


def _config(checkpoint: Checkpoint, source: Path, plain: bool) -> dict[str, Any]:
    a = checkpoint.architecture
    given = read_json(source / "config.json")
    rope = a.rope.to_mapping()
    widest = max((x.ffn.intermediate_size for x in a.layers if x.ffn), default=a.hidden_size)
    values: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM" if plain else "DeciLMForCausalLM"],
        "model_type": "llama" if plain else "nemotron-nas",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": given.get("bos_token_id"),
        "eos_token_id": given.get("eos_token_id"),
        "pad_token_id": given.get("pad_token_id"),
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "hidden_size": a.hidden_size,
        "initializer_range": given.get("initializer_range", 0.02),
        "intermediate_size": widest,
        "max_position_embeddings": a.max_position_embeddings,
        "mlp_bias": False,
        "num_attention_heads": a.num_attention_heads,
        "num_hidden_layers": len(a.layers),
        "num_key_value_heads": max(
            (x.attention.num_key_value_heads for x in a.layers if x.attention), default=a.num_attention_heads
        ),
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
    if not plain:
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
    if layer.attention:
        group = architecture.num_attention_heads // layer.attention.num_key_value_heads
        attention |= {"n_heads_in_group": group, "no_op": False}
    if layer.ffn:
        mult = ffn_mult(layer.ffn.intermediate_size, architecture.hidden_size)
        ffn |= {"ffn_mult": mult, "no_op": False}
    return {"attention": attention, "ffn": ffn}
