"""Tiny real models: random weights, a real tokenizer, every file an ordinary one has."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "FFN_FUSION_COMPILE_CACHE" not in os.environ:  # nothing from, or into, the user's own
    os.environ["FFN_FUSION_COMPILE_CACHE"] = tempfile.mkdtemp(prefix="ffn-fusion-compiled-")
    atexit.register(shutil.rmtree, os.environ["FFN_FUSION_COMPILE_CACHE"], ignore_errors=True)

TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "def main(argv): return 0",
    "naïve café 日本語 🙂",
] * 20


def write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_llama(directory: Path, *, seed: int = 0, dtype: str = "float32", **overrides: object) -> Path:
    """A LlamaForCausalLM directory as transformers saves it, norm weights random as well."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    values = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.15,
        "eos_token_id": 0,
        "bos_token_id": None,
        **overrides,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**values))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.4, 1.6)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Llama of 6 layers in float32 with a tokenizer."""
    return write_llama(tmp_path_factory.mktemp("models") / "tiny")


def fused(directory: Path):
    """Layers 2-5 without attention, 2-4 fused: attention at 0 and 1, a wide FFN, a lone FFN."""
    from builder import huggingface
    from builder.surgery.attention import drop_attention
    from builder.surgery.fusion import default_groups, fuse

    dropped = drop_attention(huggingface.read(directory), {2, 3, 4, 5})
    return fuse(dropped, default_groups(dropped.architecture))


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fused model as a TensorRT-LLM checkpoint, TP 1."""
    from builder import trtllm

    output = tmp_path_factory.mktemp("checkpoints") / "tp1"
    trtllm.convert(fused(tiny_hf), output)
    return output


@pytest.fixture(scope="session")
def tiny_checkpoint_tp2(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fused model as a TensorRT-LLM checkpoint, TP 2."""
    from builder import trtllm

    output = tmp_path_factory.mktemp("checkpoints") / "tp2"
    trtllm.convert(fused(tiny_hf), output, tp_size=2)
    return output


@pytest.fixture(scope="session")
def tiny_engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedded engine, TP 1."""
    from engines.embedded.compilation import build

    output = tmp_path_factory.mktemp("engines") / "tp1"
    build(tiny_checkpoint, output, max_batch_size=4, max_input_len=96, max_seq_len=160)
    return output


@pytest.fixture(scope="session")
def tiny_engine_tp2(tiny_checkpoint_tp2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedded engine, TP 2."""
    from engines.embedded.compilation import build

    output = tmp_path_factory.mktemp("engines") / "tp2"
    build(tiny_checkpoint_tp2, output, max_batch_size=4, max_input_len=96, max_seq_len=160)
    return output


def random_checkpoint(architecture, *, seed: int = 0, dtype: str = "float32"):
    """A Checkpoint of random numbers, norms around 1."""
    import numpy as np

    from builder.checkpoint import Checkpoint, tensor_shapes
    from builder.tensors import NUMPY_DTYPES, Constant

    rng = np.random.default_rng(seed)
    arrays = {
        name: rng.uniform(0.4, 1.6, shape) if "norm" in name else rng.standard_normal(shape) * 0.15
        for name, shape in tensor_shapes(architecture).items()
    }
    return Checkpoint(
        architecture=architecture,
        tensors={n: Constant(a.astype(NUMPY_DTYPES[dtype]), dtype) for n, a in arrays.items()},
        dtype=dtype,
        digest="",
    )


def run_ranks(checkpoints: list, tokens, positions) -> list:
    """Each rank's logits; ranks are threads that meet at a barrier for their collectives."""
    import threading
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from builder.decoder import load

    size = len(checkpoints)
    barrier, parts = threading.Barrier(size), [None] * size

    def run(rank: int):
        def collect(x):
            parts[rank] = x
            barrier.wait(timeout=30)
            all_parts = list(parts)
            barrier.wait(timeout=30)
            return all_parts

        with torch.no_grad():
            decoder = load(
                checkpoints[rank],
                all_reduce=lambda x: torch.stack(collect(x)).sum(0),
                all_gather=lambda x: torch.cat(collect(x), -1),
            )
            return decoder(tokens, positions)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
