"""Our embedded engine beside transformers, ONNX Runtime and llama.cpp, on CPU.

    python -m benchmarks.engine [--quick] [--json] [-o FILE]

All run the same random weights with the same number of threads. They take turns in each round: an engine
stays loaded in a process of its own, stopped while the others measure, and memory is read in the same
turns. The peers are installed once, in an environment of their own in the cache directory. Engines that
do not fit in memory together are loaded in sets, ours in each.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.engine import memory, models, result
from benchmarks.engine.entries import ENTRIES, OURS, PEERS
from benchmarks.engine.environment import Environment
from benchmarks.engine.group import Group
from benchmarks.engine.rounds import MEMORY, Runner
from engines import hardware

PRECISIONS = tuple(models.WEIGHT_BYTES)
PROMPT, COUNT = 128, 128
_START = time.monotonic()


def report(line: str) -> None:
    """Progress, with the seconds since the start."""
    sys.stderr.write(f"{time.monotonic() - _START:7.1f} s  {line}\n")  # at once: threads report as well


def available_bytes() -> int:
    """Memory that engines may take beside the buffer that is read."""
    return hardware.free_memory() - memory.buffer_bytes()


def rounds(given: int | None, batch: int) -> int:
    """More where runs are short."""
    return given or (5 if batch == 1 else 3)


def parsed() -> argparse.Namespace:
    """The command line; --quick is a choice of the other options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__.splitlines()[0])
    names = [entry.name for entry in ENTRIES]
    parser.add_argument("--quick", action="store_true", help="254M, fp32 and bf16, batch 1")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write JSON there as well")
    parser.add_argument("--peers-env", type=Path, metavar="DIR", help="a virtual environment with the peers")
    parser.add_argument("--engines", nargs="+", choices=names, default=names)
    parser.add_argument("--models", nargs="+", choices=models.SHAPES, default=list(models.SHAPES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, help="default: 5 at batch 1, else 3")
    given = parser.parse_args()
    if given.quick:
        given.models, given.precisions, given.batches = ["254M"], ["fp32", "bf16"], [1]
    return given


def whole(
    groups: list[Group], errors: dict[str, str], runner: Runner, installation_s: float
) -> dict[str, Any]:
    """All figures so far, as the JSON shows them."""
    return {
        "machine": {**machine.describe(), "last_level_cache": memory.last_level_cache()},
        "versions": result.versions(groups),
        "threads": runner.threads,
        "prompt": runner.prompt,
        "tokens": runner.count,
        "seconds": {"installation": installation_s, "whole": round(time.monotonic() - _START)},
        "errors": errors,
        "groups": [result.of_group(group) for group in groups],
    }


def run(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Install, then one group after another; the output file is up to date after each."""
    peers = [peer for peer in PEERS if peer.name in given.engines]
    environment = Environment(given.peers_env, report)
    errors = environment.install(peers)
    pythons = {peer.name: environment.python for peer in peers}
    runner = Runner(
        pythons={**pythons, **dict.fromkeys((OURS.name, MEMORY.name), Path(sys.executable))},
        work=work,
        threads=hardware.cores(),
        prompt=PROMPT,
        count=COUNT,
        batches=given.batches,
        rounds=lambda batch: rounds(given.rounds, batch),
        report=report,
    )
    entries = [MEMORY] + [x for x in ENTRIES if x.name in given.engines and x.name not in errors]
    groups: list[Group] = []
    for model in given.models:
        models.write(models.SHAPES[model], work / model)
        for precision in given.precisions:
            groups.append(Group(model, precision, work / model))
            runner.run(groups[-1], entries, available_bytes())
            figures = whole(groups, errors, runner, environment.seconds)
            if given.output:
                given.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def main() -> int:
    """The exit code is 1 where an engine could not be installed or has failed."""
    given = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the stopped processes as well
    with tempfile.TemporaryDirectory(prefix="ffn-fusion-", dir=os.environ.get("TMPDIR")) as work:
        figures = run(given, Path(work))
    sys.stdout.write((json.dumps(figures, indent=2) if given.json else result.show(figures)) + "\n")
    return 1 if figures["errors"] or any(group["errors"] for group in figures["groups"]) else 0


if __name__ == "__main__":
    sys.exit(main())
