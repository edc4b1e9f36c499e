"""Stand-ins for TensorRT-LLM and nvidia-smi: their command lines, outputs and failures, no engine.

`trtllm-build` accepts the options in data/trtllm_build_options.json and no other. It deals ranks over
workers and MPI processes as the real one does, and writes the words "no engine" in place of one.
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
BUILD = """#!{python}
import argparse, json, os, signal, sys, time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

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
            print("[TRT] [E] [defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)")
            raise RuntimeError("Engine building failed, please check the error log: CUDA out of memory")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hang":
            time.sleep(600)
    path = f"{{args.output_dir}}/rank{{rank}}.engine"
    print(f"[TRT-LLM] [I] Serializing engine to {{path}}...", flush=True)
    with open(path, "w") as file:
        file.write(f"no engine: stand-in for rank {{rank}}")
    print("[TRT-LLM] [I] Engine serialized. Total time: 00:00:00", flush=True)
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
                print(f"RuntimeError: {{error}}", flush=True)
                failed = True
        tensorrt_llm.mpi_barrier()
        if failed:
            print("Engine building failed, please check error log.", flush=True)
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
                print(f"{{type(error).__name__}}: {{error}}", flush=True)
                errors.append(error)
    assert not errors, "Engine building failed, please check error log."

if __name__ == "__main__":
    main()
"""
PACKAGE = """
def mpi_barrier():
    from mpi4py import MPI
    MPI.COMM_WORLD.Barrier()
"""
SMI = """#!{python}
import sys
gpus, nvlink = {gpus}, {nvlink}
if {broken}:
    print("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")
    sys.exit(9)
if sys.argv[1] == "topo":
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
        row["clocks.max.sm"] = 1980
        print(", ".join(str(row[name]) for name in fields))
"""


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
        for name, text in (("trtllm-build", build), ("nvidia-smi", smi)):
            (binaries / name).write_text(text)
            (binaries / name).chmod(stat.S_IRWXU)
        self.environment = {
            **os.environ,
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "PYTHONPATH": str(packages),
        }
