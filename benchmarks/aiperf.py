"""Our client beside aiperf on one server: the medians of TTFT, inter-token and request latency.

    AIPERF=.../bin/aiperf python -m benchmarks.aiperf [--rounds 5] [--json]

The demo's parent on the embedded engine at TP 1, behind a real tritonserver. Both clients take turns,
with the same prompts and lengths. Inter-token latency is a request's mean gap, which is what aiperf tells.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import machine
from builder import huggingface, trtllm
from builder.training import corpus
from builder.training.parent import train_parent
from engines.embedded.compilation import build
from triton_repo import aiperf
from triton_repo.client import Endpoint, RequestTiming
from triton_repo.load import Load, enough
from triton_repo.repository import write_repository
from triton_repo.server import Server

METRICS = ("ttft_ms", "inter_token_ms", "latency_ms")
LEVELS, PROMPTS, MAX_TOKENS = (1, 4), 8, 48


def ours(timings: tuple[RequestTiming, ...]) -> dict[str, list[float]]:
    """In ms, a value a request."""
    return {
        "ttft_ms": [1e3 * t.ttft_s for t in timings],
        "inter_token_ms": [1e3 * t.mean_gap_s for t in timings if t.inter_token_s],
        "latency_ms": [1e3 * t.latency_s for t in timings],
    }


def measure(rounds: int) -> dict:
    """The medians of both clients and their ratios."""
    parent = train_parent()
    prompts = corpus.prompts(PROMPTS)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        trtllm.convert(huggingface.read(parent), scratch / "checkpoint")
        limits = {"max_batch_size": 4, "max_input_len": 128, "max_seq_len": 256}
        build(scratch / "checkpoint", scratch / "engine", **limits)
        write_repository(scratch / "engine", parent, scratch / "repository")
        with Server(scratch / "repository") as server:
            end = Endpoint(server.url)
            for level in LEVELS:
                rows += _level(end, level, rounds, prompts, parent, scratch)
        version = aiperf.version(scratch / f"{LEVELS[0]}-0")
    return {"machine": machine.describe("torch"), "aiperf": version, "rounds": rounds, "rows": rows}


def _level(
    end: Endpoint, level: int, rounds: int, prompts: list[str], parent: Path, scratch: Path
) -> list[dict]:
    load = Load(prompts=prompts, max_tokens=MAX_TOKENS, equal_lengths=False)
    load.run(end, level, -1)
    found: dict[str, dict[str, list[float]]] = {
        who: {metric: [] for metric in METRICS} for who in ("ours", "aiperf")
    }
    for number in range(rounds):
        for metric, values in ours(load.run(end, level, number)[1]).items():
            found["ours"][metric] += values
        recorded = aiperf.run(
            end,
            "baseline",
            level,
            tokenizer=parent,
            prompts=enough(prompts, level),
            max_tokens=MAX_TOKENS,
            directory=scratch / f"{level}-{number}",
        )
        for metric in METRICS:
            found["aiperf"][metric] += recorded.samples(metric)
    return [_row(metric, level, *(found[who][metric] for who in ("ours", "aiperf"))) for metric in METRICS]


def _row(metric: str, level: int, own: list[float], theirs: list[float]) -> dict:
    first, second = float(np.median(own)), float(np.median(theirs))
    return {
        "metric": metric,
        "clients": level,
        "ours": round(first, 3),
        "aiperf": round(second, 3),
        "ratio": round(first / second, 4),
    }


def main() -> None:
    """Print the medians side by side, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    aiperf.find()
    result = measure(options.rounds)
    if options.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return
    sys.stdout.write(f"{'p50':16}{'clients':>8}{'ours':>10}{'aiperf':>10}{'ratio':>8}\n")
    for row in result["rows"]:
        sys.stdout.write(
            f"{row['metric']:16}{row['clients']:8}{row['ours']:10.2f}{row['aiperf']:10.2f}{row['ratio']:8.3f}\n"
        )


if __name__ == "__main__":
    main()
