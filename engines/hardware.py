"""What this machine is: facts an engine depends on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any


def cpu() -> dict[str, Any]:
    """Machine type, model name and cores this process may use."""
    model = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {"machine": platform.machine(), "cpu": model, "cores": cores()}


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def gpus() -> list[str]:
    """Names of the NVIDIA GPUs, as nvidia-smi lists them; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return result.stdout.split("\n")[:-1] if result.returncode == 0 else []
