"""`verify`: whole directories pass, and each kind of damage is named by file and tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import fused, write_llama
from safetensors.torch import load_file, save_file

from builder import export, huggingface, trtllm, verification
from builder.errors import UserError
from builder.tensorfile import read_header
from ffn_fusion import main


@pytest.fixture
def checkpoint(tiny_checkpoint_tp2: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint_tp2, tmp_path / "c"))


def flip_bit(file: Path, tensor: str, byte: int = 5) -> None:
    source = read_header(file)[tensor]
    content = bytearray(file.read_bytes())
    content[source.offset + byte] ^= 1
    file.write_bytes(content)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_whole_directories_pass(tiny_hf: Path, checkpoint: Path, tmp_path: Path) -> None:
    export.write(fused(tiny_hf), tiny_hf, tmp_path / "hf")
    trtllm.convert(huggingface.read(tiny_hf), tmp_path / "pp", tp_size=2, pp_size=3)
    for directory, tensors in ((checkpoint, 50), (tmp_path / "hf", 29), (tmp_path / "pp", 90)):
        report = verification.verify(directory)
        assert report.problems == []
        assert report.digests
        assert report.tensors == tensors
        assert report.bytes == sum(
            x.num_bytes for f in directory.glob("*.s*") for x in read_header(f).values()
        )


def test_directory_of_others_has_no_digests(tiny_hf: Path) -> None:
    report = verification.verify(tiny_hf)
    assert (report.problems, report.digests, report.tensors) == ([], False, 57)


NAME = "transformer.layers.1.ffn.gate.weight"


def test_one_flipped_bit_is_found(checkpoint: Path) -> None:
    flip_bit(checkpoint / "rank1.safetensors", NAME)
    report = verification.verify(checkpoint)
    assert report.problems == [f"rank1.safetensors: tensor '{NAME}' differs from what was written"]
    result = CliRunner().invoke(main, ["verify", str(checkpoint)])
    assert result.exit_code == 1
    assert NAME in result.stdout
    assert result.stderr == f"error: {checkpoint}: 1 problem; write or copy it again\n"
    shown = json.loads(CliRunner().invoke(main, ["verify", str(checkpoint), "--json"]).stdout)
    assert shown["problems"] == report.problems


def lose_file(directory: Path) -> None:
    (directory / "rank1.safetensors").unlink()


def cut_file(directory: Path) -> None:
    file = directory / "rank0.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def swap_ranks(directory: Path) -> None:
    first, second = directory / "rank0.safetensors", directory / "rank1.safetensors"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def reshape(directory: Path) -> None:
    tensors = load_file(directory / "rank0.safetensors")
    tensors[NAME] = tensors[NAME].T.contiguous()
    save_file(tensors, directory / "rank0.safetensors")


def retype(directory: Path) -> None:
    tensors = load_file(directory / "rank0.safetensors")
    tensors[NAME] = tensors[NAME].bfloat16()
    save_file(tensors, directory / "rank0.safetensors")


def lose_tensor(directory: Path) -> None:
    tensors = load_file(directory / "rank0.safetensors")
    del tensors[NAME]
    save_file(tensors, directory / "rank0.safetensors")


def change_config(directory: Path) -> None:
    edit(directory / "config.json", norm_epsilon=1e-6)


def add_file(directory: Path) -> None:
    shutil.copy(directory / "rank0.safetensors", directory / "rank2.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_file, "rank1.safetensors: missing"),
        (cut_file, "rank0.safetensors: truncated inside tensor"),
        (swap_ranks, "rank0.safetensors: tensor 'lm_head.weight' differs from what was written"),
        (reshape, f"tensor '{NAME}' is float32 [64, 48], config.json says float32 [48, 64]"),
        (retype, f"tensor '{NAME}' is bfloat16 [48, 64], config.json says float32 [48, 64]"),
        (lose_tensor, f"tensor '{NAME}' is missing"),
        (change_config, "config.json: changed since it was written"),
        (add_file, "rank2.safetensors: not in ffn-fusion.json"),
    ],
)
def test_damage_is_named(checkpoint: Path, damage, message: str) -> None:
    damage(checkpoint)
    assert any(message in problem for problem in verification.verify(checkpoint).problems)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite(tmp_path: Path, dtype: str, value: float) -> None:
    model = write_llama(tmp_path / "m", dtype=dtype)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][7] = value
    save_file(tensors, model / "model.safetensors")
    assert verification.verify(model).problems == [
        "model.safetensors: tensor 'model.norm.weight' holds numbers that are not finite"
    ]


def test_overflowing_cast_is_refused(tmp_path: Path) -> None:
    """float16 ends at 65504: an infinity must not slip into a checkpoint."""
    model = write_llama(tmp_path / "m", dtype="bfloat16")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(tensors, model / "model.safetensors")
    trtllm.convert(huggingface.read(model), tmp_path / "bf16")
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.gate.*999424 does not fit float16; choose"):
        trtllm.convert(huggingface.read(model), tmp_path / "c", dtype="float16")
    assert not (tmp_path / "c").exists()


def test_manifest_that_is_none(checkpoint: Path) -> None:
    edit(checkpoint / "ffn-fusion.json", version=99)
    with pytest.raises(UserError, match="version 99 is not 1"):
        verification.verify(checkpoint)
    edit(checkpoint / "ffn-fusion.json", version=1, files={"../x": {"bytes": 1, "xxh3_128": ""}})
    with pytest.raises(UserError, match="files is missing or broken"):
        verification.verify(checkpoint)


def test_manifest_says_what_was_done(tiny_hf: Path, tmp_path: Path) -> None:
    command = ["convert", str(tiny_hf), "--drop-attention", "2-5", "-o", str(tmp_path / "c")]
    assert CliRunner().invoke(main, command).exit_code == 0
    values = json.loads((tmp_path / "c" / "ffn-fusion.json").read_text())
    assert values["kind"] == "tensorrt-llm"
    assert values["layers"] == [0, 1, 2, 2, 2, 3]
    assert values["plan"]["drop_attention"] == [2, 3, 4, 5]
    assert values["source"] == huggingface.read(tiny_hf).digest
    assert values["files"].keys() == {"config.json", "rank0.safetensors"}
    assert torch.is_tensor(load_file(tmp_path / "c" / "rank0.safetensors")["lm_head.weight"])
