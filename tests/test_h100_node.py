"""examples/h100_node: what it would run for every shape, and a tiny run with the stand-ins."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from standin import StandIn
from test_random_weights import write_config

from builder import huggingface, manifest
from engines import hardware
from engines import manifest as engine_manifest

EXAMPLE = Path(__file__).parent.parent / "examples" / "h100_node"
SHAPES = {  # and their parameters
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "nemotron-super-49b": 49_867_145_216,
    "nemotron-ultra-253b": 253_402_005_504,
}
TINY = ("--drop-attention", "2-5", "--group", "2-4", "--tp", 2)
TINY = (*TINY, "--max-seq-len", 256, "--max-batch-size", 4, "--concurrency", "1,4")


def run(*arguments: object, env: dict[str, str] | None = None, **environment: str):
    return subprocess.run(
        [sys.executable, str(EXAMPLE / "run.py"), *map(str, arguments)],
        env={**(env or os.environ), **environment},
        capture_output=True,
        text=True,
        timeout=180,
    )


def dry(*arguments: object) -> dict:
    result = run(*arguments, "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def error(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 1, result.stdout + result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "given" / "tiny.json")


@pytest.fixture
def machine(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path / "machine")


@pytest.mark.parametrize("shape", SHAPES)
def test_dry_run_of_every_shape(shape: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    told = dry("--model", shape, "-o", work)
    assert not work.exists()
    stages = {stage["name"]: stage for stage in told["stages"]}
    names = ["write-fused"]
    names += [f"{verb}-{kind}" for verb in ("convert", "build") for kind in ("baseline", "fused")]
    names += ["bench-engine", "deploy-engine-baseline", "deploy-engine-fused", "serve-engine"]
    names += ["write-baseline", "check-baseline", "check-fused"]
    names += ["bench-pytorch", "deploy-pytorch-baseline", "deploy-pytorch-fused", "serve-pytorch"]
    assert [*stages] == [name for name in names if name not in told["left_out"]]
    assert set(told["left_out"]) <= {"serve-engine", "serve-pytorch"}
    parameters = huggingface.read_architecture(EXAMPLE / "shapes" / f"{shape}.json").num_parameters
    assert parameters == SHAPES[shape]
    assert stages["write-baseline"]["needs"]["disk"] == 2 * parameters
    for kind in ("baseline", "fused"):
        written, built = stages[f"convert-{kind}"]["needs"], stages[f"build-{kind}"]["needs"]
        assert written["disk"] >= stages[f"write-{kind}"]["needs"]["disk"] > 1e9
        assert built["disk"] == written["disk"]
        assert written["disk"] / 8 < built["gpu"] < written["disk"] / 8 + 20e9
        assert built["host"] > 3 * written["disk"] * 0.99
        assert "--random-weights" in stages[f"convert-{kind}"]["command"]
    assert "--group" not in stages["convert-baseline"]["command"]
    assert "--group" in stages["convert-fused"]["command"]
    assert told["disk"] == sum(stage["needs"].get("disk", 0) for stage in told["stages"])


def test_golden_commands(config: Path, tmp_path: Path) -> None:
    work = tmp_path / "w"
    told = dry("--model", config, *TINY, "--seed", 3, "--workers", 1, "--path", "engine", "-o", work)
    lines = {stage["name"]: shlex.join(stage["command"]) for stage in told["stages"]}
    python, serving = shlex.quote(sys.executable), EXAMPLE / "serving.py"
    start = f"{work}/triton/engine/{{}}/manifests/start.sh"
    given = f"ffn-fusion convert {config} --random-weights --seed 3"
    limits = "--backend tensorrt-llm --max-batch-size 4 --max-seq-len 256 --workers 1"
    assert lines == {
        "write-fused": (
            f"ffn-fusion fuse {config} --random-weights --seed 3 --drop-attention 2-5 --group 2-4 "
            f"-o {work}/models/fused"
        ),
        "convert-baseline": f"{given} --tp 2 -o {work}/checkpoints/baseline",
        "convert-fused": f"{given} --drop-attention 2-5 --group 2-4 --tp 2 -o {work}/checkpoints/fused",
        "build-baseline": f"build-engine {work}/checkpoints/baseline {limits} -o {work}/engines/baseline",
        "build-fused": f"build-engine {work}/checkpoints/fused {limits} -o {work}/engines/fused",
        "bench-engine": (
            f"ffn-fusion compare-latency {work}/engines/baseline {work}/engines/fused --via trtllm-bench "
            f"--tokenizer {work}/models/fused --concurrency 1,4 --rounds 5 -o {work}/reports/bench-engine"
        ),
        **{
            f"deploy-engine-{kind}": (
                f"ffn-fusion deploy {work}/engines/{kind} --tokenizer {work}/models/fused "
                f"-o {work}/triton/engine/{kind}/repository --write-only "
                f"--manifests {work}/triton/engine/{kind}/manifests --http-port {port} "
                "--no-kv-cache-reuse --kv-cache-fraction 0.90"
            )
            for kind, port in (("baseline", 8000), ("fused", 8010))
        },
        "serve-engine": (
            f"{python} {serving} --server engine-baseline {start.format('baseline')} 8000 0,1 "
            f"--server engine-fused {start.format('fused')} 8010 2,3 --logs {work}/logs -- "
            "ffn-fusion compare-latency http://127.0.0.1:8000 http://127.0.0.1:8010 "
            f"--prompts {work}/prompts.txt --concurrency 1,4 --rounds 5 -o {work}/reports/triton-engine"
        ),
    }


def test_the_dry_run_as_text(tmp_path: Path) -> None:
    result = run("--model", "nemotron-ultra-253b", "--path", "engine", "--dry-run", "-o", tmp_path / "w")
    assert result.returncode == 0, result.stderr
    assert "build-fused: 536.3 GB of disk, 76.9 GB of each GPU" in result.stdout
    assert "--group 66-73 --group 74-85 --group 86-100 --group 101-114" in result.stdout
    assert "serve-engine: left out: both servers need 151.5 GB of each GPU, it has 85.5" in result.stdout
    assert "No GPU here: counted for 8 of 85.5 GB each" in result.stdout


def test_servers_that_share_gpus(tmp_path: Path) -> None:
    """The second finds room for its weights beside the first one's KV cache, and gets as large a one."""
    told = dry("--model", "llama-3.1-70b", "-o", tmp_path / "w")
    stages = {stage["name"]: stage for stage in told["stages"]}
    for path in ("engine", "pytorch"):
        memory, fractions = 81559 << 20, []
        for kind in ("baseline", "fused"):
            command = stages[f"deploy-{path}-{kind}"]["command"]
            fractions.append(float(command[command.index("--kv-cache-fraction") + 1]))
        batch = 32 * 4096 * 2 * 128 * 2  # KV bytes of a layer at TP 8, whose rank has one head
        layers = {"baseline": 80, "fused": 49}
        weights = [stages[f"build-{k}"]["needs"]["gpu"] - n * batch for k, n in layers.items()]
        first = fractions[0] * (memory - weights[0])
        second = fractions[1] * (memory - weights[0] - first - weights[1])
        assert first == pytest.approx(second, rel=0.05)
        assert first > 10e9
        assert memory - sum(weights) - first - second > 2e9
        command = stages[f"serve-{path}"]["command"]
        assert [command[i + 4] for i, word in enumerate(command) if word == "--server"] == ["all"] * 2


