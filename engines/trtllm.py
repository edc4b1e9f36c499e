"""TensorRT-LLM: the only file that may import it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import NoReturn

from builder.errors import UserError
from engines import hardware

NEEDS = "needs TensorRT-LLM 0.20 to 1.2 and an H100 or H200 GPU (sm_90)"


def check() -> str:
    """TensorRT-LLM's version and the GPU. Raises UserError naming the first thing that is missing."""
    if importlib.util.find_spec("tensorrt_llm") is None:
        raise UserError(f"backend tensorrt-llm {NEEDS}; the package is not installed, use NVIDIA's container")
    version = importlib.metadata.version("tensorrt_llm")
    if not (0, 20) <= tuple(int(part) for part in version.split(".")[:2]) <= (1, 2):
        raise UserError(f"backend tensorrt-llm {NEEDS}; version {version} is installed")
    gpus = [name for name in hardware.gpus() if "H100" in name or "H200" in name]
    if not gpus:
        raise UserError(f"backend tensorrt-llm {NEEDS}; no such GPU is visible to nvidia-smi")
    raise UserError(
        f"backend tensorrt-llm: TensorRT-LLM {version} and {len(gpus)} x {gpus[0]} are here, but this "
        "release does not build its engines; run trtllm-build on the checkpoint directory"
    )


def build(checkpoint: Path) -> NoReturn:
    """Refuse, saying what is missing: this release writes the checkpoint, trtllm-build compiles it."""
    check()
    raise AssertionError("check() refuses")
