"""The dependency matrix by one sweep against one full pass for each dropped block.

    python -m benchmarks.analyze [--model DIR] [--batch B] [--length L] [--rounds N] [--json]

Both run the same blocks and compare the same contributions, in one process, one after the other in every
round; the sweep starts each variant at its own layer, the full passes at the embedding. Without --model it is
the demo's parent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import machine
from builder import huggingface
from builder.analysis.sums import Direction, Sums
from builder.analysis.sweep import sweep
from builder.analysis.trunk import Trunk
from builder.analysis.variants import dropped_blocks
from builder.training.parent import train_parent


def by_sweep(trunk: Trunk, hidden: Tensor) -> np.ndarray:
    """Prefixes reused: m (m + 1) / 2 blocks."""
    sums = Sums()
    sweep(trunk, [hidden], dropped_blocks(trunk.checkpoint.architecture), sums, name="model")
    matrix = np.zeros((len(trunk.layers),) * 2)
    for key, value in sums.arrays.items():
        if key[0] == "dependency":
            matrix[int(key[2]), int(key[3])] = value / hidden[..., 0].numel()
    return matrix


def by_full_passes(trunk: Trunk, hidden: Tensor) -> np.ndarray:
    """The model once, then once without each block: m + m (m - 1) blocks."""
    size = len(trunk.layers)
    matrix = np.zeros((size, size))
    context = trunk.context(hidden.shape[1])
    directions, x = [], hidden
    for index in range(size):
        passage = trunk.passage(index, trunk.block(index), x, context)
        directions.append(Direction.of(passage.contribution))
        x = passage.output
    for dropped in range(size):
        x = hidden
        for index in range(size):
            if index == dropped:
                continue
            passage = trunk.passage(index, trunk.block(index), x, context)
            if index > dropped:
                distance = directions[index].distance(Direction.of(passage.contribution))
                matrix[dropped, index] = distance.double().mean()
            x = passage.output
    return matrix


@torch.no_grad()
def measure(model: Path, batch: int, length: int, rounds: int) -> dict:
    """Medians of interleaved rounds, the first of them not counted."""
    checkpoint = huggingface.read(model)
    trunk = Trunk(checkpoint, resident=True)
    tokens = torch.randint(
        checkpoint.architecture.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0)
    )
    (hidden,) = trunk.embed([tokens])
    ways = {"sweep": by_sweep, "full_passes": by_full_passes}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start, used = time.perf_counter(), time.process_time()
            found[name] = way(trunk, hidden)
            seconds[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - used)
    difference = float(np.abs(found["sweep"] - found["full_passes"]).max())
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    used_medians = {name: statistics.median(times[1:]) for name, times in processor.items()}
    ratios = [
        slow / fast for slow, fast in zip(seconds["full_passes"][1:], seconds["sweep"][1:], strict=True)
    ]
    layers = len(trunk.layers)
    return {
        "machine": {**machine.describe("torch"), "threads": torch.get_num_threads()},
        "model": {"layers": layers, "hidden_size": checkpoint.architecture.hidden_size},
        "dtype": checkpoint.dtype,
        "tokens": [batch, length],
        "rounds": rounds,
        "blocks": {"sweep": layers * (layers + 1) // 2, "full_passes": layers * layers},
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "times_faster": round(medians["full_passes"] / medians["sweep"], 3),
        "of_rounds": [round(min(ratios), 3), round(max(ratios), 3)],
        "processor_seconds": {name: round(value, 4) for name, value in used_medians.items()},
        "times_less_processor": round(used_medians["full_passes"] / used_medians["sweep"], 3),
        "largest_difference": difference,
    }


def main() -> None:
    """Print the figures, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options.model or train_parent(), options.batch, options.length, options.rounds)
    if options.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return
    low, high = result["of_rounds"]
    for name, blocks in result["blocks"].items():
        sys.stdout.write(f"{name:12} {blocks:5} blocks  {result['seconds'][name]:8.3f} s\n")
    sys.stdout.write(f"{result['times_faster']:.2f} times faster (rounds {low:.2f} to {high:.2f})\n")


if __name__ == "__main__":
    main()
