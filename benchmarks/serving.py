"""A real tritonserver under many streaming clients: errors, mixed-up streams, memory over time, latency.

    python -m benchmarks.serving [--clients 64] [--minutes 10] [--json]

The demo's parent, its attention dropped from layers 6-13 and its FFNs fused, on the embedded engine at TP 2.
Each client streams one prompt after the other, short and long ones in a shuffled order. Greedy, so every
prompt has one answer, which is asked for before the load; a stream that differs from it is counted. Memory
is the proportional set size of the server, its stubs and ranks; slopes are Theil and Sen's over all samples
of the second half, with 95% intervals.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.stats import theilslopes

from benchmarks import machine
from builder import export, huggingface, trtllm
from builder.errors import UserError
from builder.plan import Plan
from builder.training import corpus
from builder.training.parent import train_parent
from engines.embedded.compilation import build
from triton_repo.client import Endpoint, RequestTiming, generate, measure
from triton_repo.processes import descendants
from triton_repo.repository import write_repository
from triton_repo.server import Server

DROPPED = tuple(range(6, 14))
TP_SIZE, MAX_BATCH_SIZE, MAX_INPUT_LEN, MAX_SEQ_LEN = 2, 16, 512, 640
PERIOD_S = 2.0  # between samples of memory
PARTS = {  # of command lines
    "tritonserver": "bin/tritonserver",
    "preprocessing": "preprocessing/1/model.py",
    "tensorrt_llm": "tensorrt_llm/1/model.py",
    "postprocessing": "postprocessing/1/model.py",
    "ranks": "engines.embedded.worker",
}
CHARACTERS = (30, 120, 400, 900)  # of the prompts
MAX_TOKENS = (8, 16, 32, 64)


@dataclass(frozen=True)
class Question:
    """A prompt, and its answer without load."""

    prompt: str
    max_tokens: int
    answer: str


@dataclass
class Load:
    """What the clients saw, and at which second how many MB the processes had."""

    timings: list[RequestTiming] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    mixed: int = 0
    memory: list[tuple[float, dict[str, float]]] = field(default_factory=list)


def questions(endpoint: Endpoint) -> list[Question]:
    """Prompts of each length with each number of tokens."""
    text = corpus.held_out_text()
    found = []
    for i, (length, count) in enumerate((a, b) for a in CHARACTERS for b in MAX_TOKENS):
        prompt = text[i * 1000 : i * 1000 + length]
        found.append(Question(prompt, count, generate(endpoint, prompt, max_tokens=count)))
    return found


def client(number: int, endpoint: Endpoint, asked: list[Question], end: float, load: Load) -> None:
    """One request after the other until `end`."""
    choice = random.Random(number)
    while time.monotonic() < end:
        question = choice.choice(asked)
        try:
            timing = measure(endpoint, question.prompt, max_tokens=question.max_tokens)
        except UserError as error:
            load.errors.append(str(error))
            continue
        load.timings.append(timing)
        load.mixed += timing.text != question.answer


def memory_mb() -> dict[str, float]:
    """Proportional set size of the processes below this one, by `PARTS`."""
    found = dict.fromkeys(PARTS, 0.0)
    for pid in descendants(os.getpid()):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text()
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # ended meanwhile
            continue
        part = next((name for name, words in PARTS.items() if words in command), None)
        if part is not None:
            found[part] += sum(int(x.split()[1]) for x in lines if x.startswith("Pss:")) / 1024
    return found


def run(endpoint: Endpoint, clients: int, seconds: float) -> Load:
    """`clients` at once for so long."""
    load, asked = Load(), questions(endpoint)
    begin = time.monotonic()
    threads = [
        threading.Thread(target=client, args=(i, endpoint, asked, begin + seconds, load))
        for i in range(clients)
    ]
    for thread in threads:
        thread.start()
    while time.monotonic() < begin + seconds:
        load.memory.append((time.monotonic() - begin, memory_mb()))
        time.sleep(PERIOD_S)
    for thread in threads:
        thread.join()
    return load


def engine_repository(scratch: Path) -> Path:
    """The demo's fused model as a model repository."""
    parent = train_parent()
    export.write(Plan(drop_attention=DROPPED).apply(huggingface.read(parent)), parent, scratch / "fused")
    trtllm.convert(huggingface.read(scratch / "fused"), scratch / "checkpoint", tp_size=TP_SIZE)
    limits = {
        "max_batch_size": MAX_BATCH_SIZE,
        "max_input_len": MAX_INPUT_LEN,
        "max_seq_len": MAX_SEQ_LEN,
    }
    build(scratch / "checkpoint", scratch / "engine", **limits)
    write_repository(scratch / "engine", parent, scratch / "repository")
    return scratch / "repository"


def percentiles(values: Iterator[float]) -> dict[str, float]:
    p50, p99, most = np.percentile(np.fromiter(values, float) * 1e3, (50, 99, 100))
    return {"p50": round(p50, 2), "p99": round(p99, 2), "max": round(most, 2)}


def summary(load: Load, clients: int, seconds: float) -> dict:
    """The figures of a load."""
    tokens = sum(x.num_chunks for x in load.timings)
    return {
        "clients": clients,
        "seconds": seconds,
        "requests": len(load.timings),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "errors": len(load.errors),
        "first_errors": load.errors[:5],
        "streams_that_differ": load.mixed,
        "ttft_ms": percentiles(x.ttft_s for x in load.timings),
        "inter_token_ms": percentiles(gap for x in load.timings for gap in x.inter_token_s),
        "memory": {
            "all": memory(load, seconds, tuple(PARTS)),
            **{name: memory(load, seconds, (name,)) for name in PARTS},
        },
    }


def memory(load: Load, seconds: float, names: tuple[str, ...]) -> dict:
    """MB at half time and at the end, and how many more an hour with its interval."""
    samples = [(when, sum(mb[name] for name in names)) for when, mb in load.memory if when > seconds / 2]
    times, mb = np.array(samples).T
    slope, _, low, high = theilslopes(mb, times / 3600)
    return {
        "half_time_mb": round(float(np.median(mb[:10])), 1),
        "end_mb": round(float(np.median(mb[-10:])), 1),
        "mb_per_hour": [round(float(x), 2) for x in (slope, low, high)],
    }


def main() -> None:
    """Print the figures, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, Server(engine_repository(Path(scratch))) as server:
        load = run(Endpoint(server.url), options.clients, 60 * options.minutes)
    result = {"machine": machine.describe("torch"), **summary(load, options.clients, 60 * options.minutes)}
    if options.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return
    for name, value in result.items():
        sys.stdout.write(f"{name}: {value}\n")


if __name__ == "__main__":
    main()
