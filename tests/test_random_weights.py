"""Random weights for a bare config.json: the numbers, the commands, and what transformers makes of them."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from builder import huggingface, manifest, trtllm
from builder.checkpoint import tensor_shapes
from builder.plan import Plan
from builder.random_weights import Random, randomised
from builder.tensors import NUMPY_DTYPES
from ffn_fusion import main

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 6,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "eos_token_id": [5, 6],
}
WORD = {"bfloat16": "<u2", "float16": "<u2", "float32": "<u4", "float64": "<u8"}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "given" / "tiny.json")


def write_config(file: Path, **changes: object) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**LLAMA, **changes}))
    return file


def nemotron(**changes: object) -> dict[str, object]:
    """Attention in layers 0 and 1, 2-5 without, the FFN of layer 4 half as wide, a matrix in layer 1."""
    blocks = []
    for index in range(6):
        attention = {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False}
        if index > 1:
            attention = {"n_heads_in_group": None, "no_op": True, "replace_with_linear": False}
        ffn = {"ffn_mult": 6.0 if index != 4 else 12.0, "no_op": False, "replace_with_linear": False}
        if index == 1:
            ffn = {"ffn_mult": None, "no_op": False, "replace_with_linear": True}
        blocks.append({"attention": attention, "ffn": ffn})
    return {"model_type": "nemotron-nas", "block_configs": blocks, "intermediate_size": None, **changes}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def done(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def philox(key: int, block: int) -> bytes:
    """One block of Philox4x64 with 10 rounds (Salmon et al., SC11), in plain integers."""
    word = (1 << 64) - 1
    low, high = key & word, key >> 64
    x = [block >> (64 * i) & word for i in range(4)]
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [b >> 64 ^ x[1] ^ low, b & word, a >> 64 ^ x[3] ^ high, a & word]
        low, high = low + 0x9E3779B97F4A7C15 & word, high + 0xBB67AE8584CAA73B & word
    return b"".join(part.to_bytes(8, "little") for part in x)


@pytest.mark.parametrize(
    ("dtype", "mantissa", "sign"),
    [("bfloat16", 7, 15), ("float16", 10, 15), ("float32", 23, 31), ("float64", 52, 63)],
)
@pytest.mark.parametrize("norm", [False, True])
def test_the_numbers_are_those_of_philox(dtype: str, mantissa: int, sign: int, norm: bool) -> None:
    x = Random("a.weight", (3, 7), dtype, 11, 0.25, norm)
    key = int.from_bytes(hashlib.blake2b(b"11 a.weight", digest_size=16).digest(), "little")
    size = NUMPY_DTYPES[dtype].itemsize
    # numpy counts before it gives: the first block is the second counter.
    raw = b"".join(philox(key, 1 + n) for n in range(-(-21 * size // 32)))
    words = np.frombuffer(raw, WORD[dtype])[:21]
    bits = x.read_all().reshape(-1).view(WORD[dtype])
    lowest = int(bits[0]) - (int(words[0]) & (1 << mantissa) - 1)
    if not norm:
        lowest -= (int(words[0]) & 1 << mantissa) + (int(words[0]) & 1 << sign)
    expected = []
    for word in map(int, words):
        value = word & ((1 << mantissa) - 1 if norm else (2 << mantissa) - 1)
        expected.append(value + lowest + (0 if norm else word & 1 << sign))
    assert bits.tolist() == expected
    assert len(set(expected)) > 12


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_any_window_has_the_same_numbers(dtype: str) -> None:
    x = Random("a", (700, 333), dtype, 3, 0.1)  # several bands, and rows that begin inside a block
    whole = x.read_all()
    rng = np.random.default_rng(0)
    windows = [(0, 0, 700, 333), (699, 332, 1, 1), (1, 0, 699, 333), (0, 17, 700, 5)]
    for _ in range(40):
        row, column = int(rng.integers(700)), int(rng.integers(333))
        windows.append((row, column, int(rng.integers(1, 701 - row)), int(rng.integers(1, 334 - column))))

    def read(window: tuple[int, int, int, int]) -> np.ndarray:
        row, column, rows, columns = window
        out = np.zeros((rows, columns), NUMPY_DTYPES[dtype])
        x.fill(out, row, column)
        return out

    with ThreadPoolExecutor(4) as pool:
        for (row, column, rows, columns), part in zip(windows, pool.map(read, windows), strict=True):
            assert part.tobytes() == whole[row : row + rows, column : column + columns].tobytes()
    strided = np.zeros((20, 400), NUMPY_DTYPES[dtype])
    x.fill(strided[:, 10:343], 100, 0)
    assert strided[:, 10:343].tobytes() == whole[100:120].tobytes()
    assert not strided[:, :10].any()
    assert not strided[:, 343:].any()


def test_names_and_seeds_differ() -> None:
    base = Random("a", (64, 64), "bfloat16", 0, 0.1).read_all()
    assert np.array_equal(base, Random("a", (64, 64), "bfloat16", 0, 0.1).read_all())
    for name, seed in (("b", 0), ("a", 1), ("a", 1 << 70)):
        other = Random(name, (64, 64), "bfloat16", seed, 0.1).read_all()
        assert np.mean(base == other) < 0.02
    # Neighbouring numbers know nothing of each other.
    flat = Random("a", (1 << 18,), "float32", 0, 1.0).read_all().astype(np.float64)
    assert abs(np.corrcoef(flat[:-1], flat[1:])[0, 1]) < 0.01


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("scale", [1.0, 16384**-0.5, 425984**-0.5])
def test_magnitudes(dtype: str, scale: float) -> None:
    values = Random("a", (512, 512), dtype, 0, scale).read_all().astype(np.float64)
    assert np.isfinite(values).all()
    assert np.all(values != 0)
    assert np.sqrt(np.mean(values**2)) == pytest.approx(scale, rel=0.03)
    assert abs(values.mean()) < 0.01 * scale
    assert np.abs(values).max() < 2 * scale
    norms = Random("a", (4096,), dtype, 0, 1.0, True).read_all().astype(np.float64)
    assert norms.min() > 0.6
    assert norms.max() < 1.4
    assert norms.std() > 0.1


@pytest.mark.parametrize("changes", [{}, nemotron()], ids=["llama", "nemotron-nas"])
def test_activations_keep_their_magnitude(tmp_path: Path, changes: dict) -> None:
    import torch

    from builder.decoder import load

    file = write_config(tmp_path / "c" / "config.json", **changes, torch_dtype="float32")
    checkpoint = randomised(huggingface.declared(file), 0)
    assert {n for n, x in checkpoint.tensors.items() if x.norm} == {
        n for n in tensor_shapes(checkpoint.architecture) if n.endswith("norm.weight")
    }
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        logits = load(checkpoint)(tokens, tokens)
    assert torch.isfinite(logits).all()
    assert 0.3 < float(logits.std()) < 3


def test_deep_models_stay_finite(tmp_path: Path) -> None:
    """126 layers, the most of the published shapes, in bfloat16."""
    import torch

    from builder.decoder import load

    file = write_config(tmp_path / "c" / "config.json", num_hidden_layers=126)
    parent = randomised(huggingface.declared(file), 0)
    child = Plan(drop_attention=tuple(range(66, 116))).apply(parent)
    tokens = torch.arange(16)[None]
    for checkpoint in (parent, child):
        with torch.no_grad():
            logits = load(checkpoint)(tokens, tokens).float()
        assert torch.isfinite(logits).all()
        assert 0.3 < float(logits.std()) < 3


@pytest.mark.parametrize("changes", [{}, nemotron()], ids=["llama", "nemotron-nas"])
def test_fuse_writes_a_model_that_transformers_runs(tmp_path: Path, changes: dict) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = write_config(tmp_path / "given" / "tiny.json", **changes)
    drop = [] if changes else ["--drop-attention", "2-5"]
    fused = tmp_path / "fused"
    told = done("fuse", file, "--random-weights", "--seed", 7, *drop, "-o", fused)
    assert "the weights are random, seed 7" in told.stdout
    assert manifest.read(fused)["random_weights"] == {"seed": 7}
    assert manifest.read(fused)["layers"] == [0, 1, 2, 2, 2, 3]
    assert "digests match" in done("verify", fused).stdout

    tokenizer = AutoTokenizer.from_pretrained(fused, trust_remote_code=True)
    text = "def café(日本): return 0  # 🙂\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids.shape[1] == len(text.encode())
    assert tokenizer.decode(ids[0]) == text
    assert tokenizer.eos_token_id == 5
    assert len(tokenizer) == 320
    assert all(tokenizer.decode([n]) for n in range(320))

    model = AutoModelForCausalLM.from_pretrained(fused, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.shape == (1, ids.shape[1], 320)
    assert torch.isfinite(logits).all()
    assert 0.3 < float(logits.std()) < 3


def test_the_parent_as_it_is(config: Path, tmp_path: Path) -> None:
    """Written once, it gives what the config.json gives directly."""
    told = json.loads(
        done("fuse", config, "--random-weights", "--no-fuse", "-o", tmp_path / "parent", "--json").stdout
    )
    assert told["random_weights"] == {"seed": 0}
    assert told["layers"] == [[n] for n in range(6)]
    written = json.loads((tmp_path / "parent" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["eos_token_id"] == [5, 6]
    expected = randomised(huggingface.declared(config), 0)
    stored = huggingface.read(tmp_path / "parent")
    assert stored.architecture == expected.architecture
    for name, x in expected.tensors.items():
        assert stored.tensors[name].read_all().tobytes() == x.read_all().tobytes(), name
    changes = ("--drop-attention", "2-5", "--tp", 2)
    done("convert", tmp_path / "parent", *changes, "-o", tmp_path / "a")
    done("convert", config, "--random-weights", *changes, "-o", tmp_path / "b")
    for rank in range(2):
        name = f"rank{rank}.safetensors"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert manifest.read(tmp_path / "a")["random_weights"] == {"seed": 0}  # told on
    result = run("fuse", tmp_path / "parent", "--no-fuse", "-o", tmp_path / "again")
    assert result.exit_code == 1
    assert "nothing to drop" in result.stderr


def test_cuts_of_tp_2_are_those_of_tp_1(config: Path, tmp_path: Path) -> None:
    for tp in (1, 2):
        command = ("convert", config, "--random-weights", "--drop-attention", "2-5", "--tp", tp)
        told = done(*command, "-o", tmp_path / str(tp), "--threads", 3)
        assert "the weights are random, seed 0" in told.stdout
        assert "digests match" in done("verify", tmp_path / str(tp)).stdout
    whole = load_file(tmp_path / "1" / "rank0.safetensors")
    parts = [load_file(tmp_path / "2" / f"rank{r}.safetensors") for r in range(2)]
    axes = {"fc": 0, "gate": 0, "proj": 1, "dense": 1, "lm_head": 0}
    checked = 0
    for name, x in whole.items():
        axis = next((a for part, a in axes.items() if name.split(".")[-2] == part), None)
        if axis is not None:
            joined = np.concatenate([part[name] for part in parts], axis)
            assert np.array_equal(joined.view(np.uint16), x.view(np.uint16)), name
            checked += 1
        elif "norm" in name or "embedding" in name:
            assert all(np.array_equal(part[name].view(np.uint16), x.view(np.uint16)) for part in parts)
            checked += 1
    # 2 layers with attention, 2 without: 3 FFN parts each, 2 dense, lm_head; 6 norms, the embedding, ln_f.
    assert checked >= 4 * 3 + 2 + 1 + 6 + 1
    assert not np.array_equal(
        whole["transformer.layers.0.ffn.fc.weight"].view(np.uint16),
        whole["transformer.layers.1.ffn.fc.weight"].view(np.uint16),
    )


def test_threads_and_seeds(config: Path, tmp_path: Path) -> None:
    command = ("convert", config, "--random-weights", "--tp", 2)
    for name, options in (("a", ("--threads", 1)), ("b", ("--threads", 8)), ("c", ("--seed", 1))):
        done(*command, *options, "-o", tmp_path / name)
    a, b, c = ((tmp_path / n / "rank1.safetensors").read_bytes() for n in "abc")
    assert a == b
    assert len(a) == len(c)
    assert a != c
    sources = {manifest.read(tmp_path / n)["source"] for n in "abc"}
    assert len(sources) == 2


def test_fp8(config: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    fp8 = ("--quant", "fp8", "--kv-cache", "fp8", "--calib", tmp_path / "text.txt")
    few = ("--calib-samples", 4, "--calib-length", 64, "--drop-attention", "2-5", "--tp", 2)
    done("convert", config, "--random-weights", *fp8, *few, "-o", tmp_path / "c")
    assert "digests match" in done("verify", tmp_path / "c").stdout
    assert trtllm.read(tmp_path / "c").quant_algo == "FP8"
    assert manifest.read(tmp_path / "c")["random_weights"] == {"seed": 0}


def test_a_directory_without_weights_keeps_its_tokenizer(tmp_path: Path) -> None:
    from conftest import write_tokenizer

    given = tmp_path / "given"
    write_config(given / "config.json")
    write_tokenizer(given)
    done("fuse", given, "--random-weights", "--no-fuse", "-o", tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (given / name).read_bytes()
    (given / "tokenizer.json").unlink()
    done("fuse", given, "--random-weights", "--no-fuse", "-o", tmp_path / "made")
    assert (tmp_path / "made" / "tokenizer.json").is_file()
    assert not (given / "tokenizer.json").exists()


@pytest.mark.parametrize("command", ["fuse", "convert"])
def test_wrong_use(command: str, tiny_hf: Path, config: Path, tmp_path: Path) -> None:
    output = ("-o", tmp_path / "out")
    cases = [
        ((tiny_hf, "--random-weights"), 2, "has weights; leave out --random-weights"),
        ((config, "--seed", 1), 2, "--seed is for --random-weights"),
        ((config, "--random-weights", "--seed", -1), 2, "-1"),
        ((config,), 1, "take a config.json with --random-weights"),
        ((tmp_path / "none", "--random-weights"), 1, "no such model directory or config.json"),
    ]
    for arguments, code, words in cases:
        result = run(command, *arguments, *output)
        assert result.exit_code == code, result.output
        assert words in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_the_config_must_say(tmp_path: Path) -> None:
    small = write_config(tmp_path / "a.json", vocab_size=200)
    result = run("fuse", small, "--random-weights", "--no-fuse", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "vocab_size 200 is too small" in result.stderr
    unnamed = write_config(tmp_path / "b.json", torch_dtype=None)
    command = ("convert", unnamed, "--random-weights", "-o", tmp_path / "c")
    assert "give --dtype" in run(*command).stderr
    done(*command, "--dtype", "float16")
    assert trtllm.read(tmp_path / "c").dtype == "float16"


def test_dry_run(config: Path, tmp_path: Path) -> None:
    command = ("convert", config, "--random-weights", "--tp", 2)
    told = json.loads(done(*command, "--dry-run", "--json").stdout)
    done(*command, "-o", tmp_path / "c")
    sizes = [(tmp_path / "c" / f"rank{r}.safetensors").stat().st_size for r in range(2)]
    assert told["rank_bytes"] == sizes
