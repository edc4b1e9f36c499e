"""examples/h100_node: what it would run for every shape, and a tiny run with the stand-ins."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from standin import StandIn
from test_random_weights import write_config

from builder import huggingface, manifest
from engines import manifest as engine_manifest

EXAMPLE = Path(__file__).parent.parent / "examples" / "h100_node"
SHAPES = {  # and their parameters
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "nemotron-super-49b": 49_867_145_216,
    "nemotron-ultra-253b": 253_402_005_504,
}
TINY = ("--drop-attention", "2-5", "--group", "2-4", "--tp", 2, "--max-seq-len", 64, "--max-batch-size", 4)


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
    limits = "--backend tensorrt-llm --max-batch-size 4 --max-seq-len 64 --workers 1"
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
            f"--tokenizer {work}/models/fused --concurrency 1,32 --rounds 5 -o {work}/reports/bench-engine"
        ),
        **{
            f"deploy-engine-{kind}": (
                f"ffn-fusion deploy {work}/engines/{kind} --tokenizer {work}/models/fused "
                f"-o {work}/triton/engine/{kind}/repository --write-only "
                f"--manifests {work}/triton/engine/{kind}/manifests --http-port {port} "
                "--kv-cache-fraction 0.9"
            )
            for kind, port in (("baseline", 8000), ("fused", 8010))
        },
        "serve-engine": (
            f"{python} {serving} --server {start.format('baseline')}:8000:0,1 "
            f"--server {start.format('fused')}:8010:2,3 --logs {work}/logs -- "
            "ffn-fusion compare-latency http://127.0.0.1:8000 http://127.0.0.1:8010 --concurrency 1,32 "
            f"-o {work}/reports/triton-engine"
        ),
    }


def test_the_dry_run_as_text(tmp_path: Path) -> None:
    result = run("--model", "nemotron-ultra-253b", "--path", "engine", "--dry-run", "-o", tmp_path / "w")
    assert result.returncode == 0, result.stderr
    assert "build-fused: 536.3 GB of disk, 73.5 GB of each GPU" in result.stdout
    assert "--group 66-73 --group 74-85 --group 86-100 --group 101-114" in result.stdout
    assert "serve-engine: left out: both servers need 147.0 GB of each GPU, it has 85.5" in result.stdout


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
    ):
        result = run(*arguments, *output)
        assert result.returncode == 2, result.stderr
        assert words in result.stderr
    assert "shapes are llama-3.1-8b" in error(run("--model", "llama-9", *output))
    told = error(run("--model", "llama-3.1-70b", "--tp", 2, *output))
    assert "fused: layer 45: the joined gate and up weight has" in told
    assert "fuse groups of 9 such FFNs at most" in told
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
        assert (contract.max_batch_size, contract.max_seq_len) == (4, 64)

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
    limits = ("--max-seq-len", 256, "--max-batch-size", 8, "--concurrency", "1,8")
    command = ("--path", "pytorch", "--until", "bench-pytorch", *TINY, *limits)
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
        (("--model", "llama-3.1-405b"), {}, "build-baseline: 115.8 GB of each GPU, it has 85.5; raise --tp"),
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


SERVER = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(os.environ.get("CUDA_VISIBLE_DEVICES", "all").encode())
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
CLIENT = """
import sys, urllib.request
for port in sys.argv[1:]:
    print(urllib.request.urlopen(f"http://127.0.0.1:{port}/").read().decode())
sys.exit(3)
"""


def start_script(directory: Path, port: int) -> Path:
    """A start.sh whose server is a child of the shell, as mpirun's ranks are."""
    directory.mkdir()
    (directory / "server.py").write_text(SERVER)
    script = directory / "start.sh"
    script.write_text(f"{sys.executable} {directory / 'server.py'} {port}\necho ended\n")
    return script


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def serve(servers: list[str], logs: Path, *command: str):
    options = [word for server in servers for word in ("--server", server)]
    return subprocess.run(
        [sys.executable, str(EXAMPLE / "serving.py"), *options, "--logs", str(logs), "--", *command],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_two_servers_answer_while_the_command_runs(tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    scripts = [start_script(tmp_path / str(n), port) for n, port in enumerate(ports)]
    servers = [f"{scripts[0]}:{ports[0]}:0,1", f"{scripts[1]}:{ports[1]}:"]
    result = serve(servers, tmp_path, sys.executable, "-c", CLIENT, *map(str, ports))
    assert result.returncode == 3, result.stderr  # the command's own
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    assert result.stdout.split("\n")[2:4] == ["0,1", visible]
    for port in ports:
        with socket.socket() as s:
            assert s.connect_ex(("127.0.0.1", port)) != 0  # ended


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    port = free_port()
    first = start_script(tmp_path / "0", port)
    (tmp_path / "bad.sh").write_text("echo no GPU; exit 7\n")
    result = serve([f"{first}:{port}:", f"{tmp_path / 'bad.sh'}:{free_port()}:"], tmp_path, "true")
    assert result.returncode == 1
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert "bad.sh: the server ended with 7; see" in lines[0]
    log = Path(lines[0].rpartition("see ")[2])
    assert "no GPU" in log.read_text()
    with socket.socket() as s:
        assert s.connect_ex(("127.0.0.1", port)) != 0


def results(work: Path) -> dict:
    return json.loads((work / "stages.json").read_text())["stages"]


def statuses(work: Path) -> list[str]:
    return [stage["status"] for stage in results(work).values()]


def members(work: Path) -> list[str]:
    with tarfile.open(work / "evidence.tar.gz") as archive:
        return archive.getnames()
