"""build-engine --backend tensorrt-llm on a Hugging Face directory: what the PyTorch backend is told."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from standin import StandIn

from builder import export, huggingface
from builder.errors import UserError
from builder.plan import Plan
from engines import manifest
from engines.trtllm import release
from engines.trtllm.serving import ServingOptions, prepare
from ffn_fusion import main

TOOL = str(Path(sys.executable).with_name("ffn-fusion"))


@pytest.fixture(scope="module")
def fused(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("serving") / "fused"
    child = Plan(drop_attention=(2, 3, 4)).apply(huggingface.read(tiny_hf).cast("bfloat16"))
    export.write(child, tiny_hf, directory)
    return directory


def command(model: Path, *options: object) -> list[str]:
    return ["build-engine", str(model), "--backend", "tensorrt-llm", *map(str, options)]


def test_golden_configuration(fused: Path) -> None:
    options = ServingOptions(tp_size=2, max_batch_size=8, max_seq_len=64, kv_cache_fraction=0.8)
    assert prepare(fused, options).llm_arguments() == {
        "model": str(fused),
        "backend": "pytorch",
        "trust_remote_code": True,
        "dtype": "bfloat16",
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 1,
        "max_batch_size": 8,
        "max_input_len": 32,
        "max_seq_len": 64,
        "max_num_tokens": 8192,
        "max_beam_width": 1,
        "enable_chunked_prefill": True,
        "kv_cache_config": {"free_gpu_memory_fraction": 0.8, "enable_block_reuse": True},
        "cuda_graph_config": {"enable_padding": True, "max_batch_size": 8},
    }


def test_engine_directory(fused: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    result = CliRunner().invoke(main, command(fused, "--tp", 2, "--no-cuda-graphs", "-o", engine))
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in engine.iterdir()) == ["ffn-fusion.json", "llm.yaml"]
    told = yaml.safe_load((engine / "llm.yaml").read_text())
    assert told["cuda_graph_config"] is None
    assert told["tensor_parallel_size"] == 2
    contract = manifest.read(engine)
    assert (contract.backend, contract.tp_size) == ("tensorrt-llm-pytorch", 2)
    assert contract.compiler["model"] == str(fused)
    assert contract.architecture == huggingface.read(fused).architecture


def test_dry_run_writes_nothing(fused: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, command(fused, "--dry-run", "--json"))
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["llm"]["backend"] == "pytorch"
    assert not told["checks"]["TensorRT-LLM"]["passed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tp", "3"], "tp_size: 3 does not divide"),
        (["--max-seq-len", "999999"], "max_seq_len: 999999 is above"),
        (["--max-seq-len", "16", "--max-input-len", "16"], "max_input_len: 16 leaves no token"),
        (["--kv-cache-fraction", "1.5"], "kv_cache_fraction: 1.5 is not between 0 and 1"),
        (["--max-num-tokens", "8", "--no-chunked-prefill"], "prompts are not cut"),
    ],
)
def test_wrong_options(fused: Path, tmp_path: Path, options: list, message: str) -> None:
    result = CliRunner().invoke(main, command(fused, *options, "-o", tmp_path / "e"))
    assert result.exit_code == 1
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [["--gemm-plugin", "auto"], ["--workers", "2"], ["--config", "b.yaml"], ["--without-nvlink"]]
)
def test_options_of_engines(fused: Path, tmp_path: Path, options: list) -> None:
    result = CliRunner().invoke(main, command(fused, *options, "-o", tmp_path / "e"))
    assert result.exit_code == 2
    assert "no meaning for a Hugging Face directory" in result.stderr


def test_checkpoints_have_their_own_tp(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, command(tiny_checkpoint, "--tp", 2, "-o", tmp_path / "e"))
    assert result.exit_code == 2
    assert "--tp has no meaning for a TensorRT-LLM checkpoint" in result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("rope_theta"), "rope_theta is missing"),
        (lambda c: c.pop("rms_norm_eps"), "rms_norm_eps"),
        (
            lambda c: c["block_configs"][1]["ffn"].pop("replace_with_linear"),
            r"block_configs\[1\].ffn.replace_with_linear is missing",
        ),
    ],
)
def test_what_the_backend_reads(fused: Path, tmp_path: Path, change, message: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(fused, model)
    values = json.loads((model / "config.json").read_text())
    change(values)
    (model / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        prepare(model, ServingOptions())


def test_float32_is_refused(tiny_hf: Path) -> None:
    with pytest.raises(UserError, match="dtype float32, the PyTorch backend is made for bfloat16"):
        prepare(tiny_hf, ServingOptions())


@pytest.mark.parametrize(
    ("machine_is", "message"),
    [
        ({"version": "0.21.0"}, "0.21.0 has no PyTorch backend"),
        ({"gpus": 1}, "2 ranks need as many, 1 visible"),
        ({"free_mib": 500}, "a rank needs .* are free; raise --tp"),
        ({"name": "NVIDIA A100", "compute_cap": "8.0"}, "compute capability 8.0"),
        ({"version": "1.3.0"}, None),
    ],
)
def test_machine(fused: Path, tmp_path: Path, machine_is: dict, message: str | None) -> None:
    machine = StandIn(tmp_path / "machine", **machine_is)
    result = subprocess.run(
        [TOOL, *command(fused, "--tp", 2, "-o", tmp_path / "engine")],
        env=machine.environment,
        capture_output=True,
        text=True,
    )
    if message is None:
        assert result.returncode == 0, result.stderr
        assert manifest.read(tmp_path / "engine").compiler["tensorrt_llm"] == "1.3.0"
        return
    assert result.returncode == 1
    assert re.search(message, result.stderr), result.stderr
    assert not (tmp_path / "engine").exists()


def test_which_releases_have_the_backend() -> None:
    versions = ("0.21.0", "1.0.0", "1.2.1", "1.3.0rc20", "1.3.0", "2.1")
    assert [release.has_pytorch_backend(v) for v in versions] == [False, True, True, True, True, True]
