"""build-engine --backend tensorrt-llm: the command line, the checks before it, and what failures leave.

Nothing here builds an engine: `standin` has the command lines and failures of TensorRT-LLM only.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from standin import OPTIONS, StandIn

from builder import huggingface, trtllm
from builder.errors import UserError
from builder.plan import Plan
from engines import hardware, manifest
from engines.trtllm import release
from engines.trtllm.build import prepare
from engines.trtllm.options import BuildOptions, read, resolve

TOOL = str(Path(sys.executable).with_name("ffn-fusion"))
CHOICES = {
    "max_position_embeddings": 131072,
    "world_size": 8,
    "fp8": False,
    "fp8_kv_cache": False,
    "fused_mlp_fits": True,
}


@pytest.fixture(scope="module")
def checkpoint(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TP 2, PP 2: four ranks, one layer fused."""
    directory = tmp_path_factory.mktemp("trtllm") / "checkpoint"
    child = Plan(drop_attention=(2, 3, 4)).apply(huggingface.read(tiny_hf))
    trtllm.convert(child, directory, tp_size=2, pp_size=2, dtype="bfloat16")
    return directory


@pytest.fixture
def machine(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path / "machine")


def run(machine: StandIn, checkpoint: Path, output: Path, *options: object, **environment: str):
    command = [TOOL, "build-engine", checkpoint, "-o", output]
    return subprocess.run(
        [*map(str, command), "--backend", "tensorrt-llm", *map(str, options)],
        env={**machine.environment, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def error(result: subprocess.CompletedProcess) -> str:
    """The one line of a failed command."""
    assert result.returncode == 1, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in lines[0]
    return lines[0]


def arguments(options: BuildOptions, **choices: object) -> list[str]:
    return resolve(options, **{**CHOICES, **choices}).arguments(Path("/c"), Path("/e"))


def test_golden_arguments() -> None:
    assert " ".join(arguments(BuildOptions())) == (
        "--checkpoint_dir /c --output_dir /e --max_batch_size 32 --max_input_len 4096 --max_seq_len 8192 "
        "--max_num_tokens 8192 --max_beam_width 1 --kv_cache_type paged --gemm_plugin auto "
        "--use_paged_context_fmha enable --use_fp8_context_fmha disable --use_fused_mlp enable "
        "--multiple_profiles disable --remove_input_padding enable --workers 8 --log_level info"
    )


def test_golden_arguments_with_every_option() -> None:
    options = BuildOptions(
        max_batch_size=4,
        max_input_len=1000,
        max_seq_len=2000,
        max_num_tokens=3000,
        opt_num_tokens=4,
        max_beam_width=1,
        gemm_plugin="fp8",
        gemm_swiglu_plugin=True,
        low_latency_gemm_plugin=True,
        max_draft_len=5,
        timing_cache="/t/cache",
        workers=2,
        log_level="verbose",
    )
    assert " ".join(arguments(options, fp8=True, fp8_kv_cache=True, fused_mlp_fits=False)) == (
        "--checkpoint_dir /c --output_dir /e --max_batch_size 4 --max_input_len 1000 --max_seq_len 2000 "
        "--max_num_tokens 3000 --max_beam_width 1 --kv_cache_type paged --gemm_plugin fp8 "
        "--use_paged_context_fmha enable --use_fp8_context_fmha enable --use_fused_mlp disable "
        "--multiple_profiles disable --remove_input_padding enable --opt_num_tokens 4 "
        "--gemm_swiglu_plugin fp8 --low_latency_gemm_plugin fp8 "
        "--speculative_decoding_mode draft_tokens_external --max_draft_len 5 --input_timing_cache /t/cache "
        "--output_timing_cache /t/cache --workers 2 --log_level verbose"
    )


def test_fp8_and_streaming_choose_no_gemm_plugin() -> None:
    assert "--gemm_plugin disable" in " ".join(arguments(BuildOptions(), fp8=True))
    streamed = " ".join(arguments(BuildOptions(weight_streaming=True)))
    assert "--gemm_plugin disable" in streamed
    assert streamed.endswith(" --weight_streaming")


def test_every_argument_is_one_that_trtllm_build_has() -> None:
    known = json.loads(OPTIONS.read_text())["common"]
    options = BuildOptions(
        opt_num_tokens=4, gemm_swiglu_plugin=True, timing_cache="t", low_latency_gemm_plugin=True
    )
    words = arguments(options, fp8=True)
    names = [word.removeprefix("--") for word in words if word.startswith("--")]
    assert len(names) > 15
    assert set(names) <= set(known)


@pytest.mark.parametrize(
    ("options", "choices", "message"),
    [
        ({"max_seq_len": 200000}, {}, "max_seq_len: 200000 is above"),
        ({"max_input_len": 8192}, {}, "max_input_len: 8192 leaves no token"),
        ({"max_num_tokens": 16}, {}, "max_num_tokens: 16 is less than one token"),
        ({"max_num_tokens": 64, "use_paged_context_fmha": False}, {}, "prompts cannot be cut"),
        ({"multiple_profiles": True, "opt_num_tokens": 4}, {}, "opt_num_tokens: trtllm-build refuses"),
        ({"kv_cache_type": "continuous"}, {}, "needs use_paged_context_fmha off"),
        ({"gemm_swiglu_plugin": True}, {}, "gemm_swiglu_plugin: takes FP8 weights only"),
        ({"low_latency_gemm_plugin": True}, {}, "low_latency_gemm_plugin: takes FP8"),
        ({"gemm_plugin": "fp8"}, {}, "gemm_plugin: fp8 takes FP8"),
        ({"use_fp8_context_fmha": True}, {}, "needs an FP8 KV cache"),
        ({"use_fused_mlp": True}, {"fused_mlp_fits": False}, "use_fused_mlp: the joined"),
        (
            {"weight_streaming": True, "gemm_plugin": "auto"},
            {},
            "weight_streaming: needs gemm_plugin disable",
        ),
    ],
)
def test_contradictions(options: dict, choices: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        arguments(BuildOptions(**options), **choices)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_batchsize": 4}, "'max_batchsize' is no build option; known are gemm_plugin"),
        ({"max_batch_size": 0}, "max_batch_size: 0 is not a positive number"),
        ({"max_batch_size": True}, "max_batch_size: True is not a positive number"),
        ({"use_fused_mlp": "enable"}, "use_fused_mlp: 'enable' is not true or false"),
        ({"gemm_plugin": "fast"}, "gemm_plugin: 'fast' is not one of auto"),
        (["max_batch_size"], "not a mapping"),
    ],
)
def test_bad_build_file(tmp_path: Path, values: object, message: str) -> None:
    file = tmp_path / "build.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=f"{file}: .*{message}"):
        read(file, {})


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "build.yaml"
    file.write_text("max_batch_size: 8\nuse_fused_mlp: false\n")
    options = read(file, {"max_batch_size": 16, "workers": None})
    assert options == BuildOptions(max_batch_size=16, use_fused_mlp=False)


@pytest.mark.parametrize(
    ("version", "builds"),
    [
        ("0.19.0", False),
        ("0.20.0", True),
        ("0.21.0", True),
        ("1.0.0", True),
        ("1.2.1", True),
        ("1.3.0rc19", False),
        ("1.3.0rc20", True),
        ("1.3.0", False),
        ("2.0", False),
        ("unknown", False),
    ],
)
def test_which_releases_build_engines(version: str, builds: bool) -> None:
    assert release.builds_engines(version) is builds


def test_build(machine: StandIn, checkpoint: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    result = run(machine, checkpoint, engine, "--max-seq-len", 64, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["backend"] == "tensorrt-llm"
    names = {"build.log", "config.json", "ffn-fusion.json", *(f"rank{r}.engine" for r in range(4))}
    assert {p.name for p in engine.iterdir()} == names
    contract = manifest.read(engine)
    assert (contract.backend, contract.world_size, contract.max_seq_len) == ("tensorrt-llm", 4, 64)
    assert contract.compiler["tensorrt_llm"] == "1.2.1"
    assert len(contract.hardware["gpus"]) == 8
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert "exists; remove it" in error(run(machine, checkpoint, engine, "--max-seq-len", 64))


@pytest.mark.parametrize(
    ("machine_is", "message"),
    [
        ({"version": "0.19.0"}, "tensorrt_llm: 0.19.0 builds no engines this way, 0.20 to 1.2.x"),
        ({"version": "1.3.0"}, "tensorrt_llm: 1.3.0 builds no engines"),
        ({"gpus": 0}, "gpu: none is visible"),
        (
            {"name": "NVIDIA A100-SXM4-80GB", "compute_cap": "8.0"},
            "gpu 0: NVIDIA A100.* has compute capability 8.0",
        ),
        ({"gpus": 2}, "workers: 4 at once need as many GPUs, 2 visible; give --workers 2"),
        ({"nvlink": "PHB"}, "gpu 0 and 1 are not joined by NVLink"),
        ({"free_mib": 1000}, "gpu 0: a rank needs .* GB are free; lower --max-batch-size"),
        ({"broken_smi": True}, "nvidia-smi: NVIDIA-SMI has failed"),
    ],
)
def test_preflight(tmp_path: Path, checkpoint: Path, machine_is: dict, message: str) -> None:
    machine = StandIn(tmp_path / "machine", **machine_is)
    result = run(machine, checkpoint, tmp_path / "engine", "--max-seq-len", 64)
    assert re.search(message, error(result)), result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["machine"]


def test_preflight_without_tensorrt_llm(checkpoint: Path, tmp_path: Path) -> None:
    command = [TOOL, "build-engine", str(checkpoint), "-o", str(tmp_path / "e")]
    result = subprocess.run([*command, "--backend", "tensorrt-llm"], capture_output=True, text=True)
    assert "tensorrt_llm: not installed; use a tritonserver container" in error(result)


def test_nvlink_may_be_missing(tmp_path: Path, checkpoint: Path) -> None:
    machine = StandIn(tmp_path / "machine", nvlink="SYS")
    result = run(machine, checkpoint, tmp_path / "e", "--max-seq-len", 64, "--without-nvlink")
    assert result.returncode == 0, result.stderr


def test_broken_checkpoint(machine: StandIn, checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "rank1.safetensors").write_bytes((checkpoint / "rank2.safetensors").read_bytes())
    message = error(run(machine, broken, tmp_path / "e", "--max-seq-len", 64))
    assert "rank1.safetensors: tensor" in message


def test_dry_run_runs_anywhere(checkpoint: Path) -> None:
    command = [TOOL, "build-engine", checkpoint, "--backend", "tensorrt-llm"]
    result = subprocess.run(
        [*command, "--max-seq-len", "64", "--dry-run", "--json"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["command"][:2] == ["trtllm-build", "--checkpoint_dir"]
    assert told["checks"]["checkpoint"]["passed"]
    assert not told["checks"]["TensorRT-LLM"]["passed"]
    # By hand: 32 sequences x 64 tokens; the first stage has 2 attention layers, each with K and V of
    # one head of 16 bfloat16 numbers a rank.
    assert told["estimate"]["rank_kv_bytes"] == 32 * 64 * 2 * 2 * 16 * 2
    sizes = [file.stat().st_size for file in checkpoint.glob("*.safetensors")]
    assert told["estimate"]["rank_weight_bytes"] == max(sizes)
    assert told["estimate"]["host_bytes"] == 4 * 3 * max(sizes)


def test_fused_mlp_is_off_where_it_must(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import engines.trtllm.build as build

    local = trtllm.read(checkpoint).architecture.shard(2)
    widest = max(x.intermediate_size for x in local.layers) * local.hidden_size
    monkeypatch.setattr(build, "MAX_ELEMENTS", 2 * widest - 1)
    prepared = prepare(checkpoint, tmp_path / "e", BuildOptions(max_seq_len=64))
    assert "--use_fused_mlp disable" in " ".join(prepared.command(Path("e")))
    with pytest.raises(UserError, match="use_fused_mlp: the joined"):
        prepare(checkpoint, tmp_path / "e", BuildOptions(max_seq_len=64, use_fused_mlp=True))
    monkeypatch.setattr(build, "MAX_ELEMENTS", widest - 1)
    with pytest.raises(UserError, match=r"has a weight of .* elements a rank"):
        prepare(checkpoint, tmp_path / "e", BuildOptions(max_seq_len=64))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("fail:2", "RuntimeError: Encountered an error for rank 2"),
        ("oom:2", "CUDA out of memory"),
        ("kill:2", "BrokenProcessPool"),
    ],
)
def test_failed_rank(machine: StandIn, checkpoint: Path, tmp_path: Path, fault: str, message: str) -> None:
    engine = tmp_path / "engine"
    result = run(machine, checkpoint, engine, "--max-seq-len", 64, STANDIN_FAULT=fault)
    line = error(result)
    assert "2" in line.split("; ranks ")[1].split("were not built")[0]
    assert message in result.stderr
    assert not engine.exists()


def test_finished_ranks_are_reused(machine: StandIn, checkpoint: Path, tmp_path: Path) -> None:
    """One worker: ranks 0 and 1 are built, 2 fails; the next try builds 2 and 3 under MPI."""
    engine, trace = tmp_path / "engine", tmp_path / "trace"
    options = ("--max-seq-len", 64, "--workers", 1)
    result = run(machine, checkpoint, engine, *options, STANDIN_FAULT="fail:2", STANDIN_TRACE=str(trace))
    assert "ranks 2, 3 were not built, ranks 0, 1 are kept for the next try" in error(result)
    trace.unlink()
    again = run(machine, checkpoint, engine, *options, STANDIN_TRACE=str(trace))
    assert again.returncode == 0, again.stderr
    assert "ranks 0, 1 are finished already" in again.stderr
    assert trace.read_text().split() == ["2", "3"]
    assert manifest.read(engine).world_size == 4


def test_other_inputs_reuse_nothing(machine: StandIn, checkpoint: Path, tmp_path: Path) -> None:
    engine, trace = tmp_path / "engine", tmp_path / "trace"
    run(machine, checkpoint, engine, "--max-seq-len", 64, "--workers", 1, STANDIN_FAULT="fail:2")
    again = run(machine, checkpoint, engine, "--max-seq-len", 32, "--workers", 1, STANDIN_TRACE=str(trace))
    assert again.returncode == 0, again.stderr
    assert trace.read_text().split() == ["0", "1", "2", "3"]


def test_killed_build_leaves_no_engine(machine: StandIn, checkpoint: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    command = [TOOL, "build-engine", str(checkpoint), "-o", str(engine)]
    process = subprocess.Popen(
        [*command, "--backend", "tensorrt-llm", "--max-seq-len", "64", "--workers", "1"],
        env={**machine.environment, "STANDIN_FAULT": "hang:2"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    done = tmp_path / ".engine.building" / "rank1.done.json"
    deadline = time.monotonic() + 60
    while not done.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) != 0
    assert not engine.exists()
    again = run(machine, checkpoint, engine, "--max-seq-len", 64, "--workers", 1)
    assert again.returncode == 0, again.stderr
    assert "ranks 0, 1 are finished already" in again.stderr


def test_under_mpirun(machine: StandIn, checkpoint: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    mpirun = Path(sys.executable).with_name("mpirun")
    root = ["--allow-run-as-root"] * (os.geteuid() == 0)
    command = [str(mpirun), *root, "--oversubscribe", "-n", "4", TOOL]
    command += ["build-engine", str(checkpoint), "-o", str(engine), "--backend", "tensorrt-llm"]
    failed = subprocess.run(
        [*command, "--max-seq-len", "64"],
        env={**machine.environment, "STANDIN_FAULT": "fail:2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    # Not the exit code: TensorRT-LLM's MPI_Abort has the status 0, which mpirun may pass on.
    assert "tensorrt-llm engine" not in failed.stdout
    assert not engine.exists()
    result = subprocess.run(
        [*command, "--max-seq-len", "64"],
        env=machine.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("tensorrt-llm engine") == 1
    assert manifest.read(engine).world_size == 4


def test_gpus_of_a_real_h100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of nvidia-smi 580.159.04, and CUDA_VISIBLE_DEVICES, which it does not heed itself."""
    machine = StandIn(tmp_path, gpus=2)
    monkeypatch.setenv("PATH", machine.environment["PATH"])
    first, second = hardware.gpus()
    assert (first.name, first.compute_capability) == ("NVIDIA H100 80GB HBM3", "9.0")
    assert (first.total_memory, first.free_memory) == (81559 << 20, 81079 << 20)
    assert hardware.without_nvlink((first, second)) is None
    for visible, found in (("1", (second,)), ("", ()), ("GPU-00000001,0", (second, first)), ("7", ())):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert hardware.gpus() == found
    assert hardware.without_nvlink((first, replace(second, index=5))) == (0, 5)


def test_options_belong_to_their_backend(checkpoint: Path, tmp_path: Path) -> None:
    command = [TOOL, "build-engine", str(checkpoint), "-o", str(tmp_path / "e")]
    result = subprocess.run([*command, "--gemm-plugin", "auto"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "--gemm-plugin belongs to --backend tensorrt-llm" in result.stderr
