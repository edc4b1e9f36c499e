"""Stand-ins for TensorRT-LLM and nvidia-smi: their command lines, outputs and failures, no engine.

`trtllm-build` accepts the options in data/trtllm_build_options.json and no other. It deals ranks over
workers and MPI processes as the real one does, and writes the words "no engine" in place of one.
`trtllm-bench` accepts those of data/trtllm_bench_options.json for its release and writes a report of the real
shape: a baseline takes 10 ms a token, a candidate 8, and the report says that they are made up.
`tritonserver` is what a start.sh starts where TRITONSERVER names it: it tells a repository's models and their
inputs over HTTP, refuses what they lack, and gives as many made-up tokens as asked for.
nvidia-smi answers in the words of a real H100 (driver 580.159.04), for as many GPUs as asked for.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path

OPTIONS = Path(__file__).parent / "data" / "trtllm_build_options.json"
BENCH_OPTIONS = Path(__file__).parent / "data" / "trtllm_bench_options.json"
BUILD = """#!{python}
import argparse, json, os, signal, sys, time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

def say(text):  # in one write, or lines of workers mix where Python is unbuffered
    os.write(1, (text + "\\n").encode())

def build(rank, args):
    fault = os.environ.get("STANDIN_FAULT", "")
    kind, _, where = fault.partition(":")
    if os.environ.get("STANDIN_TRACE"):
        with open(os.environ["STANDIN_TRACE"], "a") as file:
            file.write(f"{{rank}}\\n")
    if where == str(rank):
        if kind == "fail":
            raise RuntimeError(f"Encountered an error for rank {{rank}}: Provided tensor names are different")
        if kind == "oom":
            say("[TRT] [E] [defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)")
            raise RuntimeError("Engine building failed, please check the error log: CUDA out of memory")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hang":
            time.sleep(600)
    path = f"{{args.output_dir}}/rank{{rank}}.engine"
    say(f"[TRT-LLM] [I] Serializing engine to {{path}}...")
    with open(path, "w") as file:
        file.write(f"no engine: stand-in for rank {{rank}}")
    say("[TRT-LLM] [I] Engine serialized. Total time: 00:00:00")
    if rank == 0:
        with open(f"{{args.output_dir}}/config.json", "w") as file:
            json.dump({{"version": "{version}", "pretrained_config": {{}}, "build_config": vars(args)}}, file)
    return True

def main():
    table = json.load(open("{options}"))
    parser = argparse.ArgumentParser()
    known = dict(table["common"], **(table["with_auto_parallel"] if {auto_parallel} else {{}}))
    for name, kind in known.items():
        if kind == "flag":
            parser.add_argument(f"--{{name}}", action="store_true")
        elif isinstance(kind, list):
            parser.add_argument(f"--{{name}}", choices=kind)
        else:
            parser.add_argument(f"--{{name}}", type=int if kind == "int" else str)
    args = parser.parse_args()
    if args.multiple_profiles == "enable" and args.opt_num_tokens is not None:
        raise RuntimeError("multiple_profiles is enabled, while opt_num_tokens is set.")
    config = json.load(open(os.path.join(args.checkpoint_dir, "config.json")))
    world_size = config["mapping"]["world_size"]
    os.makedirs(args.output_dir, exist_ok=True)
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        import tensorrt_llm
        from mpi4py import MPI
        comm, failed = MPI.COMM_WORLD, False
        for rank in range(comm.Get_rank(), world_size, comm.Get_size()):
            try:
                build(rank, args)
            except Exception as error:
                say(f"RuntimeError: {{error}}")
                failed = True
        tensorrt_llm.mpi_barrier()
        if failed:
            say("Engine building failed, please check error log.")
            comm.Abort()
        return
    workers = args.workers or 1
    if workers == 1:
        for rank in range(world_size):
            build(rank, args)
        return
    with ProcessPoolExecutor(mp_context=get_context("fork"), max_workers=workers) as pool:
        errors = []
        for future in as_completed([pool.submit(build, rank, args) for rank in range(world_size)]):
            try:
                future.result()
            except Exception as error:
                say(f"{{type(error).__name__}}: {{error}}")
                errors.append(error)
    assert not errors, "Engine building failed, please check error log."

