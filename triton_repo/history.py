"""Runs that are kept, a file each; a run is held against the newest of the same hardware and settings."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from builder.errors import UserError
from builder.storage import write_json
from triton_repo.rounds import CALLED, SIDES

METRICS = ("ttft_ms", "inter_token_ms", "latency_ms")
SAME = (  # of the settings
    "prompts_sha256",
    "requests",
    "input_tokens",
    "max_tokens",
    "concurrency",
    "load",
    "equal_lengths",
)
RATIO = "ratio"  # candidate / baseline: what happens to the machine between two runs happens to both

Runs = dict[str, dict[str, Any]]  # by file name, the newest first


@dataclass(frozen=True, kw_only=True)
class Change:
    """A metric now over that of the kept run, with its 99% interval (Welch's, of logarithms)."""

    side: str  # or `RATIO`
    metric: str
    concurrency: float
    ratio: float
    low: float
    high: float

    @property
    def slower(self) -> bool:
        return self.low > 1

    @property
    def faster(self) -> bool:
        return self.high < 1


@dataclass(frozen=True, kw_only=True)
class Against:
    """The run that was held against, every change, and packages that are of another version now."""

    file: str
    changes: tuple[Change, ...]
    packages: tuple[str, ...] = ()


def read(directory: Path) -> Runs:
    """The kept runs. Raises UserError on a file that is no run, before anything is measured."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: not a directory; give --history another")
    found = {}
    for file in sorted(directory.glob("*.json"), reverse=True):
        try:
            found[file.name] = run = json.loads(file.read_text(encoding="utf-8"))
            _key(run)
            _changes(run["rows"], run["rows"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: no run of compare-latency ({error!r}); remove it") from None
    return found


def against_last(kept: Runs, now: Mapping[str, Any]) -> Against | None:
    """What changed since the newest run of the same hardware, method and settings; None without one.

    `now` is `Comparison.to_dict`.
    """
    name = next((name for name, run in kept.items() if _key(run) == _key(now)), None)
    if name is None:
        return None
    then = kept[name]
    before, after = then.get("versions", {}), now.get("versions", {})
    packages = [f"{x} {before.get(x)} to {after.get(x)}" for x in sorted({*before, *after})]
    differ = [before.get(x) != after.get(x) for x in sorted({*before, *after})]
    return Against(
        file=name,
        changes=tuple(_changes(then["rows"], now["rows"])),
        packages=tuple(itertools.compress(packages, differ)),
    )


def _key(run: Mapping[str, Any]) -> Any:
    """What must be the same."""
    hardware, settings = run["hardware"], run["settings"]
    gpus = [gpu["name"] for gpu in hardware["gpus"]]
    machine = [hardware["cpu"], hardware["cores"], gpus, run["method"]]
    return machine + [settings.get(name) for name in SAME]


def _changes(then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[Change]:
    before = {(row["metric"], row["concurrency"]): row for row in then}
    found = []
    for row in now:
        place = row["metric"], row["concurrency"]
        if row["metric"] in METRICS and place in before:
            logs = [_logs(x) for x in (before[place], row)]
            found += [_change(side, *place, *(x[side] for x in logs)) for side in (*SIDES, RATIO)]
    return found


def _logs(row: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Of the median of each round."""
    sides = {side: np.log(row[f"{side}_rounds"]) for side in SIDES}
    return {**sides, RATIO: sides["candidate"] - sides["baseline"]}


def _change(side: str, metric: str, level: float, before: np.ndarray, after: np.ndarray) -> Change:
    parts = [x.var(ddof=1) / len(x) for x in (before, after)]
    error, reach = math.sqrt(sum(parts)), 0.0
    if error:
        squares = sum(p * p / (len(x) - 1) for p, x in zip(parts, (before, after), strict=True))
        reach = float(student.ppf((1 + CALLED) / 2, sum(parts) ** 2 / squares)) * error
    mean = float(after.mean() - before.mean())
    return Change(
        side=side,
        metric=metric,
        concurrency=level,
        ratio=math.exp(mean),
        low=math.exp(mean - reach),
        high=math.exp(mean + reach),
    )


def keep(directory: Path, now: Mapping[str, Any]) -> Path:
    """Add a run; its name is the time in UTC."""
    directory.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    number = 0
    while (file := directory / f"{stamp}-{number:02}.json").exists():
        number += 1
    partial = file.with_suffix(".partial")
    try:
        write_json(partial, now)
        partial.rename(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return file
