"""The device: what it is, how things are timed on it, and its own rates, the floors of all figures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from engines import hardware

Run = Callable[[], object]
_HEAD_START = 4_000_000  # GPU cycles, about 2 ms, in which the host launches what is timed
_FLUSH_BYTES = 1 << 28  # more than the L2 of an H200 (60 MB)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured; `quick` is for the CPU and for a first look."""

    device: torch.device
    quick: bool

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def rounds(self) -> int:
        return 3 if self.quick else 15

    @property
    def batches(self) -> tuple[int, ...]:
        return (1, 2) if self.quick else (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Measured in this run: bytes/s of a copy (read and written), and FLOP/s of matrix products by dtype."""

    bytes_per_s: float
    flops_per_s: Mapping[str, float]

    def floor_s(self, num_bytes: float, flops: float, dtype: str) -> float:
        """The least time: all bytes once through memory, or all operations, whichever takes longer."""
        rate = self.flops_per_s.get(dtype) or self.flops_per_s["bfloat16"]
        return max(num_bytes / self.bytes_per_s, flops / rate)


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, for the result."""
    told: dict[str, Any] = {"host": hardware.cpu(), "torch": torch.__version__, "cuda": torch.version.cuda}
    if device.type != "cuda":
        return {**told, "device": "cpu"}
    names = ("index", "name", "compute_capability", "total_memory", "driver", "max_clock", "clock")
    try:
        told["gpus"] = [{name: getattr(gpu, name) for name in names} for gpu in hardware.gpus()]
    except Exception as error:  # noqa: BLE001  what is not told must not end the run
        told["gpus"] = repr(error)
    properties = torch.cuda.get_device_properties(device)
    return {
        **told,
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "triton": metadata.version("triton"),
    }


def captured(run: Run, settings: Settings) -> Run:
    """`run` as one CUDA graph, warmed up; on the CPU, `run` itself, warmed up.

    The graph reads the tensors that `run` holds, so both live as long.
    """
    if not settings.cuda:
        run()
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> tuple[Run, object]:
        graph.replay()
        return run, kept

    return replay


def times(runs: Mapping[str, Run], settings: Settings, flush: bool = False) -> dict[str, list[float]]:
    """Seconds of each run in each round; in a round all take turns, from both ends alternately.

    `flush` writes more than the L2 before each: for what would fit into it.
    """
    rubbish = torch.empty(
        _FLUSH_BYTES if settings.cuda and flush else 0, dtype=torch.int8, device=settings.device
    )
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for run in runs.values():
        run()
    for _ in range(settings.rounds):
        for name in order:
            rubbish.zero_()
            seconds[name].append(_time(runs[name], settings))
        order.reverse()
    return seconds


def _time(run: Run, settings: Settings) -> float:
    """On CUDA the time between two events; the GPU waits first until the host has sent all of it."""
    if not settings.cuda:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_HEAD_START)
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def medians(runs: Mapping[str, Run], settings: Settings, flush: bool = False) -> dict[str, float]:
    """The median of `times`."""
    return {name: statistics.median(x) for name, x in times(runs, settings, flush).items()}


def measure_rates(settings: Settings) -> Rates:
    """A copy of 2 GiB, and square products of 8192 in bfloat16 and, where the GPU has it, row-wise FP8."""
    size, count = (512, 1 << 22) if not settings.cuda else (8192, 1 << 31)
    device = settings.device
    source = torch.ones(count, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    runs: dict[str, Run] = {"copy": lambda: target.copy_(source), "bfloat16": lambda: a @ b.t()}
    if settings.cuda and torch.cuda.get_device_capability(device) >= (9, 0):
        runs["fp8"] = _fp8_product(a, b)
    seconds = {
        name: min(x) for name, x in times(runs, settings).items()
    }  # rates are limits: the best of them
    copied = seconds.pop("copy")
    return Rates(
        bytes_per_s=2 * count / copied, flops_per_s={name: 2 * size**3 / s for name, s in seconds.items()}
    )


def _fp8_product(a: Tensor, b: Tensor) -> Run:
    small, other = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    rows, columns = (torch.ones(shape, device=a.device) for shape in ((a.shape[0], 1), (1, b.shape[0])))

    def product() -> Tensor:
        return torch._scaled_mm(
            small, other, scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return product


def figure(seconds: float, floor: float) -> dict[str, float]:
    """A time, its floor and the share of the floor reached, to four digits."""
    shown = {"us": seconds * 1e6, "floor_us": floor * 1e6, "share": floor / seconds}
    return {name: float(f"{value:.4g}") for name, value in shown.items()}
