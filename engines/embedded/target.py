"""What a compiled program is tied to: processor or GPU, the torch it calls, the compilers that made it.

Imports no torch, so that an engine can be refused before anything heavy is started.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from builder.errors import UserError
from engines import hardware
from engines.manifest import Manifest

BACKEND = "embedded"
KERNELS = "kernels.so"
COMPILED = ("decode.pt2", "prefill.pt2", KERNELS)
DEVICES = ("cpu", "cuda")
_ON_CUDA = ("decode.pt2", "decode1.pt2", "prefill.pt2")
_FP8_CAPABILITY = (9, 0)  # row-wise scales of torch._scaled_mm
_FP8_MULTIPLE = 16  # of the rows and columns that it takes

# Flags of /proc/cpuinfo that become instructions under -march=native, with which AOTInductor compiles.
_INSTRUCTIONS = re.compile(
    r"(s?sse\d|pni$|avx|fma|amx|bmi\d|v?aes$|v?pclmul|gfni$|sha_ni$|f16c$|abm$|popcnt$|movbe$|adx$|xop$|tbm$|"
    r"rdrand$|rdseed$|asimd|sve|sme|i8mm$|bf16$|crc32$|atomics$|fphp$)"
)


# Linux gives a process AMX's tiles once it has asked (Documentation/arch/x86/xstate.rst); a seccomp profile
# may refuse it.
_SYS_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


def cpu_features() -> list[str]:
    """The instruction sets this process may use, as the kernel names them; empty where it tells none."""
    refused = refused_features()
    return [f for f in _processor_features() if f not in refused]


def refused_features() -> list[str]:
    """Those that the processor has and the operating system keeps from this process."""
    tiles = [f for f in _processor_features() if f.startswith("amx")]
    return [] if not tiles or _may_use_tiles() else tiles


def _may_use_tiles() -> bool:
    request = ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)
    return int(request) == 0


def _processor_features() -> list[str]:
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return sorted(f for f in (flags[1].split() if flags else ()) if _INSTRUCTIONS.match(f))


def compiled(device: str) -> tuple[str, ...]:
    """What an engine for `device` is compiled into."""
    return _ON_CUDA if device == "cuda" else COMPILED


def pool_blocks(manifest: Manifest) -> int:
    """Blocks in memory: on CUDA one more than requests are given, for rows that only fill a batch up."""
    return manifest.kv_cache_blocks + (manifest.device == "cuda")


def this_hardware(device: str = "cpu") -> dict[str, Any]:
    """`Manifest.hardware` of an engine built here. Raises UserError without a GPU for "cuda"."""
    host = {**hardware.cpu(), "features": cpu_features()}
    if device != "cuda":
        return host
    gpus = hardware.gpus()
    if not gpus:
        raise UserError(
            "device: 'cuda' needs an NVIDIA GPU, nvidia-smi shows none; build there, or for 'cpu'"
        )
    return {**host, "gpu": gpus[0].name, "compute_capability": gpus[0].compute_capability}


def torch_version() -> str:
    """torch's version, not importing it. Raises UserError where it is missing."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        raise UserError("torch: not installed; install ffn-fusion with its dependencies") from None


def cuda_version() -> str | None:
    """The CUDA release that torch was built for, not importing it; None for a build without CUDA."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    text = file.read_text("utf-8") if file and file.is_file() else ""
    found = re.search(r"^cuda\b[^=\n]*=\s*'([^']+)'", text, re.MULTILINE)
    return found[1] if found else None


def this_compiler(device: str = "cpu") -> dict[str, Any]:
    """`Manifest.compiler` of an engine built here.

    Raises UserError without a C++ compiler, and for "cuda" without torch's CUDA or a CUDA toolkit.
    """
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name)
    if path is None:
        raise UserError(f"{name}: no such C++ compiler; install g++ (Debian: apt-get install g++) or set CXX")
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False)
    host = {"torch": torch_version(), "cxx": answer.stdout.partition("\n")[0]}
    if device != "cuda":
        return host
    if cuda_version() is None:
        raise UserError(f"device: torch {host['torch']} has no CUDA; install a CUDA build of torch")
    if not _has_toolkit():
        raise UserError(
            "device: 'cuda' needs the CUDA toolkit's headers to compile; install it, or set CUDA_HOME to it"
        )
    return {**host, "cuda": cuda_version()}


def _has_toolkit() -> bool:
    """Whether torch.utils.cpp_extension finds the toolkit, without whose headers AOTInductor stops."""
    told = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or shutil.which("nvcc")
    return bool(told) or Path("/usr/local/cuda").exists()


def check_device(manifest: Manifest) -> None:
    """Raises UserError where the numbers asked for are not the device's."""
    if manifest.device not in DEVICES:
        raise UserError(f"device: {manifest.device!r} is unknown; give one of {', '.join(DEVICES)}")
    if manifest.device == "cpu":
        if manifest.quant == "fp8":
            raise UserError("quant: 'fp8' is for GPUs; give --quant int8, or --device cuda")
        return
    if manifest.quant == "int8":
        raise UserError("quant: 'int8' is for the CPU; give --quant fp8, or --device cpu")
    if manifest.quant == "fp8":
        _check_fp8(manifest)