if __name__ == "__main__":
    main()
"""
BENCH = """#!{python}
import json, os, sys, time
import click

TABLE = json.load(open("{options}"))
VERSION, ERA = "{version}", "{era}"
KINDS = {{"text": str, "int": int, "float": float, "path": click.Path(exists=True)}}
KINDS["file"] = click.Path(dir_okay=False)

def option(name, kind):
    if kind == "flag":
        return click.option(f"--{{name}}", is_flag=True)
    return click.option(f"--{{name}}", type=click.Choice(kind) if isinstance(kind, list) else KINDS[kind])

def options(table):
    def add(function):
        for name, kind in table.items():
            function = option(name, kind)(function)
        return function
    return add

@click.group(name="trtllm-bench")
@options(TABLE["general"])
@click.pass_context
def main(context, **general):
    context.obj = general

def percentiles(value):
    spread = {{"p50": 1.0, "p90": 1.1, "p95": 1.2, "p99": 1.3}}
    spread.update(minimum=0.9, maximum=1.3, average=1.02)
    return {{name: value * factor for name, factor in spread.items()}}

def fault(given):
    kind, _, where = os.environ.get("STANDIN_FAULT", "").partition(":")
    if not where or where not in given["report_json"]:
        return
    if kind == "oom":
        print("[TensorRT-LLM][WARNING] made up by a stand-in")
        raise torch_error("CUDA out of memory. Tried to allocate 2.00 GiB.")
    if kind == "silent":
        print("[TRT-LLM] [I] Keyboard interrupt, exiting benchmark...")
        sys.exit(0)
    if kind == "kill":
        os.kill(os.getpid(), 9)
    if kind == "hang":
        time.sleep(600)

def torch_error(text):
    return type("OutOfMemoryError", (RuntimeError,), {{"__module__": "torch"}})(text)

def engine(given, general):
    backend = given.get("backend") or (None if ERA == "0.20" else "pytorch")
    if backend == "pytorch":
        assert json.load(open(os.path.join(general["model_path"], "config.json")))["model_type"]
        if given.get("extra_llm_api_options"):
            import yaml
            assert isinstance(yaml.safe_load(open(given["extra_llm_api_options"])), dict)
        return "Pytorch", VERSION, given["tp"] or 1, given["pp"] or 1
    config = json.load(open(os.path.join(given["engine_dir"], "config.json")))
    if config["version"] != VERSION:
        print("[TRT] [E] IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization "
              "assertion stdVersionRead == kSERIALIZATION_VERSION failed.)")
        raise RuntimeError("Failed to deserialize cuda engine.")
    return "TRT", config["version"], 1, 1

