"""TensorRT-LLM's releases: which builds engines, and whether one is installed.

TensorRT engines exist in 0.20 to 1.2.x and in 1.3.0rc20; after that TensorRT-LLM removed the builder
(its pull requests 15763 to 16369).
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
from pathlib import Path

from builder.errors import UserError

ENGINES = "0.20 to 1.2.x or 1.3.0rc20"
CONTAINER = "use a tritonserver container, 25.06 to 26.07, with tag -trtllm-python-py3"


def builds_engines(version: str) -> bool:
    """Whether this release has trtllm-build in the form this package calls."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:
        return False
    return (0, 20) <= (int(numbers[1]), int(numbers[2])) < (1, 3) or version.split("+")[0] == "1.3.0rc20"


def has_pytorch_backend(version: str) -> bool:
    """Whether this release serves Hugging Face directories without an engine, by default."""
    numbers = re.match(r"(\d+)\.", version)
    return numbers is not None and int(numbers[1]) >= 1


def installed() -> str:
    """The version of the installed TensorRT-LLM. Raises UserError where there is none."""
    try:
        return importlib.metadata.version("tensorrt_llm")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"tensorrt_llm: not installed; {CONTAINER}") from None


def engine_builder() -> tuple[str, Path]:
    """The installed version and its trtllm-build. Raises UserError where engines cannot be built."""
    version = installed()
    if not builds_engines(version):
        raise UserError(f"tensorrt_llm: {version} builds no engines this way, {ENGINES} does; {CONTAINER}")
    return version, script("trtllm-build")


def script(name: str) -> Path:
    """A command that TensorRT-LLM installs, beside this Python or on PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise UserError(f"{name}: not found though tensorrt_llm is installed; put it on PATH")
    return Path(found)
