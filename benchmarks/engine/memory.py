"""What a plain read of memory reaches, measured in turn with the engines."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.engine.channel import Engine, Job, serve

_LEAST = 1 << 30
_PASSES = 5


def last_level_cache() -> int:
    """Its bytes, 0 where the kernel tells none."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    texts = [file.read_text(encoding="ascii").strip() for file in sizes]
    return max((int(text[:-1]) * units[text[-1]] for text in texts if text[-1:] in units), default=0)


def buffer_bytes() -> int:
    """Four times the last cache, so that little of a pass is found in it; whole large pages."""
    return -(-max(_LEAST, 4 * last_level_cache()) // (64 << 20)) * (64 << 20)


class Memory(Engine):
    """Reads; it generates nothing."""

    def prepare(self, job: Job) -> dict[str, Any]:
        source = Path(__file__).with_name("memory.cpp")
        flags = ["-O3", "-march=native", "-funroll-loops", "-shared", "-fPIC", "-pthread"]
        compiler = os.environ.get("CXX") or "g++"
        subprocess.run([compiler, *flags, "-o", f"{job.work}/memory.so", str(source)], check=True)
        return {}

    def load(self, job: Job) -> dict[str, Any]:
        self.library = ctypes.CDLL(f"{job.work}/memory.so")
        self.library.read_seconds.restype = ctypes.c_double
        self.bytes = buffer_bytes()
        if self.library.allocate(ctypes.c_size_t(self.bytes), job.threads):
            raise MemoryError(f"no {self.bytes} bytes to read")
        return {"bytes": self.bytes}

    def read(self, job: Job) -> dict[str, Any]:
        """The fastest of some passes."""
        seconds = min(self.library.read_seconds(job.threads) for _ in range(_PASSES))
        return {"gb_per_s": self.bytes / seconds / 1e9}


if __name__ == "__main__":
    serve(Memory())
