"""One file to take home: reports, logs, timings and what the machine was; no weights and no engines."""

from __future__ import annotations

import io
import json
import os
import platform
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages import environment

NAME = "evidence.tar.gz"
MAX_BYTES = 64 << 20  # of one file
KEPT = (".json", ".log", ".html", ".yaml", ".yml", ".sh", ".pbtxt", ".txt", ".csv", ".jsonl")
FOLDERS = ("stages", "logs", "reports", "checkpoints", "engines", "models", "serving", "triton")
LEFT_OUT = ("tokenizer.json",)
COMMANDS = {
    "doctor.json": ("ffn-fusion", "doctor", "--json"),
    "nvidia-smi.txt": ("nvidia-smi", "-q"),
    "nvidia-smi-topo.txt": ("nvidia-smi", "topo", "-m"),
    "packages.txt": (sys.executable, "-m", "pip", "list", "--format=freeze"),
    "lscpu.txt": ("lscpu",),
    "memory.txt": ("free", "-b"),
    "disk.txt": ("df", "-B1"),
}
VARIABLES = ("NVIDIA_TRITON_SERVER_VERSION", "TRT_VERSION", "CUDA_VERSION", "NCCL_VERSION")


def pack(work: Path, arguments: Mapping[str, Any]) -> Path:
    """Write WORK/evidence.tar.gz, in place of an earlier one."""
    target = work / NAME
    partial = target.with_suffix(".partial")
    with tarfile.open(partial, "w:gz") as archive:
        for file in [work / "stages.json", work / "prompts.txt", *_small_files(work)]:
            if file.is_file():
                archive.add(file, f"evidence/{file.relative_to(work)}")
        for name, content in _machine(arguments).items():
            entry = tarfile.TarInfo(f"evidence/machine/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    partial.rename(target)
    return target


def _small_files(work: Path) -> list[Path]:
    found = []
    for folder in FOLDERS:
        for file in sorted((work / folder).rglob("*")):
            kept = file.suffix in KEPT and file.name not in LEFT_OUT
            if kept and file.is_file() and file.stat().st_size <= MAX_BYTES:
                found.append(file)
    return found


def _machine(arguments: Mapping[str, Any]) -> dict[str, bytes]:
    facts = {
        "arguments": {name: str(value) for name, value in arguments.items()},
        "python": sys.version,
        "platform": platform.platform(),
        "variables": {name: os.environ.get(name) for name in VARIABLES},
    }
    files = {"facts.json": json.dumps(facts, indent=2).encode()}
    return files | {name: _said(command) for name, command in COMMANDS.items()}


def _said(command: tuple[str, ...]) -> bytes:
    """What a command says, or that it could not be run: a machine may lack some of them."""
    try:
        result = subprocess.run(command, capture_output=True, timeout=120, env=environment(), check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}\n".encode()
    failed = f"exit {result.returncode}\n".encode() + result.stderr if result.returncode else b""
    return result.stdout + failed
