"""What this machine is: facts an engine depends on."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.errors import UserError

_FIELDS = "index,uuid,name,compute_cap,memory.total,memory.free,driver_version,clocks.max.sm,clocks.sm"
_MIB = 1 << 20
_STYLE = re.compile(r"\x1b\[[0-9;]*m")  # `nvidia-smi topo` underlines its header even into a pipe


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


def free_memory() -> int:
    """Bytes of host memory that can be taken without swapping, this container's limit included."""
    info = Path("/proc/meminfo").read_text(encoding="utf-8")
    found = re.search(r"MemAvailable:\s+(\d+) kB", info)
    free = int(found[1]) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(max(0, min(free, _free_in_group(Path("/sys/fs/cgroup")))))


def _free_in_group(group: Path) -> float:
    """Bytes up to a cgroup v2's limit; cached files can go, engines' mapped weights among them."""
    limit, used, stat = (group / name for name in ("memory.max", "memory.current", "memory.stat"))
    if not (limit.is_file() and used.is_file()) or limit.read_text().strip() == "max":
        return math.inf
    lines = stat.read_text().splitlines() if stat.is_file() else []
    fields = {name: int(count) for name, count in map(str.split, lines)}
    cached = fields.get("active_file", 0) + fields.get("inactive_file", 0)
    return int(limit.read_text()) - int(used.read_text()) + cached


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU as nvidia-smi tells it; memory in bytes, SM clocks in MHz.

    `clock` is the one at the moment of asking, None where the GPU does not tell it.
    """

    index: int
    uuid: str
    name: str
    compute_capability: str
    total_memory: int
    free_memory: int
    driver: str
    max_clock: int
    clock: int | None = None


def gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves; empty where there is none.

    Raises UserError where nvidia-smi fails.
    """
    if shutil.which("nvidia-smi") is None:
        return ()
    rows = _smi(f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits").splitlines()
    try:
        found = [_gpu([cell.strip() for cell in row.split(",")]) for row in rows if row.strip()]
    except (ValueError, IndexError):
        raise UserError(f"nvidia-smi: answered {rows[0]!r}; update the driver") from None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(found)
    by_name = {str(g.index): g for g in found} | {g.uuid: g for g in found}
    return tuple(by_name[name] for name in visible.replace(" ", "").split(",") if name in by_name)


def _gpu(cells: list[str]) -> Gpu:
    return Gpu(
        index=int(cells[0]),
        uuid=cells[1],
        name=cells[2],
        compute_capability=cells[3],
        total_memory=int(cells[4]) * _MIB,
        free_memory=int(cells[5]) * _MIB,
        driver=cells[6],
        max_clock=int(cells[7]),
        clock=int(cells[8]) if cells[8].isdecimal() else None,
    )


def without_nvlink(among: tuple[Gpu, ...]) -> tuple[int, int] | None:
    """The first pair of GPU indices that no NVLink joins; None where all are joined."""
    if len(among) < 2:
        return None
    table = [line.split() for line in _STYLE.sub("", _smi("topo", "-m")).splitlines()]
    header = next((cells for cells in table if cells and cells[0] == "GPU0"), [])
    rows = {cells[0]: dict(zip(header, cells[1:], strict=False)) for cells in table if cells}
    for i, first in enumerate(among):
        for second in among[i + 1 :]:
            link = rows.get(f"GPU{first.index}", {}).get(f"GPU{second.index}", "")
            if not link.startswith("NV"):
                return first.index, second.index
    return None


def _smi(*arguments: str) -> str:
    try:
        result = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError("nvidia-smi: no answer within 60 s; look at the driver's log (dmesg)") from None
    if result.returncode != 0:
        last = ((result.stderr or result.stdout).strip().splitlines() or ["no output"])[-1]
        raise UserError(f"nvidia-smi: {last}; look at the driver")
    return result.stdout
