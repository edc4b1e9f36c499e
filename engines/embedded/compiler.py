"""How the engine's parts are compiled, and what their result depends on. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from builder.architecture import Architecture
from engines.embedded.target import KERNELS, refused_features
from engines.manifest import Manifest

_HERE = Path(__file__).parent
_NATIVE = _HERE / "native"
_KERNEL_SOURCES = (*sorted(_NATIVE.iterdir()), Path(__file__))
_PROGRAM_SOURCES = (
    *(_HERE / f"{name}.py" for name in ("kernels", "operators", "plain", "model", "program", "target")),
    *(_HERE / f"{name}.py" for name in ("step", "collectives", "cuda")),
    *(_HERE.parent.parent / "builder" / f"{name}.py" for name in ("decoder", "rope", "fp8")),
)


def command(engine: Path, name: str) -> list[str]:
    """What compiles ENGINE/NAME from ENGINE/config.json."""
    if name == KERNELS:
        return [*_kernels_command(), "-o", str(engine / name)]
    return [sys.executable, "-m", "engines.embedded.program", str(engine), name.removesuffix(".pt2")]


def _kernels_command() -> list[str]:
    torch = _torch_root()
    return [
        *shlex.split(os.environ.get("CXX") or "g++"),
        *native_flags(),
        *("-I", str(torch / "include")),
        str(_NATIVE / "operators.cpp"),
        *("-L", str(torch / "lib"), "-ltorch_cpu"),
    ]


def native_flags() -> list[str]:
    """The C++ compiler's flags for a shared library of kernels for this processor."""
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    without = [f"-mno-{feature.replace('_', '-')}" for feature in refused_features()]
    return ["-std=c++17", "-O3", native, *without, "-fopenmp", "-fPIC", "-shared", "-Wno-psabi"]


def _torch_root() -> Path:
    """torch's directory, not importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None, "target.this_compiler has found torch"
    assert spec.origin is not None, "torch is a package with an __init__.py"
    return Path(spec.origin).parent


def key(manifest: Manifest, name: str) -> str:
    """SHA-256 over all that the compiled file `name` depends on, and nothing else."""
    matters: dict[str, Any] = {
        "name": name,
        "compiler": manifest.compiler,
        "features": manifest.hardware["features"],
        "sources": [x.read_text("utf-8") for x in (_KERNEL_SOURCES if name == KERNELS else _PROGRAM_SOURCES)],
    }
    if name != KERNELS:
        local = manifest.architecture.shard(manifest.tp_size)
        names = (
            "device",
            "dtype",
            "quant",
            "max_batch_size",
            "max_input_len",
            "max_seq_len",
            "kv_cache_blocks",
        )
        matters |= {n: getattr(manifest, n) for n in names}
        matters["compute_capability"] = manifest.hardware.get("compute_capability")
        matters |= {"architecture": _shapes(local), "alone": manifest.tp_size == 1}
    return hashlib.sha256(json.dumps(matters, sort_keys=True).encode()).hexdigest()


def _shapes(architecture: Architecture) -> dict[str, Any]:
    """The architecture without where its layers came from."""
    values = asdict(architecture)
    for layer in values["layers"]:
        del layer["members"]
    return values
