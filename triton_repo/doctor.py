"""What this machine can do: one check a path, each ready or the first thing it lacks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from builder.errors import UserError

DISTRIBUTION = "ffn-fusion"
PACKAGES = ("builder", "engines", "triton_repo", "ffn_fusion")


@dataclass(frozen=True, kw_only=True)
class Check:
    """`detail` says what was found, or what is missing and how to get it."""

    name: str
    ready: bool
    detail: str


def checks() -> list[Check]:
    """Try every path in the order a user walks them."""
    paths: tuple[tuple[str, Callable[[], str]], ...] = (
        ("packages are ours alone", _packages),
        ("convert, fuse", _python),
        ("embedded engine", _embedded),
        ("tensor parallelism on CPU", _mpi),
        ("Triton server", _triton),
        ("latency report", lambda: _module("matplotlib", "report")),
        ("demo parent", lambda: _module("transformers", "transformers")),
        ("aiperf", _aiperf),
        ("TensorRT-LLM engine", _engine_builder),
        ("TensorRT-LLM PyTorch backend", _pytorch_backend),
        ("Triton with TensorRT-LLM", _container),
        ("trtllm-bench", _bench),
        ("GPU servers in docker", _docker),
    )
    return [_check(name, probe) for name, probe in paths]


def _check(name: str, probe: Callable[[], str]) -> Check:
    try:
        return Check(name=name, ready=True, detail=probe())
    except UserError as error:
        return Check(name=name, ready=False, detail=str(error))


def _packages() -> str:
    """The top-level names are generic: nobody else may have installed one."""
    owners = importlib.metadata.packages_distributions()
    for package in PACKAGES:
        others = set(owners.get(package, ())) - {DISTRIBUTION}
        if others:
            raise UserError(
                f"{package}: {sorted(others)[0]} installs it as well; uninstall that or use a venv"
            )
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(f"{package}: not importable; install {DISTRIBUTION}")
    return ", ".join(PACKAGES)


def _python() -> str:
    version = ".".join(map(str, sys.version_info[:3]))
    if not (3, 10) <= sys.version_info[:2] < (3, 13):
        raise UserError(f"Python {version}: 3.10 to 3.12 are supported")
    return f"Python {version}"


def _module(name: str, extra: str) -> str:
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{name} is missing; pip install 'ffn-fusion[{extra}]'")
    return f"{name} {importlib.metadata.version(name)}"


def _embedded() -> str:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise UserError("g++ is missing; install it (Debian: apt-get install g++)")
    return f"{_module('torch', 'all')}, {compiler}"


def _mpi() -> str:
    _module("mpi4py", "mpi")
    from engines import mpi

    return mpi.launcher()[0]


def _triton() -> str:
    from triton_repo import tritonserver

    return str(tritonserver.find_tritonserver())


def _aiperf() -> str:
    from triton_repo import aiperf

    return str(aiperf.find())


def _engine_builder() -> str:
    from engines.trtllm import release

    version, _ = release.engine_builder()
    return f"TensorRT-LLM {version}, {_gpus()}"


def _pytorch_backend() -> str:
    from engines.trtllm import release

    version = release.installed()
    if not release.has_pytorch_backend(version):
        raise UserError(f"tensorrt_llm: {version} has no PyTorch backend, 1.0 and later do")
    return f"TensorRT-LLM {version}, {_gpus()}"


def _container() -> str:
    """A server that can load GPU repositories: TensorRT-LLM's C++ backend, or Python's for the LLM API."""
    from engines.trtllm import release
    from triton_repo.launch import commands

    server = Path(commands.TRITONSERVER)
    if not server.is_file():
        raise UserError(f"{server}: missing; {release.CONTAINER}")
    place = server.parents[1] / "backends"
    backends = [name for name in ("tensorrtllm", "python") if (place / name).is_dir()]
    if not backends:
        raise UserError(f"{place}: has no backend; {release.CONTAINER}")
    return f"{server}, backends {', '.join(backends)}, {_gpus()}"


def _bench() -> str:
    from engines.trtllm import bench, release

    return f"TensorRT-LLM {bench.installed()}, {release.script('trtllm-bench')}, {_gpus()}"


def _docker() -> str:
    """NVIDIA's runtime is asked for by docker itself; its hook is what docker run --gpus needs."""
    docker, hook = shutil.which("docker"), shutil.which("nvidia-container-runtime-hook")
    if docker is None:
        raise UserError("docker is missing; install it, or run the start command inside the image")
    if hook is None:
        raise UserError("nvidia-container-runtime-hook is missing; install nvidia-container-toolkit")
    return f"{docker}, {_gpus()}"


def _gpus() -> str:
    from engines.trtllm import preflight

    gpus = preflight.hopper()
    return f"{len(gpus)} x {gpus[0].name}"
