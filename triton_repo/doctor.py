"""What this machine can do: one check a path, each ready or the first thing it lacks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

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
        ("TensorRT-LLM engine", _tensorrt_llm),
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
    from triton_repo import server

    return str(server.find_tritonserver())


def _tensorrt_llm() -> str:
    from engines.trtllm import preflight, release

    version, _ = release.engine_builder()
    gpus = preflight.hopper()
    return f"TensorRT-LLM {version}, {len(gpus)} x {gpus[0].name}"