def test_the_253b_is_the_published_model() -> None:
    """Fused as arXiv 2503.18908 says it has the widths and parameters of the published config.json."""
    groups = [word for g in ("66-73", "74-85", "86-100", "101-114") for word in ("--group", g)]
    command = [Path(sys.executable).with_name("ffn-fusion"), "convert"]
    command += [EXAMPLE / "shapes" / "nemotron-ultra-253b.json", *groups, "--tp", "8", "--dry-run", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(result.stdout)
    assert told["cost"]["parameters"] == 253_401_268_224
    widths = [layer["width"] for layer in told["layers"] if len(layer["members"]) > 1]
    assert widths == [399_360, 425_984, 343_040, 301_056]
    free = [i for layer in told["layers"] if not layer["num_key_value_heads"] for i in layer["members"]]
    assert [i for i in free if i > 64] == list(range(66, 116))


def test_gpu_memory_is_what_build_engine_estimates(config: Path, machine: StandIn, tmp_path: Path) -> None:
    work = tmp_path / "w"
    common = ("--model", config, *TINY, "--path", "engine", "-o", work)
    result = run(*common, "--until", "convert-fused", env=machine.environment)
    assert result.returncode == 0, result.stderr
    told = {stage["name"]: stage for stage in dry(*common)["stages"]}
    for kind in ("baseline", "fused"):
        command = [*told[f"build-{kind}"]["command"], "--dry-run", "--json"]
        command[0] = str(Path(sys.executable).with_name(command[0]))
        answer = subprocess.run(command, env=machine.environment, capture_output=True, text=True, check=True)
        expected = json.loads(answer.stdout)["estimate"]["gpu_bytes"]
        assert told[f"build-{kind}"]["needs"]["gpu"] == pytest.approx(expected, rel=1e-4)


def test_fp8_and_a_shape_of_ones_own(config: Path, tmp_path: Path) -> None:
    common = ("--model", config, *TINY, "--path", "engine", "-o", tmp_path / "w")
    told = {stage["name"]: stage for stage in dry(*common, "--quant", "fp8")["stages"]}
    assert "--calib" in told["convert-fused"]["command"]
    plain = {stage["name"]: stage for stage in dry(*common)["stages"]}
    assert told["convert-fused"]["needs"]["disk"] < plain["convert-fused"]["needs"]["disk"]
    text = tmp_path / "text.txt"
    own = {s["name"]: s["command"] for s in dry(*common, "--quant", "fp8", "--calib", text)["stages"]}
    assert str(text) in own["convert-baseline"]
    assert "--calib-samples" not in own["convert-baseline"]


def test_wrong_use(config: Path, tmp_path: Path) -> None:
    output = ("-o", tmp_path / "w", "--dry-run")
    for arguments, words in (
        (("--model", config, "--quant", "fp8", *TINY), "--path engine"),
        (("--model", config, "--calib", "t", *TINY), "--calib is for --quant fp8"),
        (("--model", config, "--until", "lunch", *TINY), "they are write-fused, convert-baseline"),
        (("--model", config, *TINY, "--concurrency", "1,x"), "'1,x' is no list of unlike positive numbers"),
    ):
        result = run(*arguments, *output)
        assert result.returncode == 2, result.stderr
        assert words in result.stderr
    assert "shapes are llama-3.1-8b" in error(run("--model", "llama-9", *output))
    told = error(run("--model", "llama-3.1-70b", "--tp", 2, *output))
    assert "fused: layer 45: the joined gate and up weight has" in told
    assert "fuse groups of 9 such FFNs at most" in told
    for options, words in (
        (("--max-seq-len", 512), "--max-seq-len 512: the model's limit is 256"),
        (("--max-seq-len", 128), "--max-seq-len 128: 128 tokens of prompt and 64 of output are measured"),
        (("--concurrency", "1,8"), "--concurrency 1,8: above --max-batch-size 4"),
    ):
        assert words in error(run("--model", config, *TINY, *options, *output))
    assert not (tmp_path / "w").exists()


def test_engines_end_to_end(config: Path, machine: StandIn, tmp_path: Path) -> None:
    """A failing rank, then only what is missing, then nothing; then a changed input."""
    work, trace = tmp_path / "work", tmp_path / "trace"
    command = ("--model", config, *TINY, "--workers", 1, "--path", "engine", "--until", "build-fused")
    command = (*command, "-o", work)
    failed = run(*command, env=machine.environment, STANDIN_FAULT="fail:1", STANDIN_TRACE=str(trace))
    told = error(failed)
    assert told.startswith("error: build-baseline: trtllm-build: RuntimeError: Encountered an error")
    assert f"exit 1 of `build-engine {work}/checkpoints/baseline" in told
    assert told.endswith(f"the log is {work}/logs/build-baseline.log")
    assert statuses(work) == ["done", "done", "done", "failed", "not run"]
    assert "evidence/logs/build-baseline.log" in members(work)
    assert "evidence/engines/.baseline.building/build.log" in members(work)

    trace.unlink()
    again = run(*command, env=machine.environment, STANDIN_TRACE=str(trace))
    assert again.returncode == 0, again.stderr
    assert statuses(work) == ["done before"] * 3 + ["done"] * 2
    assert "ranks 0 are finished already" in (work / "logs" / "build-baseline.log").read_text()
    assert trace.read_text().split() == ["1", "0", "1"]
    for kind, layers in (("baseline", 6), ("fused", 4)):
        contract = engine_manifest.read(work / "engines" / kind)
        assert (contract.backend, contract.tp_size) == ("tensorrt-llm", 2)
        assert len(contract.architecture.layers) == layers
        assert (contract.max_batch_size, contract.max_seq_len) == (4, 256)

    trace.unlink()
    third = run(*command, env=machine.environment, STANDIN_TRACE=str(trace))
    assert third.returncode == 0, third.stderr
    assert statuses(work) == ["done before"] * 5
    assert not trace.exists()

    # A changed checkpoint and a damaged engine are made again; the fused engine's inputs then are the same.
    (work / "checkpoints" / "fused" / "config.json").write_text("{}")
    (work / "engines" / "baseline" / "rank0.engine").write_text("damaged")
    fourth = run(*command, env=machine.environment, STANDIN_TRACE=str(trace))
    assert fourth.returncode == 0, fourth.stderr
    assert statuses(work) == ["done before", "done before", "done", "done", "done before"]
    assert "is of other inputs or unfinished; it is written again" in fourth.stdout
    assert json.loads((work / "checkpoints" / "fused" / "config.json").read_text())["num_hidden_layers"] == 4

    # Another seed is another model.
    fifth = run(*command, "--seed", 1, env=machine.environment)
    assert fifth.returncode == 0, fifth.stderr
    assert statuses(work) == ["done"] * 5
    assert manifest.read(work / "checkpoints" / "fused")["random_weights"] == {"seed": 1}


def test_pytorch_end_to_end(config: Path, machine: StandIn, tmp_path: Path) -> None:
    """With the figures of a stand-in of trtllm-bench, which has no model."""
    work = tmp_path / "random"
    command = ("--path", "pytorch", "--until", "bench-pytorch", *TINY)
    result = run("--model", config, *command, "-o", work, env=machine.environment)
    assert result.returncode == 0, result.stderr
    names = ["write-baseline", "write-fused", "check-baseline", "check-fused", "bench-pytorch"]
    assert [*results(work)] == names
    assert statuses(work) == ["done"] * 5
    for kind in ("baseline", "fused"):
        assert engine_manifest.read(work / "serving" / kind).backend == "tensorrt-llm-pytorch"
        assert (work / "models" / kind / "tokenizer.json").is_file()
    assert len(huggingface.read(work / "models" / "baseline").architecture.layers) == 6
    names = members(work)
    assert "evidence/serving/fused/llm.yaml" in names
    assert "evidence/reports/bench-pytorch/report.html" in names
    assert "evidence/models/fused/config.json" in names


def test_a_model_directory(tiny_hf: Path, machine: StandIn, tmp_path: Path) -> None:
    """Its own weights and tokenizer; the directory itself is the PyTorch path's baseline."""
    work = tmp_path / "work"
    told = dry("--model", tiny_hf, *TINY, "-o", work)
    commands = {stage["name"]: stage["command"] for stage in told["stages"]}
    assert "write-baseline" not in commands
    assert commands["check-baseline"][1] == str(tiny_hf)
    assert "--random-weights" not in commands["convert-fused"]
    assert commands["deploy-engine-fused"][4] == str(tiny_hf)
    command = ("--model", tiny_hf, *TINY, "--path", "engine", "--until", "convert-fused", "-o", work)
    result = run(*command, env=machine.environment)
    assert result.returncode == 0, result.stderr
    assert "random_weights" not in manifest.read(work / "checkpoints" / "fused")
    assert not (work / "models").exists()


def test_the_evidence(config: Path, machine: StandIn, tmp_path: Path) -> None:
    work = tmp_path / "work"
    command = ("--model", config, *TINY, "--workers", 1, "--path", "engine", "--until", "build-baseline")
    result = run(*command, "-o", work, env=machine.environment)
    assert result.returncode == 0, result.stderr
    names = members(work)
    expected = {"stages.json", "logs/convert-fused.log", "logs/build-baseline.log"}
    expected |= {"checkpoints/fused/ffn-fusion.json", "engines/baseline/ffn-fusion.json"}
    expected |= {f"machine/{n}" for n in ("doctor.json", "nvidia-smi.txt", "packages.txt", "facts.json")}
    assert {f"evidence/{name}" for name in expected} <= set(names)
    assert not [n for n in names if n.endswith((".safetensors", ".engine", "tokenizer.json"))]
    with tarfile.open(work / "evidence.tar.gz") as archive:

        def read(name: str) -> bytes:
            file = archive.extractfile(f"evidence/{name}")
            assert file is not None
            return file.read()

        stages = json.loads(read("stages.json"))["stages"]
        assert stages["build-baseline"]["seconds"] > 0
        assert stages["build-baseline"]["exit"] == 0
        assert json.loads(read("machine/doctor.json"))["TensorRT-LLM engine"]["ready"]
        assert json.loads(read("machine/facts.json"))["arguments"]["tp_size"] == "2"
        assert b"tensorrt_llm==1.2.1" in read("machine/packages.txt")


@pytest.mark.parametrize(
    ("options", "machine_is", "message"),
    [
        (("--model", "llama-3.1-405b"), {}, "build-baseline, .*: 116.9 GB of each GPU, it has 85.5; raise"),
        (("--model", "llama-3.1-70b", "--tp", 4), {"free_mib": 1000}, "GB of host memory, .* free; lower"),
    ],
)
def test_what_cannot_fit_is_told_first(tmp_path: Path, options, machine_is, message: str) -> None:
    machine = StandIn(tmp_path / "machine", **machine_is)
    result = run(*options, "--path", "engine", "-o", tmp_path / "w", env=machine.environment)
    line = error(result)
    assert re.search(f"{message}|GB are needed", line), line  # a small disk is told before
    assert not (tmp_path / "w" / "checkpoints").exists()


def test_two_runs_in_one_directory(config: Path, machine: StandIn, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "w" / "stages").mkdir(parents=True)
    held = os.open(tmp_path / "w" / "stages", os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        result = run("--model", config, *TINY, "-o", tmp_path / "w", env=machine.environment)
    finally:
        os.close(held)
    assert "another run works there" in error(result)
    assert not (tmp_path / "w" / "models").exists()


@pytest.mark.parametrize(
    ("machine_is", "missing", "path", "message"),
    [
        ({"gpus": 1}, (), "engine", "gpu: --tp 2 needs as many, 1 visible"),
        (
            {"version": "1.3.0rc20"},
            (),
            "engine",
            "deploy-engine-baseline: tensorrt_llm: no .* image",
        ),
        ({"version": "0.21.0"}, (), "pytorch", "tensorrt_llm: 0.21.0 has no PyTorch backend"),
        (
            {},
            ("tritonserver",),
            "engine",
            "serve-engine: .*tritonserver: missing; use",
        ),
        ({}, ("trtllm-build",), "engine", "trtllm-build: not found"),
    ],
)
def test_what_is_missing_is_told_first(
    config: Path, tmp_path: Path, machine_is, missing, path: str, message: str
) -> None:
    machine = StandIn(tmp_path / "machine", **machine_is)
    for name in missing:
        (machine.directory / "bin" / name).unlink()
    command = ("--model", config, *TINY, "--path", path, "-o", tmp_path / "w")
    line = error(run(*command, env=machine.environment))
    assert re.search(message, line), line
    if "until" in line:
        assert re.search(r"or stop before it: --until (bench-engine|deploy-engine-fused)$", line)
    assert not (tmp_path / "w" / "models").exists()


def free_port() -> int:
    """The first of 13 free ones in a row, which two servers take."""
    for _ in range(100):
        with ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind(("", 0))
            port = first.getsockname()[1]
            with suppress(OSError, OverflowError):
                for other in range(port + 1, port + 13):
                    stack.enter_context(socket.socket()).bind(("", other))
                return port
    raise AssertionError("no free ports")


def listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def alive(pids: Path) -> list[int]:
    """Processes of the stand-in that still run; one that ended may wait for init to take note."""
    written = [int(line) for line in pids.read_text().split()]
    assert written
    return [pid for pid in written if running(pid)]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def evidence_file(work: Path, name: str) -> str:
    with tarfile.open(work / "evidence.tar.gz") as archive:
        file = archive.extractfile(f"evidence/{name}")
        assert file is not None
        return file.read().decode()


@pytest.mark.parametrize("path", ["engine", "pytorch"])
def test_the_whole_way(path: str, config: Path, machine: StandIn, tmp_path: Path) -> None:
    """The real mpirun; trtllm-build, trtllm-bench and tritonserver are stand-ins, no figure counts."""
    work, pids, port = tmp_path / "work", tmp_path / "pids", free_port()
    command = ("--model", config, *TINY, "--workers", 1, "--path", path, "--http-port", port, "-o", work)
    result = run(*command, env=machine.environment, STANDIN_PIDS=str(pids))
    assert result.returncode == 0, result.stderr
    assert set(statuses(work)) == {"done"}
    assert list(results(work))[-4:] == [
        *(f"bench-{path}", f"deploy-{path}-baseline", f"deploy-{path}-fused", f"serve-{path}")
    ]
    assert len(pids.read_text().split()) == (4 if path == "engine" else 2)  # a server each rank, or one
    assert not alive(pids)
    assert f"{path}-baseline answers on port {port}" in (work / "logs" / f"serve-{path}.log").read_text()
    model = "ensemble" if path == "engine" else "tensorrt_llm"
    for kind, gpus in (("baseline", "0,1"), ("fused", "2,3")):
        log = evidence_file(work, f"logs/server-{path}-{kind}.log")
        assert f"GPUs {gpus}\n" in log
        assert f"cores {hardware.cores()}\n" in log  # mpirun binds no rank to one
        place = f"triton/{path}/{kind}"
        assert "TRITONSERVER" in evidence_file(work, f"{place}/manifests/start.sh")
        assert f'name: "{model}"' in evidence_file(work, f"{place}/repository/{model}/config.pbtxt")
    if path == "engine":
        text = evidence_file(work, f"triton/{path}/fused/repository/tensorrt_llm/config.pbtxt")
        assert re.search(r'"enable_kv_cache_reuse"\s+value \{\s+string_value: "false"', text)
    else:
        text = evidence_file(work, f"triton/{path}/fused/repository/tensorrt_llm/1/model.yaml")
        assert "enable_block_reuse: false" in text

    triton = json.loads(evidence_file(work, f"reports/triton-{path}/report.json"))
    assert triton["method"] == "through Triton"
    settings = {"prompts": 8, "max_tokens": 64, "concurrency": [1, 4], "rounds": 5, "seed": 0}
    told = triton["settings"]
    assert len(told.pop("warm_up_rounds")) == 2
    assert told.pop("command").startswith("ffn-fusion compare-latency http://127.0.0.1:")
    assert len(told.pop("prompts_sha256")) == 64
    assert told == {
        **settings,
        "requests": [8, 8],
        "load": "closed",
        "equal_lengths": path == "engine",  # the LLM API takes no min_tokens
        "targets": None,
    }
    known = ("had not settled", "takes no min_tokens")
    assert all(any(words in note for words in known) for note in triton["notes"])
    assert any("takes no min_tokens" in note for note in triton["notes"]) == (path == "pytorch")
    bench = json.loads(evidence_file(work, f"reports/bench-{path}/report.json"))
    assert "trtllm-bench" in bench["method"]
    assert bench["settings"]["concurrency"] == [1, 4]

    names = members(work)
    expected = [f"reports/{way}-{path}/report.html" for way in ("bench", "triton")]
    expected += ["stages.json", "prompts.txt", "machine/nvidia-smi.txt", "machine/nvidia-smi-topo.txt"]
    assert {f"evidence/{name}" for name in expected} <= set(names)
    heavy = (".safetensors", ".engine", "tokenizer.json", ".bin")
    assert not [name for name in names if name.endswith(heavy)]
    assert json.loads(evidence_file(work, "machine/doctor.json"))["TensorRT-LLM engine"]["ready"]
    assert "tensorrt_llm==1.2.1" in evidence_file(work, "machine/packages.txt")
    assert (work / "evidence.tar.gz").stat().st_size < 10e6


def test_a_run_killed_while_it_serves(config: Path, machine: StandIn, tmp_path: Path) -> None:
    """Whatever ends it, no rank stays, and the next run repeats that stage alone."""
    work, pids, port = tmp_path / "work", tmp_path / "pids", free_port()
    command = ("--model", config, *TINY, "--path", "engine", "--http-port", port, "-o", work)
    ready = run(*command, "--until", "deploy-engine-fused", env=machine.environment)
    assert ready.returncode == 0, ready.stderr
    number_before = len(results(work))

    log = work / "logs" / "serve-engine.log"
    for number, loading_s, ranks in (
        (signal.SIGTERM, "0.5", 4),  # while it is measured
        (signal.SIGTERM, "300", 2),  # while the baseline's server loads
        (signal.SIGHUP, "300", 2),
        (signal.SIGINT, "300", 2),
        (signal.SIGKILL, "300", 2),
    ):
        for file in (pids, log):
            file.unlink(missing_ok=True)
        process = start(
            *command, env={**machine.environment, "STANDIN_PIDS": str(pids), "STANDIN_LOADING_S": loading_s}
        )
        wait_until(lambda count=ranks: pids.is_file() and len(pids.read_text().split()) == count)
        wait_until(lambda count=ranks: listens(port) and (count < 4 or "fused answers" in log.read_text()))
        process.send_signal(number)
        assert process.wait(60) != 0
        wait_until(lambda: not alive(pids))
        assert not listens(port)
        assert not (work / "reports" / "triton-engine").exists()
        if number != signal.SIGKILL:
            assert statuses(work)[-1] == "failed"
            assert "evidence/logs/server-engine-baseline.log" in members(work)

    again = run(*command, env=machine.environment)
    assert again.returncode == 0, again.stderr
    assert statuses(work) == ["done before"] * number_before + ["done"]


def start(*arguments: object, env: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(EXAMPLE / "run.py"), *map(str, arguments)],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


SERVER = """
import http.server, json, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        fields = [{"name": name} for name in ("text_input", "max_tokens")]
        self.answer({"inputs": fields, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", "all")})
    def do_POST(self):
        self.answer({"text_output": "a"} if sys.argv[2] == "well" else {"error": "CUDA out of memory"})
    def answer(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
    def log_message(self, *args): pass
if len(sys.argv) > 3:
    os.setsid()  # as the LLM API's workers do
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
CLIENT = """
import json, sys, urllib.request
for port in sys.argv[1:]:
    print(json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/"))["gpus"])
sys.exit(3)
"""


def start_script(directory: Path, port: int, *, answers: str = "well", after: str = "wait") -> Path:
    """A start.sh with a server in a session of its own, which its mark alone tells to be the script's."""
    directory.mkdir()
    (directory / "server.py").write_text(SERVER)
    script = directory / "start.sh"
    script.write_text(f"{sys.executable} {directory / 'server.py'} {port} {answers} alone &\n{after}\n")
    return script


def serve(servers: list[tuple[object, ...]], logs: Path, *command: str, timeout_s: int = 30):
    options = [str(word) for server in servers for word in ("--server", *server)]
    options += ["--logs", str(logs), "--timeout", str(timeout_s)]
    return subprocess.run(
        [sys.executable, str(EXAMPLE / "serving.py"), *options, "--", *command],
        capture_output=True,
        text=True,
        timeout=120,
    )


def one_line(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 1, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_two_servers_answer_while_the_command_runs(tmp_path: Path) -> None:
    port = free_port()
    ports = [port, port + 10]
    scripts = [start_script(tmp_path / str(n), port) for n, port in enumerate(ports)]
    servers = [("a", scripts[0], ports[0], "0,1"), ("b", scripts[1], ports[1], "all")]
    result = serve(servers, tmp_path, sys.executable, "-c", CLIENT, *map(str, ports))
    assert result.returncode == 3, result.stderr  # the command's own
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    assert result.stdout.split("\n")[2:4] == ["0,1", visible]
    assert not any(map(listens, ports))


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    port = free_port()
    first = start_script(tmp_path / "0", port)
    (tmp_path / "bad.sh").write_text("echo no GPU; exit 7\n")
    servers = [("good", first, port, "all"), ("bad", tmp_path / "bad.sh", port + 10, "all")]
    line = one_line(serve(servers, tmp_path, "true"))
    assert "bad: the server ended with 7; see" in line
    assert "no GPU" in Path(line.rpartition("see ")[2]).read_text()
    assert not listens(port)


def test_a_server_that_gives_no_token(tmp_path: Path) -> None:
    """It tells its models, but its answer is an error: that error is told."""
    port = free_port()
    script = start_script(tmp_path / "0", port, answers="badly")
    line = one_line(serve([("sick", script, port, "all")], tmp_path, "true", timeout_s=3))
    assert f"sick: no token in 3 s: http://127.0.0.1:{port}: CUDA out of memory; see" in line
    assert not listens(port)


def test_a_server_that_ends_while_it_is_measured(tmp_path: Path) -> None:
    port = free_port()
    script = start_script(tmp_path / "0", port, after="sleep 3; exit 9")
    line = one_line(serve([("weak", script, port, "all")], tmp_path, "sh", "-c", "sleep 4; exit 1"))
    assert "weak: the server ended while it was measured; see" in line
    assert not listens(port)


def test_a_taken_port(tmp_path: Path) -> None:
    port = free_port()
    script = start_script(tmp_path / "0", port)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port + 2))
        taken.listen()
        line = one_line(serve([("late", script, port, "all")], tmp_path, "true"))
    assert line.startswith(f"error: port {port + 2}: in use; ")


def results(work: Path) -> dict:
    return json.loads((work / "stages.json").read_text())["stages"]


def statuses(work: Path) -> list[str]:
    return [stage["status"] for stage in results(work).values()]


def members(work: Path) -> list[str]:
    with tarfile.open(work / "evidence.tar.gz") as archive:
        return archive.getnames()
