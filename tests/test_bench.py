"""compare-latency --via trtllm-bench: command lines, the report's fields, what is refused, what failures say.

Nothing here measures: `standin` has the command line, report and failures of trtllm-bench only, with
made-up numbers (10 ms a token for a baseline, 8 for a candidate).
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from standin import BENCH_OPTIONS, StandIn, bench_era

from builder import export, huggingface, trtllm
from builder.errors import UserError
from builder.plan import Plan
from engines import hardware
from engines.manifest import Manifest
from engines.trtllm import bench, bench_report
from engines.trtllm.bench_command import Load, Subject, arguments, llm_options
from engines.trtllm.serving import Serving, ServingOptions

TOOL = str(Path(sys.executable).with_name("ffn-fusion"))
ONE = Load(concurrency=1, requests=32, input_tokens=128, output_tokens=64)
MANY = replace(ONE, concurrency=32, requests=128)


def contract(tiny_hf: Path, backend: str, **values: object) -> Manifest:
    given = {
        "backend": backend,
        "checkpoint_digest": "",
        "architecture": huggingface.read(tiny_hf).architecture,
        "dtype": "bfloat16",
        "tp_size": 2,
        "pp_size": 1,
        "max_batch_size": 32,
        "max_input_len": 128,
        "max_seq_len": 256,
        "hardware": {},
        "compiler": {"tensorrt_llm": "1.2.1", "model": str(tiny_hf)},
        **values,
    }
    return Manifest(**given)


@pytest.fixture
def engine(tiny_hf: Path) -> Subject:
    manifest = contract(tiny_hf, "tensorrt-llm")
    return Subject(directory=Path("/e"), model=Path("/m"), manifest=manifest)


@pytest.fixture
def served(tiny_hf: Path, tmp_path: Path) -> Subject:
    """A directory of the PyTorch backend, with the llm.yaml that build-engine writes."""
    serving = Serving(
        model=tiny_hf,
        checkpoint=huggingface.read(tiny_hf).cast("bfloat16"),
        options=ServingOptions(tp_size=2, kv_cache_fraction=0.8),
        max_input_len=128,
        max_seq_len=256,
    )
    (tmp_path / "llm.yaml").write_text(yaml.safe_dump(serving.llm_arguments()))
    manifest = contract(tiny_hf, "tensorrt-llm-pytorch")
    return Subject(directory=tmp_path, model=Path("/m"), manifest=manifest)


def words(measured: Subject, load: Load, version: str) -> str:
    files = {"dataset": Path("/w/d"), "report": Path("/w/r.json"), "config": Path("/w/c.yaml")}
    return " ".join(arguments(measured, load, version=version, **files))


GENERAL = "--model /m --model_path /m --workspace /w"
TAIL_ONE = "--dataset /w/d --num_requests 32 --warmup 2 --concurrency 1 --report_json /w/r.json"
TAIL_MANY = (
    "--dataset /w/d --num_requests 128 --warmup 32 --concurrency 32 --report_json /w/r.json --streaming"
)


@pytest.mark.parametrize(
    ("version", "load", "expected"),
    [
        ("0.20.0", ONE, f"{GENERAL} latency --engine_dir /e {TAIL_ONE}"),
        ("0.21.0", MANY, f"{GENERAL} throughput --engine_dir /e {TAIL_MANY}"),
        ("1.0.0", ONE, f"{GENERAL} latency --engine_dir /e --backend tensorrt {TAIL_ONE}"),
        ("1.1.0", MANY, f"{GENERAL} throughput --engine_dir /e --backend tensorrt {TAIL_MANY}"),
        ("1.2.1", ONE, f"{GENERAL} latency --engine_dir /e --backend tensorrt {TAIL_ONE}"),
        ("1.3.0rc20", MANY, f"{GENERAL} throughput --engine_dir /e --backend tensorrt {TAIL_MANY}"),
    ],
)
def test_golden_arguments_of_an_engine(engine: Subject, version: str, load: Load, expected: str) -> None:
    assert words(engine, load, version) == expected


SERVED = "--backend pytorch --tp 2 --pp 1 --max_seq_len 256 --kv_cache_free_gpu_mem_fraction 0.8"
LIMITS = "--max_batch_size 32 --max_num_tokens 8192"
YAML = "--extra_llm_api_options /w/c.yaml"


@pytest.mark.parametrize(
    ("version", "load", "expected"),
    [
        ("1.0.0", ONE, f"{GENERAL} latency {SERVED} {TAIL_ONE}"),
        ("1.0.0", MANY, f"{GENERAL} throughput {SERVED} {LIMITS} {YAML} {TAIL_MANY}"),
        ("1.1.0", ONE, f"{GENERAL} latency {SERVED} {YAML} {TAIL_ONE}"),
        ("1.2.1", ONE, f"{GENERAL} latency {SERVED} {YAML} {TAIL_ONE}"),
        ("1.3.0", MANY, f"{GENERAL} throughput {SERVED} {LIMITS} {YAML} {TAIL_MANY}"),
    ],
)
def test_golden_arguments_of_the_pytorch_backend(
    served: Subject, version: str, load: Load, expected: str
) -> None:
    assert words(served, load, version) == expected


@pytest.mark.parametrize("version", ["0.20.0", "0.21.0", "1.0.0", "1.1.0", "1.2.1"])
@pytest.mark.parametrize("load", [ONE, MANY])
def test_every_argument_is_one_that_the_release_has(
    engine: Subject, served: Subject, version: str, load: Load
) -> None:
    table = json.loads(BENCH_OPTIONS.read_text())
    mode = {**table[load.mode]["common"], **table[load.mode][bench_era(version)]}
    subjects = [engine] if version.startswith("0.") else [engine, served]
    for subject in subjects:
        given = words(subject, load, version)
        general, own = given.split(f" {load.mode} ")
        names = re.findall(r"--(\w+)", own)
        assert len(names) >= 6
        assert set(names) <= set(mode)
        assert set(re.findall(r"--(\w+)", general)) <= set(table["general"])
        backend = re.search(r"--backend (\w+)", own)
        assert backend is None or backend[1] in mode["backend"]


def test_golden_options_of_the_pytorch_backend(served: Subject) -> None:
    """Only what no option says; KV blocks are not reused: the warm-up has the same prompts."""
    assert llm_options(served, MANY) == {
        "dtype": "bfloat16",
        "max_input_len": 128,
        "max_beam_width": 1,
        "enable_chunked_prefill": True,
        "kv_cache_config": {"free_gpu_memory_fraction": 0.8, "enable_block_reuse": False},
        "cuda_graph_config": {"enable_padding": True, "max_batch_size": 32},
    }
    assert llm_options(served, ONE)["cuda_graph_config"]["max_batch_size"] == 1


def test_dataset(tmp_path: Path) -> None:
    file = tmp_path / "dataset.jsonl"
    bench.write_dataset(file, vocab_size=320, load=replace(ONE, requests=5), seed=1)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [list(row) for row in rows] == [["task_id", "input_ids", "output_tokens"]] * 5
    assert {(len(row["input_ids"]), row["output_tokens"]) for row in rows} == {(128, 64)}
    assert all(0 <= i < 320 for row in rows for i in row["input_ids"])
    assert rows[0]["input_ids"] != rows[1]["input_ids"]
    again = tmp_path / "again.jsonl"
    bench.write_dataset(again, vocab_size=320, load=replace(ONE, requests=5), seed=1)
    assert again.read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("load", "limits", "message"),
    [
        ({"concurrency": 33, "requests": 64}, {}, "concurrency: 33 is above max_batch_size 32 of /e"),
        ({"concurrency": 8, "requests": 4}, {}, "num_requests: 4 cannot keep 8 in flight"),
        ({"input_tokens": 129}, {}, "input_tokens: 129 is above max_input_len 128"),
        ({"output_tokens": 129}, {}, "are 257, above max_seq_len 256 of /e; lower one"),
        ({}, {"tp_size": 16}, "gpu: 16 ranks of /e need as many, 8 visible"),
    ],
)
def test_what_an_engine_cannot_do(
    engine: Subject, machine: StandIn, monkeypatch: pytest.MonkeyPatch, load: dict, limits: dict, message: str
) -> None:
    monkeypatch.setenv("PATH", machine.environment["PATH"])
    bench.check(engine, ONE, "1.2.1")
    with pytest.raises(UserError, match=message):
        bench.check(
            replace(engine, manifest=replace(engine.manifest, **limits)), replace(ONE, **load), "1.2.1"
        )


def test_mpirun_is_refused(engine: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.mpi, "place", lambda: (0, 2))
    with pytest.raises(UserError, match="mpirun: trtllm-bench starts its own ranks"):
        bench.check(engine, ONE, "1.2.1")


def test_latency_of_1_0_cannot_be_told_of_cuda_graphs(
    served: Subject, machine: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", machine.environment["PATH"])
    file = served.directory / "llm.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "cuda_graph_config": None}))
    for load, version in ((MANY, "1.0.0"), (ONE, "1.1.0")):
        bench.check(served, load, version)
        assert llm_options(served, load)["cuda_graph_config"] is None
    with pytest.raises(UserError, match=r"without CUDA graphs, which trtllm-bench latency of 1\.0\.0"):
        bench.check(served, ONE, "1.0.0")


REPORT = {
    "engine": {"backend": "TRT"},
    "request_info": {"num_requests": 4, "avg_output_length": 64},
    "performance": {
        "system_output_throughput_tok_s": 900.0,
        "output_throughput_per_user_tok_s": 90.0,
        "request_latency_percentiles_ms": {"p50": 7, "p90": 8, "p95": 8.5, "p99": 9, "average": 7.5},
    },
    "streaming_metrics": {
        "ttft_percentiles": {"p50": 1, "p90": 2, "p95": 2.5, "p99": 3, "average": 1.5},
        "tpot_percentiles": {"p50": 4, "p90": 5, "p95": 5.5, "p99": 6, "average": 4.5},
    },
}


def test_report_is_read(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps(REPORT))
    result = bench_report.read(file)
    assert (result.backend, result.requests, result.output_tokens) == ("TRT", 4, 64.0)
    assert (result.tokens_per_s, result.user_tokens_per_s) == (900.0, 90.0)
    for got, first in ((result.ttft_ms, 1), (result.token_ms, 4), (result.latency_ms, 7)):
        assert (got.p50, got.p90, got.p99, got.mean) == (first, first + 1, first + 2, first + 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"streaming_metrics": None}, r"streaming_metrics.ttft_percentiles.p50 is None, not a positive"),
        ({"performance": {}}, r"performance.request_latency_percentiles_ms.p50 is None"),
        ({"request_info": {"num_requests": 0}}, r"request_info.num_requests is 0, not a positive number"),
    ],
)
def test_report_without_a_field(tmp_path: Path, change: dict, message: str) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps({**REPORT, **change}))
    with pytest.raises(UserError, match=f"{file}: {message}"):
        bench_report.read(file)


# The command, from here on, with engine directories of a stand-in build.


@pytest.fixture
def machine(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path / "machine")


def build(tiny_hf: Path, directory: Path, version: str = "1.2.1") -> Path:
    """baseline and candidate: engine directories, TP 2, of a plain and a fused checkpoint."""
    machine = StandIn(directory / "machine", version=version)
    plans = {"baseline": Plan(), "candidate": Plan(drop_attention=(2, 3, 4))}
    for name, plan in plans.items():
        source = plan.apply(huggingface.read(tiny_hf)) if name == "candidate" else huggingface.read(tiny_hf)
        trtllm.convert(source, directory / f"{name}.checkpoint", tp_size=2, dtype="bfloat16")
        command = [TOOL, "build-engine", f"{directory / name}.checkpoint", "-o", str(directory / name)]
        command += ["--backend", "tensorrt-llm", "--max-seq-len", "256", "--max-input-len", "128"]
        command += ["--workers", "1"]
        result = subprocess.run(command, env=machine.environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    return directory


@pytest.fixture(scope="module")
def engines(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tiny_hf, tmp_path_factory.mktemp("bench"))


def run(machine: StandIn, engines: Path, model: Path, output: Path, *options: str, **environment: str):
    command = [TOOL, "compare-latency", str(engines / "baseline"), str(engines / "candidate")]
    command += ["--via", "trtllm-bench", "-o", str(output)]
    if "--tokenizer" not in options:
        command += ["--tokenizer", str(model)]
    return subprocess.run(
        [*command, *options],
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
    assert "Traceback" not in result.stderr
    return lines[0]


def test_command(machine: StandIn, engines: Path, tiny_hf: Path, tmp_path: Path) -> None:
    trace, output = tmp_path / "trace", tmp_path / "report"
    result = run(machine, engines, tiny_hf, output, "--json", STANDIN_TRACE=str(trace))
    assert result.returncode == 0, result.stderr
    order = [
        f"{side}-{level}-{number}.json"
        for level in (1, 32)
        for number, sides in ((1, "bc"), (2, "cb"), (3, "bc"), (4, "cb"), (5, "bc"))
        for side in ({"b": "baseline", "c": "candidate"}[s] for s in sides)
    ]
    assert trace.read_text().split() == order
    values = json.loads(result.stdout)
    rows = {(row["metric"], row["concurrency"]): row for row in values["rows"]}
    assert len(rows) == 5 * 2
    # By the stand-in: 10 ms a token x 1.01 to 1.05 over the rounds x 1.01 or 1.32 for the level.
    first = rows["inter_token_ms", 1]
    assert first["baseline"]["p50"] == pytest.approx(10 * 1.03 * 1.01)
    assert first["baseline"]["p99"] == pytest.approx(10 * 1.03 * 1.01 * 1.3)
    assert first["baseline"]["mean"] == pytest.approx(10 * 1.03 * 1.01 * 1.02)
    assert first["baseline"]["count"] == 5 * 32
    assert rows["inter_token_ms", 32]["candidate"]["count"] == 5 * 128
    for row in rows.values():
        expected = 1 / 0.8 if "tokens" in row["metric"] else 0.8
        assert row["ratio"]["value"] == pytest.approx(expected)
        assert row["ratio"]["low"] <= expected <= row["ratio"]["high"]
    assert values["token_gap_ms"] == {}
    assert values["settings"]["requests"] == [32, 128]
    assert [facts["tp_size"] for facts in (values["baseline_facts"], values["candidate_facts"])] == [2, 2]
    assert any("percentiles of a run, not single values" in note for note in values["notes"])
    assert not any("the interval is too narrow" in note for note in values["notes"])
    names = {p.name for p in (output / "runs").iterdir()}
    assert "dataset.jsonl" in names
    assert "baseline-1-1.log" in names
    assert len([name for name in names if name.endswith(".json")]) == 20
    page = (output / "report.html").read_text()
    for text in (
        "with trtllm-bench 1.2.1, without Triton",
        "NVIDIA H100 80GB HBM3 (driver 580.159.04, SM clock at most 1980 MHz, 345 MHz after measuring)",
        "8 x NVIDIA H100",
        "tensorrt_llm 1.2.1",
        "tensor-parallel ranks",
        "built with TensorRT-LLM",
    ):
        assert text in page
    assert page.count("<svg") == 9
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_table(machine: StandIn, engines: Path, tiny_hf: Path, tmp_path: Path) -> None:
    options = ("--concurrency", "4", "--num-requests", "8", "--rounds", "5", "--input-tokens", "16")
    result = run(machine, engines, tiny_hf, tmp_path / "r", *options, "--max-tokens", "8")
    assert result.returncode == 0, result.stderr
    assert "tokens/s, one" in result.stdout
    assert "The candidate is 1.25 times faster per token at 4 clients" in result.stdout
    assert "comparisons" not in result.stdout
    rows = (tmp_path / "r" / "runs" / "dataset.jsonl").read_text().splitlines()
    assert (len(rows), len(json.loads(rows[0])["input_ids"])) == (8, 16)


@pytest.mark.parametrize("version", ["0.20.0", "0.21.0", "1.0.0", "1.1.0"])
def test_other_releases(tiny_hf: Path, tmp_path: Path, version: str) -> None:
    machine = StandIn(tmp_path / "other", version=version)
    engines = build(tiny_hf, tmp_path, version)
    result = run(machine, engines, tiny_hf, tmp_path / "r", "--rounds", "2", "--json")
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["rows"]) == 10


def test_pytorch_backend(tiny_hf: Path, tmp_path: Path) -> None:
    machine = StandIn(tmp_path / "machine", version="1.3.0")
    child = huggingface.read(tiny_hf).cast("bfloat16")
    for name, plan in (("baseline", Plan(drop_ffn=(5,))), ("candidate", Plan(drop_attention=(2, 3, 4)))):
        export.write(plan.apply(child), tiny_hf, tmp_path / f"{name}.model")
        command = [TOOL, "build-engine", str(tmp_path / f"{name}.model"), "-o", str(tmp_path / name)]
        command += ["--backend", "tensorrt-llm", "--tp", "2", "--max-seq-len", "256"]
        result = subprocess.run(command, env=machine.environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    command = [TOOL, "compare-latency", str(tmp_path / "baseline"), str(tmp_path / "candidate")]
    command += ["--via", "trtllm-bench", "-o", str(tmp_path / "report"), "--json"]
    result = subprocess.run(command, env=machine.environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    runs = tmp_path / "report" / "runs"
    options = yaml.safe_load((runs / "candidate-32-1.yaml").read_text())
    assert options["kv_cache_config"]["enable_block_reuse"] is False
    log = (runs / "candidate-1-1.log").read_text()
    assert f"--model_path {tmp_path / 'candidate.model'} " in log
    assert json.loads((runs / "candidate-1-1.json").read_text())["world_info"]["tp_size"] == 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("oom:candidate-1-1", r"trtllm-bench: torch\.OutOfMemoryError: CUDA out of memory\. Tried to"),
        ("silent:baseline-1-2", r"trtllm-bench: wrote no report; \[TRT-LLM\] \[I\] Keyboard interrupt"),
        ("kill:candidate-32-1", r"trtllm-bench: killed by SIGKILL"),
    ],
)
def test_failed_run(
    machine: StandIn, engines: Path, tiny_hf: Path, tmp_path: Path, fault: str, message: str
) -> None:
    line = error(run(machine, engines, tiny_hf, tmp_path / "r", STANDIN_FAULT=fault))
    assert re.search(message, line), line
    log = Path(line.split("the log is ")[1])
    assert log.read_text().splitlines()[0].startswith(str(machine.directory / "bin" / "trtllm-bench"))
    assert log.stem == fault.split(":")[1]
    assert not (tmp_path / "r").exists()
    again = run(machine, engines, tiny_hf, tmp_path / "r", "--concurrency", "1")
    assert again.returncode == 0, again.stderr


def test_unknown_option_is_told(machine: StandIn, engines: Path, tiny_hf: Path, tmp_path: Path) -> None:
    """An engine whose release says that it has --backend, measured by a trtllm-bench that has not."""
    script = machine.directory / "bin" / "trtllm-bench"
    script.write_text(script.read_text().replace('ERA = "1.2.1", "1.2"', 'ERA = "1.2.1", "0.20"'))
    line = error(run(machine, engines, tiny_hf, tmp_path / "r"))
    assert re.search(r"trtllm-bench: Error: No such option:? '?--backend", line), line


def test_engine_of_another_tensorrt(machine: StandIn, engines: Path, tiny_hf: Path, tmp_path: Path) -> None:
    for name in ("baseline", "candidate"):
        shutil.copytree(engines / name, tmp_path / name)
    config = tmp_path / "candidate" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "version": "1.1.0"}))
    line = error(run(machine, tmp_path, tiny_hf, tmp_path / "r"))
    assert "trtllm-bench: RuntimeError: Failed to deserialize cuda engine." in line


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("1.1.0", "baseline: built by TensorRT-LLM 1.2.1, 1.1.0 is installed; build the engine again"),
        ("1.3.0", "tensorrt_llm: 1.3.0 runs no engines, 0.20 to 1.2.x or 1.3.0rc20 does"),
        ("0.19.0", "tensorrt_llm: 0.19.0 has no trtllm-bench this package calls, 0.20 and later have"),
    ],
)
def test_another_release(engines: Path, tiny_hf: Path, tmp_path: Path, version: str, message: str) -> None:
    machine = StandIn(tmp_path / "machine", version=version)
    assert message in error(run(machine, engines, tiny_hf, tmp_path / "r"))
    assert not list((tmp_path).glob("r*"))


def test_without_tensorrt_llm(engines: Path, tiny_hf: Path, tmp_path: Path) -> None:
    command = [TOOL, "compare-latency", str(engines / "baseline"), str(engines / "candidate")]
    command += ["--tokenizer", str(tiny_hf), "-o", str(tmp_path / "r")]
    result = subprocess.run([*command, "--via", "trtllm-bench"], capture_output=True, text=True)
    assert "tensorrt_llm: not installed; use a tritonserver container" in error(result)
    through_triton = subprocess.run(command, capture_output=True, text=True)
    expected = f"{engines / 'baseline'}: backend tensorrt-llm; serve it (deploy) and give the server's URL"
    assert f"{expected}, or add --via trtllm-bench" in error(through_triton)


def test_model_directory(machine: StandIn, engines: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    line = error(run(machine, engines, tmp_path, tmp_path / "r"))
    assert f"{tmp_path}: has neither model.safetensors nor model.safetensors.index.json" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--via", "trtllm-bench", "--prompts", "p"), "--prompts belongs to --via triton"),
        (("--via", "trtllm-bench", "--load-generator", "aiperf"), "--load-generator belongs to --via triton"),
        (("--model", "m"), "--model is for URLs"),
        (("--load-generator", "aiperf"), "--load-generator aiperf needs --tokenizer DIR"),
    ],
)
def test_options_belong_to_their_way(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    command = [TOOL, "compare-latency", "a", "b", "-o", str(tmp_path / "r"), *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert message in result.stderr


def test_urls_are_no_engines(machine: StandIn, engines: Path, tiny_hf: Path, tmp_path: Path) -> None:
    command = [TOOL, "compare-latency", "http://a", "http://b", "--via", "trtllm-bench"]
    command += ["-o", str(tmp_path / "r")]
    result = subprocess.run(command, env=machine.environment, capture_output=True, text=True)
    assert "http://a: --via trtllm-bench takes engine directories" in error(result)


def test_interrupted_run_ends_trtllm_bench(
    machine: StandIn, engines: Path, tiny_hf: Path, tmp_path: Path
) -> None:
    command = [TOOL, "compare-latency", str(engines / "baseline"), str(engines / "candidate")]
    command += ["--via", "trtllm-bench", "--tokenizer", str(tiny_hf), "-o", str(tmp_path / "r")]
    process = subprocess.Popen(
        command,
        env={**machine.environment, "STANDIN_FAULT": "hang:baseline-1-1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not processes(tmp_path / ".r.runs") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes(tmp_path / ".r.runs")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    assert processes(tmp_path / ".r.runs") == []
    assert not (tmp_path / "r").exists()


def processes(directory: Path) -> list[str]:
    """Command lines that name the directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(directory) in line:
            found.append(line)
    return found


def test_clock_of_a_gpu(machine: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", machine.environment["PATH"])
    first = hardware.gpus()[0]
    assert (first.max_clock, first.clock) == (1980, 345)
    script = machine.directory / "bin" / "nvidia-smi"
    script.write_text(script.read_text().replace('"clocks.sm": 345', '"clocks.sm": "[N/A]"'))
    assert hardware.gpus()[0].clock is None
