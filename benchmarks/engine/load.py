"""What others use of the processor, seen while all engines are stopped."""

from __future__ import annotations

import os
import time
from pathlib import Path

_PAUSE_S = 0.3


def _busy_s() -> float:
    """Seconds all cores together have worked since the machine started."""
    fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, irq, softirq = (int(x) for x in fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def other_cores() -> float:
    """Cores that are busy now; a figure measured beside many of them says little."""
    start, busy = time.monotonic(), _busy_s()
    time.sleep(_PAUSE_S)
    return max(0.0, (_busy_s() - busy) / (time.monotonic() - start))
