"""Our products of vectors and weights beside what torch offers, as programs that AOTInductor compiles.

    python -m benchmarks.engine.kernels [--json]

The matrices of the 254M model, of 16 layers so that no cache holds them, times 1, 8 and 32 vectors. The
others are torch's own linear, the same with inductor's freezing, which packs the weights, and with its C++
GEMM templates (max_autotune). Medians over interleaved rounds, in GB of weights a second, and each over the
speed at which the machine reads memory in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import export

from benchmarks import machine
from engines.embedded import compiler, kernels

LAYERS, ROUNDS = 16, 9
SHAPES = ((2048, 1024), (1024, 1024), (5632, 1024), (1024, 2816))  # qkv, o, gate and up, down
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PACKED = {"freezing": True}
TEMPLATES = {**PACKED, "max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}
TORCH = {"torch": {}, "torch, packed": PACKED, "torch, C++ templates": TEMPLATES}
SMALL_BATCH = 4


class Products(nn.Module):
    """All matrices times their vectors."""

    def __init__(self, dtype: torch.dtype, batch: int, own: bool) -> None:
        super().__init__()
        self.own, self.tiles = own, batch > SMALL_BATCH
        generator = torch.Generator().manual_seed(0)
        for i in range(LAYERS):
            for j, shape in enumerate(SHAPES):
                weight = torch.randn(*shape, generator=generator) / 32
                self.register_buffer(f"w{i}_{j}", weight.to(dtype))

    def forward(self, narrow: Tensor, wide: Tensor) -> list[Tensor]:
        return [self.product(wide if w.shape[1] == wide.shape[1] else narrow, w) for w in self.buffers()]

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.own:
            return torch.ops.ffn_fusion.engine_linear(x, weight, None, None, self.tiles, False)
        return nn.functional.linear(x, weight)


def compiled(
    module: Products, inputs: tuple[Tensor, Tensor], options: dict[str, Any], scratch: Path
) -> Callable[[], Any]:
    """The program, ready to be called."""
    program = export(module.eval(), inputs, strict=False)
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(scratch / f"{time.monotonic_ns()}.pt2"), inductor_configs=options
    )
    loaded = torch._inductor.aoti_load_package(path, run_single_threaded=True)
    return lambda: loaded(*inputs)


def read_bandwidth(buffer: Tensor) -> float:
    """Seconds to read `buffer` once."""
    start = time.perf_counter()
    torch.ops.aten.sum(buffer.view(torch.int64))
    return time.perf_counter() - start


def measure(dtype: str, batch: int, scratch: Path, buffer: Tensor) -> dict[str, Any]:
    """GB/s of each way, and of reading memory."""
    kind = DTYPES[dtype]
    inputs = (torch.randn(batch, 1024).to(kind), torch.randn(batch, 2816).to(kind))
    shims = {"aot_inductor.custom_ops_to_c_shims": kernels.c_shims(), "cpp.dynamic_threads": True}
    ways = {name: compiled(Products(kind, batch, False), inputs, o, scratch) for name, o in TORCH.items()}
    ways["ours"] = compiled(Products(kind, batch, True), inputs, shims, scratch)
    times: dict[str, list[float]] = {name: [] for name in (*ways, "memory")}
    for _ in range(ROUNDS + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
        times["memory"].append(read_bandwidth(buffer))
    size = sum(a * b for a, b in SHAPES) * LAYERS * kind.itemsize
    sizes = {**dict.fromkeys(ways, size), "memory": buffer.nbytes}
    rates = {name: sizes[name] / statistics.median(t[1:]) / 1e9 for name, t in times.items()}
    return {name: round(rate, 2) for name, rate in rates.items()}


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    buffer, rows = torch.ones(1 << 27, dtype=torch.int64), []
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        scratch = Path(directory)
        subprocess.run(compiler.command(scratch, compiler.KERNELS), check=True)
        kernels.load(scratch)
        for dtype in DTYPES:
            for batch in (1, 8, 32):
                rows.append(
                    {"dtype": dtype, "batch": batch, "gb_per_s": measure(dtype, batch, scratch, buffer)}
                )
                if not as_json:
                    rates = "  ".join(f"{name} {rate:6.1f}" for name, rate in rows[-1]["gb_per_s"].items())
                    sys.stdout.write(f"{dtype} x {batch:2}  {rates}\n")
    if as_json:
        result = {"machine": machine.describe("torch"), "unit": "GB of weights a second", "rows": rows}
        sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
