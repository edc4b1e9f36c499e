"""Conversion beside `cp` of the same files and NVIDIA ModelOpt's export of the same model.

    python -m benchmarks.convert [--gb 2.4] [--large-gb 10] [--tp 4] [--runs 5] [--json]

A Llama-shaped model of random bfloat16 weights is written once; then the commands take turns on it as
whole processes, start-up included, each right after an uncounted run of itself, and each is reported as
its median time over `cp`'s median. They are timed in memory (--timed-in): on a disk, output beyond the
kernel's dirty_background_ratio is timed together with its writeback. The larger model, on the disk of
TMPDIR, shows that memory does not grow. ModelOpt (`pip
install nvidia-modelopt requests`) is left out with --no-modelopt.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import machine

HIDDEN, WIDTH, HEADS, KV_HEADS, VOCAB = 2048, 5632, 16, 4, 32000
LAYER_PARAMETERS = HIDDEN * (2 * HIDDEN + 2 * HIDDEN * KV_HEADS // HEADS + 3 * WIDTH)
TARGETS = {  # a figure of the result, and what it must not exceed
    "convert_over_cp": 1.5,
    "writing_over_cp": 1.0,
    "fused_over_cp": 4.0,
    "peak_mb": 400.0,
    "convert_over_modelopt": 1 / 5,
}


def write_model(directory: Path, gigabytes: float) -> int:
    """A Llama directory of about `gigabytes` in bfloat16; returns its number of layers."""
    import numpy as np

    from builder import huggingface, writer
    from builder.checkpoint import tensor_shapes
    from builder.storage import write_json
    from builder.tensors import NUMPY_DTYPES, Constant

    layers = max(4, round((gigabytes * 1e9 / 2 - 2 * VOCAB * HIDDEN) / LAYER_PARAMETERS))
    directory.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
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
    most = max(int(np.prod(shape)) for shape in shapes.values())
    numbers = np.random.default_rng(0).integers(0x3C00, 0x3D00, most, dtype=np.uint16)
    numbers = numbers.view(NUMPY_DTYPES["bfloat16"])
    tensors = {
        huggingface.hf_name(name): Constant(numbers[: int(np.prod(shape))].reshape(shape), "bfloat16")
        for name, shape in shapes.items()
    }
    writer.write(directory, {"model.safetensors": tensors})
    return layers


def time_writing(model: Path, output: Path, tp_size: int) -> None:
    """Print the seconds that the writer alone takes, after all imports and planning."""
    from builder import huggingface, writer
    from builder.trtllm.conversion import prepare, weights

    files = weights(prepare(huggingface.read(model), tp_size, 1), tp_size, 1)
    output.mkdir()
    start = time.perf_counter()
    writer.write(output, files)
    sys.stdout.write(f"{time.perf_counter() - start}\n")


def export_with_modelopt(model: Path, output: Path, tp_size: int) -> None:
    """What a user of ModelOpt runs: load the model, export it."""
    import torch
    from modelopt.torch.export import export_tensorrt_llm_checkpoint
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    with torch.inference_mode():
        export_tensorrt_llm_checkpoint(
            loaded, "llama", torch.bfloat16, export_dir=str(output), inference_tensor_parallel=tp_size
        )


@dataclass
class Row:
    """One command's runs."""

    command: list[str]
    tells_seconds: bool = False  # times a part of itself and prints that
    seconds: list[float] = field(default_factory=list)
    peak_mb: float = 0.0

    def run_warm(self, output: Path) -> None:
        """Twice, the second one counted: all commands find the memory they need in the same state."""
        self.run(output)
        self.seconds.pop()
        self.run(output)

    def run(self, output: Path) -> None:
        """Once, as a whole process."""
        start = time.perf_counter()
        process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        elapsed = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(self.command)} failed with exit code {process.returncode}")
        self.seconds.append(float(printed) if self.tells_seconds else elapsed)
        self.peak_mb = max(self.peak_mb, usage.ru_maxrss * 1024 / 1e6)
        shutil.rmtree(output)
        os.sync()  # the next one starts with nothing left to write

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def commands(model: Path, output: Path, layers: int, tp_size: int, modelopt: bool) -> dict[str, Row]:
    """The commands by name; all but the first layer's FFN are fused, folding every norm."""
    tool = [str(Path(sys.executable).with_name("ffn-fusion")), "convert", str(model), "--tp", str(tp_size)]
    last = layers - 1
    fused = ["--drop-attention", f"1-{last}", "--group", f"1-{last}"]
    own = [sys.executable, "-m", "benchmarks.convert"]
    places = [str(model), str(output), str(tp_size)]
    rows = {
        "cp": Row(["cp", "-r", str(model), str(output)]),
        "convert": Row([*tool, "-o", str(output)]),
        "writing": Row([*own, "--writing", *places], tells_seconds=True),
        "fused": Row([*tool, *fused, "-o", str(output)]),
    }
    if modelopt:
        rows["modelopt"] = Row([*own, "--modelopt", *places])
    return rows


