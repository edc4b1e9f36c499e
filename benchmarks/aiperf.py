"""Our client beside aiperf on one server: the medians of TTFT, inter-token and request latency.

    AIPERF=.../bin/aiperf python -m benchmarks.aiperf [--rounds 4] [--json]

The demo's parent with its layers six times over, so that a token takes about 10 ms, on the embedded engine
at TP 1 with one thread, behind a real tritonserver. Both clients take turns, with the same prompts and
lengths. aiperf's timing manager keeps a core busy as long as it runs: an idle loop does so beside ours, else
the server would have another machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from benchmarks import machine
from builder import huggingface, trtllm
from builder.training import corpus
from builder.training.parent import train_parent
from engines.embedded.compilation import build
from triton_repo import aiperf
from triton_repo.client import Endpoint
from triton_repo.load import Load, enough
from triton_repo.repository import write_repository
from triton_repo.rounds import Round
from triton_repo.server import Server

METRICS = ("ttft_ms", "inter_token_ms", "latency_ms")
LEVELS, PROMPTS, MAX_TOKENS, TIMES = (1, 4), 20, 32, 6
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@contextmanager
def busy_core() -> Iterator[None]:
    """Beside a process that does nothing, all the time."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def deepened(parent: Path, output: Path) -> Path:
    """The parent's directory with all of its layers `TIMES` times, one after the other."""
    shutil.copytree(parent, output)
    config = json.loads((parent / "config.json").read_text())
    layers = config["num_hidden_layers"]
    (output / "config.json").write_text(json.dumps({**config, "num_hidden_layers": TIMES * layers}))
    tensors = {}
    for name, tensor in load_file(parent / "model.safetensors").items():
        found = LAYER.fullmatch(name)
        for i in range(TIMES if found else 1):
            tensors[f"model.layers.{int(found[1]) + i * layers}.{found[2]}" if found else name] = tensor
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, output / "model.safetensors")
    return output


def measure(rounds: int) -> dict:
    """The medians of both clients and their ratios."""
    prompts = corpus.prompts(PROMPTS)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        parent = deepened(train_parent(), scratch / "model")
        trtllm.convert(huggingface.read(parent), scratch / "checkpoint")
        limits = {"max_batch_size": 4, "max_input_len": 128, "max_seq_len": 256}
        build(scratch / "checkpoint", scratch / "engine", **limits)
        write_repository(scratch / "engine", parent, scratch / "repository")
        os.environ["OMP_NUM_THREADS"] = "1"
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
    found: dict[str, dict[str, list[float]]] = {
        who: {metric: [] for metric in METRICS} for who in ("ours", "aiperf")
    }
    for number in range(rounds):
        with busy_core():
            load.run(end, level, -1)
            wall, timings = load.run(end, level, number)
        own = Round(side="baseline", concurrency=level, wall_s=wall, timings=timings)
        recorded = aiperf.run(
            end,
            "baseline",
            level,
            tokenizer=parent,
            prompts=enough(prompts, level),
            max_tokens=MAX_TOKENS,
            directory=scratch / f"{level}-{number}",
        )
        for metric, who in itertools.product(METRICS, found):
            found[who][metric] += (own if who == "ours" else recorded).samples(metric)
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
    parser.add_argument("--rounds", type=int, default=4)
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