def bench(mode, general, given):
    rows = [json.loads(line) for line in open(given["dataset"])][: given["num_requests"] or None]
    lengths = [(len(row["input_ids"]), row["output_tokens"], row["task_id"]) for row in rows]
    backend, version, tp, pp = engine(given, general)
    if os.environ.get("STANDIN_TRACE"):
        with open(os.environ["STANDIN_TRACE"], "a") as file:
            file.write(os.path.basename(given["report_json"]) + "\\n")
    fault(given)
    name = os.path.basename(given["report_json"]).removesuffix(".json")
    side, level, number = name.rsplit("-", 2)
    token_ms = (10.0 if side == "baseline" else 8.0) * (1 + 0.01 * int(number)) * (1 + 0.01 * int(level))
    tokens = lengths[0][1]
    latency = 5 * token_ms + (tokens - 1) * token_ms
    report = {{
        "stand-in": "made-up numbers: nothing was measured",
        "engine": {{"model": general["model"], "model_path": general["model_path"],
                   "engine_dir": given["engine_dir"], "version": version, "backend": backend}},
        "world_info": {{"tp_size": tp, "pp_size": pp, "world_size": tp * pp}},
        "request_info": {{"num_requests": len(rows), "avg_num_concurrent_requests": given["concurrency"],
                         "avg_input_length": lengths[0][0], "avg_output_length": tokens}},
        "performance": {{
            "total_latency_ms": latency * len(rows) / given["concurrency"],
            "avg_request_latency_ms": latency,
            "request_throughput_req_s": 1e3 * given["concurrency"] / latency,
            "system_output_throughput_tok_s": 1e3 * given["concurrency"] * tokens / latency,
            "output_throughput_per_user_tok_s": 1e3 * tokens / latency,
            "request_latency_percentiles_ms": percentiles(latency),
        }},
    }}
    if mode == "latency" or given["streaming"]:
        report["streaming_metrics"] = {{
            "token_output_speed_tok_s": 1e3 / token_ms, "avg_ttft_ms": 5 * token_ms, "avg_tpot_ms": token_ms,
            "tpot_percentiles": percentiles(token_ms), "ttft_percentiles": percentiles(5 * token_ms),
            "gen_tps_percentiles": percentiles(1e3 / token_ms),
        }}
    with open(given["report_json"], "w") as file:
        json.dump(report, file, indent=4)

for mode in ("latency", "throughput"):
    table = dict(TABLE[mode]["common"], **TABLE[mode][ERA])
    command = (lambda mode: lambda general, **given: bench(mode, general, given))(mode)
    main.command(mode)(options(table)(click.pass_obj(command)))

if __name__ == "__main__":
    main()
"""
PACKAGE = """
def mpi_barrier():
    from mpi4py import MPI
    MPI.COMM_WORLD.Barrier()
"""
TRITON = """#!{python}
import json, os, signal, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from triton_repo import pbtxt

START = time.monotonic()
LOADING_S = float(os.environ.get("STANDIN_LOADING_S", "0.5"))
OPTIONS = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:] if "=" in word)
REPOSITORY = Path(OPTIONS["model-repository"])
MODELS = {{file.parent.name: pbtxt.read(file) for file in REPOSITORY.glob("*/config.pbtxt")}}
print("stand-in for tritonserver on GPUs", os.environ.get("CUDA_VISIBLE_DEVICES", "all"), flush=True)
print(f"cores {{len(os.sched_getaffinity(0))}}", flush=True)
if os.environ.get("STANDIN_PIDS"):
    with open(os.environ["STANDIN_PIDS"], "a") as file:
        file.write(f"{{os.getpid()}}\\n")