def make_model(directory: Path, gigabytes: float) -> int:
    """`write_model` in a process of its own: a child's peak memory starts at its parent's."""
    code = "import sys; from pathlib import Path; from benchmarks.convert import write_model\n"
    code += "print(write_model(Path(sys.argv[1]), float(sys.argv[2])))"
    command = [sys.executable, "-c", code, str(directory), str(gigabytes)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(
    gigabytes: float, large: float, tp_size: int, runs: int, modelopt: bool, timed: Path, disk: Path
) -> dict:
    """All figures of a run, as the JSON shows them; `timed` and `disk` are empty directories."""
    model, output = timed / "model", timed / "output"
    rows = commands(model, output, make_model(model, gigabytes), tp_size, modelopt)
    for index in range(runs):
        for name, row in rows.items():
            if name != "modelopt":
                row.run_warm(output)
            elif index < 2:
                row.run(output)
    size = sum(f.stat().st_size for f in model.iterdir())
    shutil.rmtree(model)
    model, output = disk / "model", disk / "output"
    big = commands(model, output, make_model(model, large), tp_size, False)
    for name in ("convert", "fused"):
        big[name].run(output)
    shutil.rmtree(model)
    base = rows["cp"].median
    figures = {f"{name}_over_cp": rows[name].median / base for name in rows if name != "cp"}
    peaks = [table[name].peak_mb for table in (rows, big) for name in ("convert", "fused")]
    figures["peak_mb"] = max(peaks)
    if modelopt:
        figures["convert_over_modelopt"] = rows["convert"].median / rows["modelopt"].median
    return {
        "machine": machine.describe("numpy", *["nvidia-modelopt"][:modelopt]),
        "model_bytes": size,
        "tp_size": tp_size,
        "seconds": {name: [round(s, 3) for s in row.seconds] for name, row in rows.items()},
        "peak_mb": {
            **{name: round(row.peak_mb) for name, row in rows.items()},
            **{f"{name}, {large:g} GB": round(big[name].peak_mb) for name in ("convert", "fused")},
        },
        "figures": {
            name: {"value": round(value, 3), "target": TARGETS.get(name), "met": value <= TARGETS[name]}
            for name, value in figures.items()
            if name in TARGETS
        },
    }


def show(result: dict) -> str:
    """The result as a text."""
    size, processor = result["model_bytes"] / 1e9, result["machine"]["processor"]
    lines = [f"{size:.2f} GB of bfloat16, TP {result['tp_size']}, {processor}"]
    for name, seconds in result["seconds"].items():
        middle = statistics.median(seconds)
        lines.append(f"{name:10} {middle:7.2f} s  {result['peak_mb'][name]:6,} MB")
    for name, figure in result["figures"].items():
        verdict = "met" if figure["met"] else "missed"
        lines.append(f"{name:22} {figure['value']:8.3f}  target {figure['target']:g}: {verdict}")
    return "\n".join(lines)


def main() -> None:
    """The benchmark, or one of the commands it times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=2.4)
    parser.add_argument("--large-gb", type=float, default=10.0)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--timed-in", default="/dev/shm", help="directory of the timed files")
    parser.add_argument("--no-modelopt", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--writing", nargs=3, metavar=("MODEL", "OUTPUT", "TP"), help=argparse.SUPPRESS)
    parser.add_argument("--modelopt", nargs=3, metavar=("MODEL", "OUTPUT", "TP"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    for paths, command in ((given.writing, time_writing), (given.modelopt, export_with_modelopt)):
        if paths:
            return command(Path(paths[0]), Path(paths[1]), int(paths[2]))
    places = (given.timed_in, os.environ.get("TMPDIR", "."))
    with (
        tempfile.TemporaryDirectory(dir=places[0]) as timed,
        tempfile.TemporaryDirectory(dir=places[1]) as disk,
    ):
        arguments = (given.gb, given.large_gb, given.tp, given.runs, not given.no_modelopt)
        result = {**measure(*arguments, Path(timed), Path(disk)), "timed_in": given.timed_in}
    sys.stdout.write((json.dumps(result, indent=2) if given.json else show(result)) + "\n")
    return None


if __name__ == "__main__":
    main()
