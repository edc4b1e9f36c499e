"""The fused Hugging Face directory: loaded by transformers, read back by us, and its config's bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import fused, write_llama

from builder import export, huggingface
from builder.config import ffn_mult, ffn_width
from builder.decoder import load
from builder.errors import UserError


@pytest.fixture(scope="module")
def exported(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exported") / "fused"
    export.write(fused(tiny_hf), tiny_hf, output)
    return output


def transformers_model(directory: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)


def test_transformers_gives_the_decoders_logits(exported: Path, tiny_hf: Path) -> None:
    tokens = torch.arange(40).reshape(2, 20) * 7 % 320
    expected = load(fused(tiny_hf))(tokens, torch.arange(20).expand(2, 20))
    model = transformers_model(exported)
    assert type(model).__name__ == "DeciLMForCausalLM"
    torch.testing.assert_close(model(tokens).logits, expected)
    torch.testing.assert_close(
        load(huggingface.read(exported))(tokens, torch.arange(20).expand(2, 20)), expected
    )


def test_transformers_generates_with_its_cache(exported: Path) -> None:
    model = transformers_model(exported)
    prompt = torch.tensor([[5, 17, 200, 31]])
    with_cache = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    without = model.generate(
        prompt, max_new_tokens=12, do_sample=False, use_cache=False, pad_token_id=0, eos_token_id=None
    )
    assert with_cache.shape == (1, 16)
    assert torch.equal(with_cache, without)


def test_transformers_saves_what_it_loaded(exported: Path, tmp_path: Path) -> None:
    transformers_model(exported).save_pretrained(tmp_path / "again")
    again, first = (json.loads((d / "config.json").read_text()) for d in (tmp_path / "again", exported))
    assert again["block_configs"] == first["block_configs"]


def test_config_says_what_other_readers_need(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "nemotron-nas"
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
    assert [b["attention"]["no_op"] for b in config["block_configs"]] == [False, False, True, True]
    assert [b["ffn"]["ffn_mult"] for b in config["block_configs"]] == [
        6.0,
        6.0,
        12.0,
        6.0,
    ]  # 256, 256, 512, 256
    assert config["block_configs"][0]["attention"]["n_heads_in_group"] == 2
    assert config["fused_from_layers"] == [[0], [1], [2, 3, 4], [5]]
    assert (exported / "tokenizer.json").is_file()


def test_attention_free_blocks_keep_the_ffn_norm_only(exported: Path) -> None:
    from safetensors import safe_open

    with safe_open(exported / "model.safetensors", "pt") as file:
        names = [n for n in file.keys() if n.startswith("model.layers.2.")]  # noqa: SIM118
    assert sorted(n.removeprefix("model.layers.2.") for n in names) == [
        "mlp.down_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "post_attention_layernorm.weight",
    ]


def test_unchanged_llama_stays_llama(tiny_hf: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export.write(huggingface.read(tiny_hf), tiny_hf, tmp_path / "same")
    same, first = (AutoModelForCausalLM.from_pretrained(d) for d in (tmp_path / "same", tiny_hf))
    assert type(same).__name__ == "LlamaForCausalLM"
    for (name, a), (_, b) in zip(same.state_dict().items(), first.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_large_models_are_sharded(tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", 200_000)
    checkpoint = fused(tiny_hf)
    export.write(checkpoint, tiny_hf, tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 2
    tokens, positions = torch.arange(20)[None], torch.arange(20)[None]
    expected = load(checkpoint)(tokens, positions)
    torch.testing.assert_close(load(huggingface.read(tmp_path / "sharded"))(tokens, positions), expected)
    torch.testing.assert_close(transformers_model(tmp_path / "sharded")(tokens).logits, expected)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    directory = write_llama(tmp_path / "m", tie_word_embeddings=True)
    export.write(fused(directory), directory, tmp_path / "fused")
    tokens, positions = torch.arange(20)[None], torch.arange(20)[None]
    torch.testing.assert_close(
        transformers_model(tmp_path / "fused")(tokens).logits, load(fused(directory))(tokens, positions)
    )


@pytest.mark.parametrize("hidden", [64, 128, 192, 4096, 8192, 16384])
def test_every_multiple_of_256_round_trips(hidden: int) -> None:
    for width in range(256, 256 * 600, 256):
        assert ffn_width(ffn_mult(width, hidden), hidden) == width


def test_existing_output_is_left_alone(tiny_hf: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep").write_text("x")
    with pytest.raises(UserError, match="exists; remove it"):
        export.write(fused(tiny_hf), tiny_hf, tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "keep"]
