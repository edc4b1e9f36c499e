"""The embedded engine's decoder on one H100 or H200: `python -m benchmarks.h200 [--quick] [-o FILE]`.

    python -m benchmarks.h200 -o benchmarks/results/h200.json    # at most 10 minutes, checks first
    python -m benchmarks.h200 --check                            # the checks alone
    python -m benchmarks.h200 --device cpu --quick               # the same code on tiny shapes, no figures

Runs from a checkout and needs torch with CUDA, triton, numpy and ml_dtypes; the checks need click, xxhash,
g++ and the CUDA toolkit as well. Weights are random and made on the GPU. Each figure stands beside its floor,
the time in which the GPU's own copy reads the bytes or its own products do the operations, both measured in
the same run. Layers are the engine's modules, compiled one by one by torch.compile (the engine's programs are
compiled whole by AOTInductor) and replayed as one CUDA graph; figures are medians over rounds in which all
variants take turns. The file is written after each figure, so a run that is ended leaves what it had.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.h200 import gpu, parts
from benchmarks.h200.checks import check
from benchmarks.h200.gpu import Rates, Settings
from benchmarks.h200.verdicts import TARGETS, show, verdicts

# Seconds of a part, within the 10 minutes of a whole run. A part begins no new figure after its own, nor
# after WHOLE seconds of the run.
WHOLE = 560
LIMITS = {"checks": 130, "decode 8B": 120, "FFN stacks": 110, "49B, rank of 8": 70, "253B, rank of 8": 90}
Part = Callable[[], Iterator[tuple[str, Any]]]


def plan(settings: Settings, rates: Rates, reduce: parts.AllReduce) -> dict[str, Part]:
    """The parts by name, in the order of what matters first."""
    super_49b, ultra_253b = (parts.CONFIGS / f"nemotron-{n}.json" for n in ("super-49b", "ultra-253b"))
    return {
        "decode 8B": lambda: parts.decode_8b(settings, rates),
        "FFN stacks": lambda: parts.stacks_of_ffns(settings, rates),
        "49B, rank of 8": lambda: parts.share_of(super_49b, [(42, 50), (53, 69)], settings, rates, reduce),
        "253B, rank of 8": lambda: parts.share_of(
            ultra_253b, [(66, 73), (74, 85), (86, 100), (101, 114)], settings, rates, reduce
        ),
    }


def run_part(part: Part, limit: float, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The figures of a part, saved as they come; a failure, or the end of its seconds, is among them."""
    found: dict[str, Any] = {} if limit > 0 else {"ended": "before it began"}
    start = time.monotonic()
    try:
        for label, value in part() if limit > 0 else ():
            found[label] = value
            save(found)
            if time.monotonic() - start > limit:
                found["ended"] = f"after its {limit:.0f} s"
                break
    except Exception as error:  # noqa: BLE001  the other parts still run
        traceback.print_exc()
        found["failed"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    found["seconds"] = round(time.monotonic() - start, 1)
    save(found)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def write(file: Path | None, result: dict[str, Any]) -> None:
    """Whole or not at all."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}.tmp")
    scratch.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    scratch.replace(file)


def measure(
    settings: Settings, output: Path | None, reduce: parts.AllReduce, checks_only: bool
) -> dict[str, Any]:
    """All parts; on the CPU they show that the code runs, and their figures mean nothing."""
    result: dict[str, Any] = {"hardware": gpu.describe(settings.device), "quick": settings.quick}
    result["notes"] = "compiled by layers with torch.compile; all-reduces of ranks are modelled, not run"
    result["parts"], begin = {}, time.monotonic()

    def section(name: str, part: Part) -> None:
        def save(found: dict[str, Any]) -> None:
            result["parts"][name] = found
            write(output, result)

        run_part(part, min(LIMITS[name], begin + WHOLE - time.monotonic()), save)

    if settings.cuda:
        section("checks", lambda: check(settings))
    if checks_only:
        return result
    rates = gpu.measure_rates(settings)
    result["rates"] = {"copy_bytes_per_s": rates.bytes_per_s, "flops_per_s": dict(rates.flops_per_s)}
    with torch.no_grad():
        for name, part in plan(settings, rates, reduce).items():
            section(name, part)
    result["targets"] = {"wanted": TARGETS, **verdicts(result["parts"])}
    write(output, result)
    return result


def main() -> None:
    """The benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer batches and rounds")
    parser.add_argument("--check", action="store_true", help="only the checks of correctness")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--all-reduce-us", type=float, default=10.0, help="modelled latency of one (default 10)"
    )
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no usable GPU; give --device cpu --quick to try the code")
    settings = Settings(device=torch.device(given.device), quick=given.quick or given.device == "cpu")
    reduce = parts.AllReduce(latency_s=given.all_reduce_us / 1e6)
    result = measure(settings, given.output, reduce, given.check)
    sys.stdout.write(show(result) + "\n")


if __name__ == "__main__":
    main()
