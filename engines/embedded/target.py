"""What a compiled program is tied to: instruction sets, the torch it calls, the compiler that made it.

Imports no torch, so that an engine can be refused before anything heavy is started.
"""

from __future__ import annotations

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

# Flags of /proc/cpuinfo that become instructions under -march=native, with which AOTInductor compiles.
_INSTRUCTIONS = re.compile(
    r"(s?sse\d|pni$|avx|fma|amx|bmi\d|v?aes$|v?pclmul|gfni$|sha_ni$|f16c$|abm$|popcnt$|movbe$|adx$|xop$|tbm$|"
    r"rdrand$|rdseed$|asimd|sve|sme|i8mm$|bf16$|crc32$|atomics$|fphp$)"
)


def cpu_features() -> list[str]:
    """The instruction sets of this processor, as the kernel names them; empty where it tells none."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return sorted(f for f in (flags[1].split() if flags else ()) if _INSTRUCTIONS.match(f))


def this_hardware() -> dict[str, Any]:
    """`Manifest.hardware` of an engine built here."""
    return {**hardware.cpu(), "features": cpu_features()}


def torch_version() -> str:
    """torch's version, not importing it. Raises UserError where it is missing."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        raise UserError("torch: not installed; install ffn-fusion with its dependencies") from None


def this_compiler() -> dict[str, Any]:
    """`Manifest.compiler` of an engine built here. Raises UserError without a C++ compiler."""
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name)
    if path is None:
        raise UserError(f"{name}: no such C++ compiler; install g++ (Debian: apt-get install g++) or set CXX")
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False)
    return {"torch": torch_version(), "cxx": answer.stdout.partition("\n")[0]}


def engine_files(manifest: Manifest) -> list[str]:
    """What an engine directory holds beside its config."""
    return [*COMPILED, *(f"rank{r}.safetensors" for r in range(manifest.tp_size))]


def check(engine: Path, manifest: Manifest) -> None:
    """Raises UserError where this engine cannot run here: backend, processor, torch or files."""
    if manifest.backend != BACKEND:
        raise UserError(
            f"{engine}: backend {manifest.backend!r}, needed is {BACKEND!r}; build with --backend {BACKEND}"
        )
    machine = manifest.hardware.get("machine")
    if machine != platform.machine():
        raise UserError(f"{engine}: built for {machine}, this is {platform.machine()}; build it again here")
    lacking = sorted(set(manifest.hardware.get("features", ())) - set(cpu_features()))
    if lacking:
        raise UserError(
            f"{engine}: built with the instruction set {lacking[0]!r}, which this processor lacks; "
            "build it again here"
        )
    if manifest.compiler.get("torch") != torch_version():
        raise UserError(
            f"{engine}: compiled for torch {manifest.compiler.get('torch')}, {torch_version()} is installed; "
            "build it again or install that version"
        )
    for name in engine_files(manifest):
        if not (engine / name).is_file():
            raise UserError(f"{engine / name}: missing; build the engine again")
