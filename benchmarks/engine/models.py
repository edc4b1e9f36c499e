"""The models measured: Llama shapes with random weights in bfloat16, which float32 holds exactly."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

from builder import export, huggingface, random_weights
from builder.storage import write_json

SHAPES: dict[str, dict[str, Any]] = {
    "254M": {
        "hidden_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2816,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "1B": {  # Llama 3.2 1B
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
}
# Bytes of a weight in memory, scales not counted.
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
_SEED = 0


def config(shape: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": shape["vocab_size"] - 2,
        "eos_token_id": shape["vocab_size"] - 1,
        **shape,
    }


def write(shape: dict[str, Any], directory: Path) -> None:
    """The Hugging Face directory that `fuse CONFIG.json --random-weights --no-fuse` writes."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "config.json"
        write_json(file, config(shape))
        (made := Path(scratch) / "made").mkdir()
        source, checkpoint = random_weights.read(file, _SEED, made)
        export.write(checkpoint, source, directory)


def prompts(vocab_size: int, count: int, length: int) -> list[list[int]]:
    """Random prompts, the same in every run; the first is the same whatever the count."""
    numbers = random.Random(_SEED)
    return [[numbers.randrange(256, vocab_size - 2) for _ in range(length)] for _ in range(count)]


def read_per_token(model: Path) -> int:
    """The weights that one token of one sequence needs; of the input embedding it needs one row."""
    a = huggingface.read_architecture(model)
    return a.num_parameters - (0 if a.tie_word_embeddings else a.vocab_size * a.hidden_size)


def vocab_size(model: Path) -> int:
    """Of a model directory."""
    return huggingface.read_architecture(model).vocab_size
