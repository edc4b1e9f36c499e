"""The reference decoder against transformers, with and without a cache, whole and cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import fused, run_ranks, write_llama

from builder import huggingface
from builder.decoder import Decoder, load
from builder.surgery.ffn import pad_widths
from builder.surgery.sharding import shard

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_TUNED = {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.8, "mscale_all_dim": 0.4}
YARN_PLAIN = {**YARN, "attention_factor": 1.25, "truncate": False}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}


def tokens_and_positions(batch: int = 2, length: int = 33) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 320, (batch, length), generator=torch.Generator().manual_seed(1))
    return tokens, torch.arange(length).expand(batch, length)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": LINEAR},
        {"rope_parameters": YARN},
        {"rope_parameters": YARN_TUNED},
        {"rope_parameters": YARN_PLAIN},
        {"tie_word_embeddings": True},
        {"head_dim": 24},
    ],
    ids=["plain", "llama3", "linear", "yarn", "yarn tuned", "yarn plain", "tied", "head_dim"],
)
def test_logits_are_those_of_transformers(tmp_path: Path, overrides: dict) -> None:
    from transformers import AutoModelForCausalLM

    directory = write_llama(tmp_path / "m", **overrides)
    tokens, positions = tokens_and_positions()
    expected = AutoModelForCausalLM.from_pretrained(directory)(tokens).logits
    torch.testing.assert_close(load(huggingface.read(directory))(tokens, positions), expected)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_shards_sum_to_the_whole(tiny_hf: Path, tp_size: int) -> None:
    """Ranks are threads that meet at a barrier to sum. TP 4 repeats KV heads."""
    whole = pad_widths(fused(tiny_hf), tp_size)
    tokens, positions = tokens_and_positions()
    expected = load(whole)(tokens, positions)
    ranks = run_ranks([shard(whole, tp_size, r) for r in range(tp_size)], tokens, positions)
    actual = torch.cat(ranks, -1)[..., : whole.architecture.vocab_size]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_decoder_names_every_weight(tiny_hf: Path) -> None:
    checkpoint = fused(tiny_hf)
    assert set(Decoder(checkpoint.architecture).state_dict()) == set(checkpoint.decoder_tensors())