def _check_fp8(manifest: Manifest) -> None:
    if manifest.dtype != "bfloat16":
        raise UserError(
            f"quant: fp8 multiplies into bfloat16, dtype is {manifest.dtype}; give --dtype bfloat16"
        )
    capability = str(manifest.hardware.get("compute_capability", "0.0"))
    if tuple(int(x) for x in capability.split(".")) < _FP8_CAPABILITY:
        raise UserError(
            f"quant: fp8 needs compute capability 9.0 (H100), this GPU has {capability}; leave --quant out"
        )
    local = manifest.architecture.shard(manifest.tp_size)
    sizes = {"hidden_size": local.hidden_size, "head_dim": local.head_dim}
    sizes |= {f"layer {i}'s width": x.intermediate_size for i, x in enumerate(local.layers)}
    for name, size in sizes.items():
        if size % _FP8_MULTIPLE:
            raise UserError(
                f"quant: fp8 needs multiples of {_FP8_MULTIPLE}, a rank's {name} is {size}; leave --quant out"
            )


def engine_files(manifest: Manifest) -> list[str]:
    """What an engine directory holds beside its config."""
    return [*compiled(manifest.device), *(f"rank{r}.safetensors" for r in range(manifest.tp_size))]


def check(engine: Path, manifest: Manifest) -> None:
    """Raises UserError where this engine cannot run here: backend, processor, GPU, torch or files."""
    if manifest.backend != BACKEND:
        raise UserError(
            f"{engine}: backend {manifest.backend!r}, needed is {BACKEND!r}; build with --backend {BACKEND}"
        )
    machine = manifest.hardware.get("machine")
    if machine != platform.machine():
        raise UserError(f"{engine}: built for {machine}, this is {platform.machine()}; build it again here")
    lacking = sorted(set(manifest.hardware.get("features", ())) - set(cpu_features()))
    if lacking:
        built, here = manifest.hardware.get("cpu"), hardware.cpu()["cpu"]
        raise UserError(
            f"{engine}: built on {built} with instruction sets that {here} lacks or this process may not "
            f"use ({', '.join(lacking)}); build it again here"
        )
    if manifest.device == "cuda":
        _check_gpu(engine, manifest)
    if manifest.compiler.get("torch") != torch_version():
        raise UserError(
            f"{engine}: compiled for torch {manifest.compiler.get('torch')}, {torch_version()} is installed; "
            "build it again or install that version"
        )
    for name in engine_files(manifest):
        if not (engine / name).is_file():
            raise UserError(f"{engine / name}: missing; build the engine again")


def _check_gpu(engine: Path, manifest: Manifest) -> None:
    """Kernels are compiled for one compute capability, and call the CUDA libraries of one release."""
    gpus, built = hardware.gpus(), manifest.hardware.get("compute_capability")
    if not gpus:
        raise UserError(
            f"{engine}: built for a GPU, nvidia-smi shows none; build with --device cpu, or run it there"
        )
    other = next((x for x in gpus if x.compute_capability != built), None)
    if other is not None:
        raise UserError(
            f"{engine}: built for compute capability {built}, {other.name} has {other.compute_capability}; "
            "build it again here"
        )
    if manifest.compiler.get("cuda") != cuda_version():
        raise UserError(
            f"{engine}: compiled for CUDA {manifest.compiler.get('cuda')}, torch here has {cuda_version()}; "
            "build it again or install that build of torch"
        )
