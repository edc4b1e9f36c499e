"""Convert throughput beside `cp` of the same files.

    python -m benchmarks.convert [--gib 1.0] [--tp 4] [--runs 3] [--json]

A Llama-shaped model of random bfloat16 weights is written once; then `cp`, `ffn-fusion convert` and
`ffn-fusion convert` with every FFN fused take turns on it as whole processes, and each conversion is
reported as its median time over `cp`'s.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HIDDEN, WIDTH, HEADS, KV_HEADS, VOCAB = 2048, 5632, 16, 4, 32000
LAYER_PARAMETERS = HIDDEN * (2 * HIDDEN + 2 * HIDDEN * KV_HEADS // HEADS + 3 * WIDTH)


def write_model(directory: Path, gib: float) -> int:
    """A Llama directory of about `gib` GiB in bfloat16; returns its number of layers."""
    from builder import huggingface
    from builder.checkpoint import tensor_shapes
    from builder.storage import write_json, write_safetensors
    from builder.tensors import Expression

    class Random(Expression):
        dtype = "bfloat16"
        block = np.random.default_rng(0).integers(0x3C00, 0x3D00, 1 << 22, dtype=np.uint16)

        def __init__(self, shape: tuple[int, ...]) -> None:
            self.shape = shape

        def read(self, start: int, stop: int) -> np.ndarray:
            return np.resize(self.block, (stop - start, *self.shape[1:]))

    layers = max(4, round((gib * 2**30 / 2 - 2 * VOCAB * HIDDEN) / LAYER_PARAMETERS))
    directory.mkdir()
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": layers,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    write_json(directory / "config.json", config)
    shapes = tensor_shapes(huggingface.read_architecture(directory))
    tensors = {huggingface.hf_name(name): Random(shape) for name, shape in shapes.items()}
    write_safetensors(directory / "model.safetensors", tensors)
    return layers


def run(command: list[str], output: Path) -> tuple[float, float]:
    """Wall seconds and peak MiB of a whole process; its output is removed."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed with exit code {process.returncode}")
    shutil.rmtree(output)
    return seconds, usage.ru_maxrss / 1024


def measure(gib: float, tp_size: int, runs: int, scratch: Path) -> dict:
    model, output = scratch / "model", scratch / "output"
    layers = write_model(model, gib)
    tool = [str(Path(sys.executable).with_name("ffn-fusion")), "convert", str(model), "-o", str(output)]
    free = f"1-{layers - 1}"
    commands = {
        "cp": ["cp", "-r", str(model), str(output)],
        "convert": [*tool, "--tp", str(tp_size)],
        "convert, all FFNs but two fused": [*tool, "--tp", str(tp_size), "--drop-attention", free],
    }
    timings: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            timings[name].append(run(command, output))
    size = sum(f.stat().st_size for f in model.iterdir())
    base = statistics.median(t for t, _ in timings["cp"])
    rows = {}
    for name, pairs in timings.items():
        seconds = statistics.median(t for t, _ in pairs)
        rows[name] = {
            "seconds": round(seconds, 3),
            "over_cp": round(seconds / base, 2),
            "gb_per_s": round(size / seconds / 1e9, 2),
            "peak_mib": round(max(m for _, m in pairs)),
        }
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return {
        "model_bytes": size,
        "layers": layers,
        "tp_size": tp_size,
        "runs": runs,
        "machine": machine,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", ".")) as scratch:
        result = measure(arguments.gib, arguments.tp, arguments.runs, Path(scratch))
    if arguments.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return
    sys.stdout.write(f"{result['model_bytes'] / 1e9:.2f} GB, TP {result['tp_size']}, {result['machine']}\n")
    for name, row in result["rows"].items():
        sys.stdout.write(
            f"{name:34} {row['seconds']:7.2f} s  {row['over_cp']:5.2f} x cp  "
            f"{row['gb_per_s']:5.2f} GB/s  {row['peak_mib']:5d} MiB\n"
        )


if __name__ == "__main__":
    main()
