"""What must hold before minutes are spent on a build, each check with one line when it does not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from builder.errors import UserError
from builder.trtllm import TrtllmCheckpoint
from builder.verification import check_shapes
from engines import hardware
from engines.hardware import Gpu
from engines.trtllm import release
from engines.trtllm.estimate import Estimate

HOPPER = "9.0"  # sm_90: H100, H200


@dataclass(frozen=True, kw_only=True)
class Check:
    """`detail` says what was found, or what is wrong and the remedy."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be built where; `workers` ranks at once on this host."""

    checkpoint: TrtllmCheckpoint
    estimate: Estimate
    output: Path
    workers: int
    without_nvlink: bool = False


def checks(wanted: Wanted) -> list[Check]:
    """Every check, tried on this machine in the order a build meets them."""
    probes: tuple[tuple[str, Callable[[], str]], ...] = (
        ("checkpoint", lambda: _checkpoint(wanted.checkpoint)),
        ("TensorRT-LLM", _release),
        ("GPUs", lambda: _gpus(wanted)),
        ("NVLink", lambda: _nvlink(wanted)),
        ("GPU memory", lambda: _gpu_memory(wanted)),
        ("host memory", lambda: _host_memory(wanted)),
        ("disk", lambda: _disk(wanted)),
    )
    return [tried(name, probe) for name, probe in probes]


def require(wanted: Wanted) -> None:
    """Raise UserError with the line of the first check that fails."""
    for check in checks(wanted):
        if not check.passed:
            raise UserError(check.detail)


def hopper() -> tuple[Gpu, ...]:
    """The visible GPUs, all of them sm_90. Raises UserError where one is not, or there is none."""
    found = hardware.gpus()
    if not found:
        raise UserError("gpu: none is visible to nvidia-smi; TensorRT compiles on the GPU it compiles for")
    for gpu in found:
        if gpu.compute_capability != HOPPER:
            raise UserError(
                f"gpu {gpu.index}: {gpu.name} has compute capability {gpu.compute_capability}, H100 and H200 "
                f"have {HOPPER}; choose GPUs with CUDA_VISIBLE_DEVICES"
            )
    return found


def tried(name: str, probe: Callable[[], str]) -> Check:
    """The check that a probe makes: what it returns, or the line it raises."""
    try:
        return Check(name=name, passed=True, detail=probe())
    except UserError as error:
        return Check(name=name, passed=False, detail=str(error))


def _checkpoint(checkpoint: TrtllmCheckpoint) -> str:
    check_shapes(checkpoint.directory)
    return f"{checkpoint.kind}, {checkpoint.dtype}, TP {checkpoint.tp_size}, PP {checkpoint.pp_size}"


def _release() -> str:
    version, builder = release.engine_builder()
    return f"{version}, {builder}"


def _gpus(wanted: Wanted) -> str:
    found = hopper()
    if wanted.workers > len(found):
        raise UserError(
            f"workers: {wanted.workers} at once need as many GPUs, {len(found)} visible; "
            f"give --workers {len(found)}"
        )
    return f"{len(found)} x {found[0].name}, driver {found[0].driver}"


def _nvlink(wanted: Wanted) -> str:
    if wanted.checkpoint.tp_size == 1:
        return "not needed at TP 1"
    pair = hardware.without_nvlink(hopper())
    if pair is None:
        return "all joined"
    text = f"gpu {pair[0]} and {pair[1]} are not joined by NVLink"
    if not wanted.without_nvlink:
        raise UserError(f"{text}, all-reduces will be slow; choose others or give --without-nvlink")
    return text


def _gpu_memory(wanted: Wanted) -> str:
    # Each worker's GPU holds one rank at a time, the engine's GPU its rank for good.
    needed = wanted.estimate.gpu_bytes
    tightest = min(hopper(), key=lambda gpu: gpu.free_memory)
    found = f"a rank needs {needed / 1e9:.1f} GB"
    if needed > tightest.free_memory:
        raise UserError(
            f"gpu {tightest.index}: {found}, {tightest.free_memory / 1e9:.1f} of "
            f"{tightest.total_memory / 1e9:.1f} GB are free; lower --max-batch-size or --max-seq-len, "
            "convert with a larger --tp, or free the GPU"
        )
    return f"{found}, {tightest.free_memory / 1e9:.1f} GB are free"


def _host_memory(wanted: Wanted) -> str:
    free, each = hardware.free_memory(), wanted.estimate.worker_host_bytes
    found = (
        f"{wanted.workers} workers need {each * wanted.workers / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    )
    if each * wanted.workers > free:
        fit = int(free // each) if each else wanted.workers
        remedy = f"give --workers {fit}" if fit else "convert with a larger --tp or use a larger host"
        raise UserError(f"host memory: {found}; {remedy}")
    return found


def _disk(wanted: Wanted) -> str:
    place = wanted.output.absolute().parent
    if not place.is_dir():
        raise UserError(f"{place}: no such directory; create it first")
    free, needed = shutil.disk_usage(place).free, wanted.estimate.disk_bytes
    found = f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    if needed > free:
        raise UserError(f"{place}: {found}; choose another disk")
    return found