class Handler(BaseHTTPRequestHandler):
    def answer(self, status, *bodies, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        for body in bodies:
            self.wfile.write(body)

    def do_GET(self):
        if self.path == "/v2/health/ready":  # long before it answers anything
            return self.answer(200)
        return self.ask(lambda name, inputs: {{"name": name, "inputs": [{{"name": i}} for i in inputs]}})

    def ask(self, reply):
        name = self.path.split("/")[3]
        if name not in MODELS or time.monotonic() < START + LOADING_S:
            error = {{"error": f"Request for unknown model: '{{name}}' is not found"}}
            return self.answer(400, json.dumps(error).encode())
        return self.answer(200, json.dumps(reply(name, [i.name for i in MODELS[name].input])).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name, verb = self.path.split("/")[3:]
        inputs = {{i.name for i in MODELS[name].input}}
        unknown = set(body) - inputs - {{"id"}}
        if unknown:
            return self.answer(400, json.dumps({{"error": f"unknown inputs {{sorted(unknown)}}"}}).encode())
        tokens = body["max_tokens" if "max_tokens" in inputs else "sampling_param_max_tokens"]
        if verb == "generate":
            return self.ask(lambda name, _: {{"model_name": name, "text_output": " no" * tokens}})
        whole = name == "tensorrt_llm"  # streams all of the text so far
        texts = [" no" * (count if whole else 1) for count in range(1, tokens + 1)]
        self.answer(200, kind="text/event-stream")
        for text in texts:
            self.wfile.write(f"data: {{json.dumps({{'text_output': text}})}}\\n\\n".encode())
            time.sleep(0.0002)

    def log_message(self, *arguments):
        pass

if OPTIONS.get("allow-http") == "false":
    signal.pause()
ThreadingHTTPServer(("127.0.0.1", int(OPTIONS["http-port"])), Handler).serve_forever()
"""
SMI = """#!{python}
import sys
gpus, nvlink = {gpus}, {nvlink}
if {broken}:
    print("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")
    sys.exit(9)
if sys.argv[1] == "-q":
    print(f"==============NVSMI LOG==============\\n\\nAttached GPUs : {{len(gpus)}}\\nof a stand-in")
elif sys.argv[1] == "topo":
    names = [f"GPU{{i}}" for i in range(len(gpus))]
    print("\\t\\033[4m" + "\\t".join(names) + "\\tCPU Affinity\\tNUMA Affinity\\tGPU NUMA ID\\033[0m")
    for i, name in enumerate(names):
        cells = [" X " if i == j else nvlink for j in range(len(names))]
        print("\\t".join([name, *cells, "0-15", "0", "", "N/A"]))
    print("\\nLegend:\\n\\n  X    = Self")
else:
    fields = sys.argv[1].split("=", 1)[1].split(",")
    for i, gpu in enumerate(gpus):
        row = {{"index": i, "uuid": f"GPU-{{i:08d}}", "driver_version": "580.159.04", **gpu}}
        row.update({{"clocks.max.sm": 1980, "clocks.sm": 345}})
        print(", ".join(str(row[name]) for name in fields))
"""


def bench_era(version: str) -> str:
    """The entry of trtllm_bench_options.json for a release."""
    known = ("1.2", "1.1", "1.0")
    return next((era for era in known if version.startswith(era)), "1.2" if version[:2] == "1." else "0.20")


@dataclass
class StandIn:
    """A machine with TensorRT-LLM `version` and GPUs, as directories for PATH and PYTHONPATH."""

    directory: Path
    version: str = "1.2.1"
    gpus: int = 8
    name: str = "NVIDIA H100 80GB HBM3"
    compute_cap: str = "9.0"
    free_mib: int = 81079
    nvlink: str = "NV18"
    broken_smi: bool = False
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        binaries, packages = self.directory / "bin", self.directory / "packages"
        information = packages / f"tensorrt_llm-{self.version}.dist-info"
        for place in (binaries, information, packages / "tensorrt_llm"):
            place.mkdir(parents=True, exist_ok=True)
        (information / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: {self.version}\n"
        )
        (packages / "tensorrt_llm" / "__init__.py").write_text(PACKAGE)
        row = {
            "name": self.name,
            "compute_cap": self.compute_cap,
            "memory.total": 81559,
            "memory.free": self.free_mib,
        }
        build = BUILD.format(
            python=sys.executable,
            options=OPTIONS,
            version=self.version,
            auto_parallel=self.version.startswith("0."),
        )
        smi = SMI.format(
            python=sys.executable,
            gpus=json.dumps([row] * self.gpus),
            nvlink=repr(self.nvlink),
            broken=self.broken_smi,
        )
        bench = BENCH.format(
            python=sys.executable, options=BENCH_OPTIONS, version=self.version, era=bench_era(self.version)
        )
        triton = TRITON.format(python=sys.executable)
        programs = {"trtllm-build": build, "trtllm-bench": bench, "nvidia-smi": smi, "tritonserver": triton}
        for name, text in programs.items():
            (binaries / name).write_text(text)
            (binaries / name).chmod(stat.S_IRWXU)
        self.environment = {
            **os.environ,
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "PYTHONPATH": str(packages),
            "TRITONSERVER": str(binaries / "tritonserver"),
        }
