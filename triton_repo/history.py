"""Runs that are kept, a file each; a run is held against the newest of the same hardware and settings."""

from __future__ import annotations

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
SAME = ("prompts", "requests", "max_tokens", "concurrency", "load")  # of the settings


@dataclass(frozen=True, kw_only=True)
class Change:
    """One side's metric now over that of the kept run, with its 99% interval (Welch's, of logarithms)."""

    side: str
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
    """The run that was held against, and every change."""

    file: str
    changes: tuple[Change, ...]


def against_last(directory: Path, now: Mapping[str, Any]) -> Against | None:
    """What changed since the newest run of the same hardware, method and settings; None without one.

    `now` is `Comparison.to_dict`. Raises UserError on a file that is no run.
    """
    for file in sorted(directory.glob("*.json"), reverse=True):
        try:
            then = json.loads(file.read_text(encoding="utf-8"))
            if _key(then) == _key(now):
                return Against(file=file.name, changes=tuple(_changes(then["rows"], now["rows"])))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: no run of compare-latency ({error}); remove it") from None
    return None


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
            for side in SIDES:
                values = [np.log(x[f"{side}_rounds"]) for x in (before[place], row)]
                found.append(_change(side, *place, *values))
    return found


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
    write_json(partial, dict(now))
    partial.rename(file)
    return file
