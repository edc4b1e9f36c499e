"""Rounds of the two sides of a comparison, in turns, after a warm-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from triton_repo.client import Endpoint
from triton_repo.load import Load
from triton_repo.rounds import SIDES, AnyRound, Round, Targets
from triton_repo.server_times import ServerTimes

STEADY, MOST_WARM_UPS = 0.1, 6  # a round is warm when its median is so near to that of the one before


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All rounds of a load, and of each level the warm-up rounds and whether they ended steadily."""

    rounds: list[AnyRound]
    warm_ups: list[int]
    settled: list[bool]
    server_times: dict[str, Any]  # of the sides that tell, by model


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Both endpoints, measured by this package's client."""

    ends: dict[str, Endpoint]
    rounds: int
    targets: Targets | None = None
    progress: Callable[[str], None] = lambda text: None

    def measure(self, load: Load, levels: Sequence[float]) -> Measured:
        """`rounds` rounds a side at each level. Raises UserError where a request fails."""
        times = {side: ServerTimes(end) for side, end in self.ends.items()}
        warm_ups: list[tuple[int, bool]] = []

        def run(side: str, level: float, number: int) -> Round:
            with times[side]:
                wall, timings = load.run(self.ends[side], level, number)
            return Round(side=side, concurrency=level, wall_s=wall, timings=timings, targets=self.targets)

        def warm_up(level: float) -> None:
            self.progress(f"warming up at {level:g}")
            warm_ups.append(until_steady(lambda side: load.run(self.ends[side], level, -1)[1]))

        rounds = interleave(run, levels, self.rounds, warm_up=warm_up, progress=self.progress)
        return Measured(
            rounds=rounds,
            warm_ups=[number for number, _ in warm_ups],
            settled=[steady for _, steady in warm_ups],
            server_times={side: told for side, sums in times.items() if (told := sums.means())},
        )


def until_steady(run: Callable[[str], Sequence[Any]]) -> tuple[int, bool]:
    """Rounds of both sides until each one's median latency is that of the round before.

    Their number, and whether it came to that within the most that are made.
    """
    last: dict[str, float] = {}
    for number in range(1, MOST_WARM_UPS + 1):
        now = {side: float(np.median([t.latency_s for t in run(side)])) for side in SIDES}
        if last and all(abs(now[side] / last[side] - 1) <= STEADY for side in SIDES):
            return number, True
        last = now
    return MOST_WARM_UPS, False


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
