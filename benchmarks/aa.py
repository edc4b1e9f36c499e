"""Comparisons of an engine with itself: how many of them call a difference, and how wide their intervals are.

    python -m benchmarks.aa [--runs 40] [--json]

Two tritonservers serve one engine, the demo's parent at TP 1; each run is a comparison as compare-latency
makes it by default, at one client.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks import machine
from builder import huggingface, trtllm
from builder.training import corpus
from builder.training.parent import train_parent
from engines.embedded.compilation import build
from triton_repo.client import Endpoint
from triton_repo.compare import compare
from triton_repo.repository import write_repository
from triton_repo.server import Server

ROUNDS, PROMPTS, MAX_TOKENS = 8, 4, 16


def measure(runs: int) -> dict:
    """The ratios of inter-token latency, and those that were called different."""
    parent = train_parent()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trtllm.convert(huggingface.read(parent), scratch / "checkpoint")
        build(
            scratch / "checkpoint", scratch / "engine", max_batch_size=4, max_input_len=128, max_seq_len=256
        )
        write_repository(scratch / "engine", parent, scratch / "repository")
        ends = [Endpoint(stack.enter_context(Server(scratch / "repository")).url) for _ in range(2)]
        found = [
            compare(
                *ends,
                prompts=corpus.prompts(PROMPTS),
                max_tokens=MAX_TOKENS,
                concurrency=(1,),
                rounds=ROUNDS,
                seed=number,
            )
            for number in range(runs)
        ]
    ratios = [x.row("inter_token_ms", 1).ratio for x in found]
    return {
        "machine": machine.describe("torch"),
        "runs": runs,
        "rounds": ROUNDS,
        "called_different": sum(x.differs for x in ratios),
        "outside_95": sum(not x.low <= 1 <= x.high for x in ratios),
        "median_half_width": round(float(np.median([(x.high - x.low) / 2 for x in ratios])), 4),
        "ratios": [[round(v, 4) for v in (x.value, x.low, x.high)] for x in ratios],
    }


def main() -> None:
    """Print the counts, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options.runs)
    if options.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return
    sys.stdout.write(
        f"{result['called_different']} of {options.runs} comparisons of equal sides call a difference; the "
        f"95% interval leaves 1 out in {result['outside_95']}, its half width is "
        f"{result['median_half_width']:.1%}\n"
    )


if __name__ == "__main__":
    main()
