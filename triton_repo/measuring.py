"""Rounds of the two sides of a comparison, in turns, after a warm-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from triton_repo.client import Endpoint
from triton_repo.load import Load
from triton_repo.rounds import SIDES, AnyRound, Round, Targets
from triton_repo.server_times import ServerTimes

STEADY, MOST_WARM_UPS = 0.1, 6  # a round is warm when its median is so near to that of the one before


class Sides:
    """Both endpoints, measured by this package's client."""

    def __init__(
        self,
        baseline: Endpoint,
        candidate: Endpoint,
        *,
        rounds: int,
        targets: Targets | None = None,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.ends = dict(zip(SIDES, (baseline, candidate), strict=True))
        self.rounds, self.targets, self.progress = rounds, targets, progress
        self.times = {side: ServerTimes(end) for side, end in self.ends.items()}

    def measure(self, load: Load, levels: Sequence[float]) -> tuple[list[AnyRound], list[int]]:
        """All rounds, and the warm-up rounds that each level took."""
        warm_ups: list[int] = []

        def run(side: str, level: float, number: int) -> Round:
            with self.times[side]:
                wall, timings = load.run(self.ends[side], level, number)
            return Round(side=side, concurrency=level, wall_s=wall, timings=timings, targets=self.targets)

        def warm_up(level: float) -> None:
            self.progress(f"warming up at {level:g}")
            warm_ups.append(until_steady(lambda side: load.run(self.ends[side], level, -1)[1]))

        rounds = interleave(run, levels, self.rounds, warm_up=warm_up, progress=self.progress)
        return rounds, warm_ups

    def server_times(self) -> dict[str, Any]:
        """What Triton says of its own time, by side and model; without a side that does not tell."""
        return {side: told for side, x in self.times.items() if (told := x.means())}


def until_steady(run: Callable[[str], Sequence[Any]]) -> int:
    """Rounds of both sides until each one's median latency is that of the round before; their number."""
    last: dict[str, float] = {}
    for number in range(1, MOST_WARM_UPS + 1):
        now = {side: float(np.median([t.latency_s for t in run(side)])) for side in SIDES}
        if last and all(abs(now[side] / last[side] - 1) <= STEADY for side in SIDES):
            return number
        last = now
    return MOST_WARM_UPS


def interleave(
    run: Callable[[str, Any, int], AnyRound],
    levels: Sequence[float],
    rounds: int,
    *,
    warm_up: Callable[[float], None] = lambda level: None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[AnyRound]:
    """`run(side, level, number)` for `rounds` rounds a side at each level, the sides ABBA."""
    measured: list[AnyRound] = []
    for level in levels:
        warm_up(level)
        for number in range(rounds):
            progress(f"at {level:g}, round {number + 1} of {rounds}")
            order = SIDES if number % 2 == 0 else SIDES[::-1]
            measured += [run(side, level, number) for side in order]
    return measured
