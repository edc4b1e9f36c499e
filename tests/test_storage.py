"""Safetensors files read and written against the safetensors library, broken files, whole outputs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from builder import huggingface, writer
from builder.errors import UserError
from builder.storage import output_directory
from builder.tensorfile import read_header

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "a.half": torch.arange(5, dtype=torch.bfloat16),
    "c.double": torch.rand(2, 3, dtype=torch.float64),
    "d.empty": torch.zeros(0, 4, dtype=torch.float16),
}


def test_bytes_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    writer.write(tmp_path, {"ours.safetensors": read_header(tmp_path / "theirs.safetensors")})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_library_reads_what_we_write(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    writer.write(tmp_path, {"b.safetensors": read_header(tmp_path / "a.safetensors")})
    again = load_file(tmp_path / "b.safetensors")
    assert again.keys() == TENSORS.keys()
    assert all(torch.equal(again[name], x) for name, x in TENSORS.items())


def header(entries: dict, data: bytes = b"\0" * 16) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


GOOD = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or not safetensors"),
        (b"\xff" * 32, "truncated or not safetensors"),
        (header({"x": GOOD}, b"\0" * 15), "truncated inside tensor 'x'"),
        (header({"x": GOOD}, b"\0" * 20), "4 bytes belong to no tensor"),
        (header({"x": {**GOOD, "shape": [5]}}), "not what shape"),
        (header({"x": {**GOOD, "shape": [-4]}}), "broken header entry"),
        (header({"x": {**GOOD, "dtype": "I64"}}), "dtype 'I64'; supported are F64"),
        (header({"x": GOOD, "y": GOOD}), "overlaps another or leaves a hole"),
        (header({"x": 3}), "broken header entry"),
        ((12).to_bytes(8, "little") + b"not json at all", "not valid JSON"),
        ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"model.safetensors: .*{message}"):
        read_header(file)


def copy(model: Path, target: Path) -> Path:
    return Path(shutil.copytree(model, target))


def test_missing_shard(tiny_hf: Path, tmp_path: Path) -> None:
    model = copy(tiny_hf, tmp_path / "m")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"shard 'model-00001-of-00002\.safetensors' is missing"):
        huggingface.read(model)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_index_cannot_leave_the_directory(tiny_hf: Path, tmp_path: Path, name: str) -> None:
    model = copy(tiny_hf, tmp_path / "m")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(UserError, match="outside the model directory"):
        huggingface.read(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3"}, "model_type 'qwen3' cannot be read: its q/k norms"),
        ({"model_type": "gemma2"}, "its post-norms"),
        ({"model_type": "mystery"}, "it is not known; supported are llama, mistral, qwen2, nemotron-nas"),
        ({"hidden_size": 60}, "hidden_size|shape"),
        ({"hidden_size": -1}, "hidden_size -1 is not a positive integer"),
        ({"hidden_size": "64"}, "hidden_size '64' is not a positive integer"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"intermediate_size": 97}, r"shape \[64, 96\], but config.json says \[64, 97\]"),
        ({"num_hidden_layers": 7}, "model.layers.6.* is missing"),
        ({"num_hidden_layers": 5}, "model.layers.5.* is not part of the architecture"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"sliding_window": 4096}, "sliding_window 4096 is not supported"),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
            "rope_type: 'longrope' is not supported",
        ),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope_scaling.factor: missing"),
    ],
)
def test_configs_that_cannot_be_are_named(tiny_hf: Path, tmp_path: Path, change: dict, message: str) -> None:
    model = copy(tiny_hf, tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message) as caught:
        huggingface.read(model)
    assert "\n" not in str(caught.value)
    assert str(model) in str(caught.value)


def test_tensors_with_no_place_are_named(tiny_hf: Path, tmp_path: Path) -> None:
    """q/k norms that no config field announces."""
    model = copy(tiny_hf, tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    save_file(
        {**tensors, "model.layers.0.self_attn.q_norm.weight": torch.ones(16)}, model / "model.safetensors"
    )
    with pytest.raises(UserError, match=r"q_norm\.weight' is not part of the architecture"):
        huggingface.read(model)


def interrupted(file: Path) -> None:
    file.write_text("x")
    raise KeyboardInterrupt


def test_output_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), output_directory(tmp_path / "out") as directory:
        interrupted(directory / "half")
    assert list(tmp_path.iterdir()) == []
    with output_directory(tmp_path / "out") as directory:
        (directory / "whole").write_text("x")
        assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "whole"]
    with pytest.raises(UserError, match="out: exists; remove it"), output_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "whole").read_text() == "x"


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(UserError, match=r"needs .* bytes, .* are free"),
        output_directory(tmp_path / "out", num_bytes=1 << 60),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_failed_write(tiny_hf: Path, tmp_path: Path) -> None:
    """A file that may not grow any further, as on a full disk or quota."""
    code = (
        "import resource, sys; from pathlib import Path; from builder import huggingface, trtllm\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "trtllm.convert(huggingface.read(Path(sys.argv[1])), Path(sys.argv[2]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tiny_hf, tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert "UserError" in result.stderr
    assert "out: File too large; nothing was left there" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_source_reads_only_its_rows(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    source = read_header(tmp_path / "a.safetensors")["b.weight"]
    assert np.array_equal(source.read(1, 3), TENSORS["b.weight"][1:3].numpy())
