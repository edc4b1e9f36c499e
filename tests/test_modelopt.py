"""Plain Llama shards against NVIDIA ModelOpt's export of the same model, rank by rank."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from conftest import write_llama
from safetensors.torch import load_file

from builder import huggingface, trtllm


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (2, 2)])
def test_shards_are_modelopts(tmp_path: Path, tp_size: int, pp_size: int) -> None:
    """Every tensor of every rank but the embedding, which ModelOpt shards and we keep whole."""
    model = write_llama(tmp_path / "m", dtype="bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.export import export_tensorrt_llm_checkpoint
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        with torch.inference_mode():
            export_tensorrt_llm_checkpoint(
                theirs,
                "llama",
                torch.bfloat16,
                export_dir=str(tmp_path / "theirs"),
                inference_tensor_parallel=tp_size,
                inference_pipeline_parallel=pp_size,
            )
    trtllm.convert(huggingface.read(model), tmp_path / "ours", tp_size=tp_size, pp_size=pp_size)
    compared = 0
    for rank in range(tp_size * pp_size):
        expected = load_file(tmp_path / "theirs" / f"rank{rank}.safetensors")
        actual = load_file(tmp_path / "ours" / f"rank{rank}.safetensors")
        assert actual.keys() == expected.keys()
        for name in actual.keys() - {"transformer.vocab_embedding.weight"}:
            assert torch.equal(actual[name], expected[name]), (rank, name)
            compared += 1
    assert compared == tp_size * (6 * 7 + 2)
    ours, reference = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("ours", "theirs"))
    for key in (
        "architecture",
        "dtype",
        "hidden_size",
        "head_size",
        "norm_epsilon",
        "position_embedding_type",
    ):
        assert ours[key] == reference[key], key
