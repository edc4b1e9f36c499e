"""How requests come: from so many clients (closed loop), or at random times of their own (open loop)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from builder.errors import UserError
from triton_repo.client import Endpoint, RequestTiming, measure

ARRIVALS = 32  # of an open loop's round, at least: of a few, none would wait for another


@dataclass(frozen=True, kw_only=True)
class Load:
    """The same work for both sides. `open_loop`: a level is requests/s, else clients at once.

    In an open loop requests come as a Poisson process does, whether the server keeps up or not, and their
    times count from when they were due: a server that falls behind is not spared those that it delays.
    `equal_lengths` asks for all of `max_tokens`, with min_tokens.
    """

    prompts: Sequence[str]
    max_tokens: int
    open_loop: bool = False
    equal_lengths: bool = True
    num_requests: int | None = None
    seed: int = 0

    def asked(self, level: float) -> list[str]:
        """The prompts of one round. Raises UserError where there are fewer than clients."""
        if self.open_loop:
            return enough(self.prompts, 1, self.num_requests or max(len(self.prompts), ARRIVALS))
        return enough(self.prompts, int(level), self.num_requests)

    def run(self, endpoint: Endpoint, level: float, number: int) -> tuple[float, tuple[RequestTiming, ...]]:
        """One round: its seconds, and what each request took. Both sides' round of a number are alike.

        Raises UserError where a request fails.
        """
        asked = self.asked(level)
        sampling: dict[str, Any] = {"min_tokens": self.max_tokens} if self.equal_lengths else {}
        begin = time.perf_counter()
        due = self._due(len(asked), level, number) if self.open_loop else [0.0] * len(asked)

        def one(prompt: str, at: float) -> RequestTiming:
            time.sleep(max(0.0, begin + at - time.perf_counter()))
            since = begin + at if self.open_loop else None
            return measure(endpoint, prompt, max_tokens=self.max_tokens, since=since, **sampling)

        with ThreadPoolExecutor(len(asked) if self.open_loop else int(level)) as clients:
            timings = tuple(clients.map(one, asked, due))
        return time.perf_counter() - begin, timings

    def _due(self, count: int, rate: float, number: int) -> list[float]:
        """Seconds after the round's begin."""
        random = np.random.default_rng((self.seed, max(0, number), int(1000 * rate)))
        gaps = random.exponential(1 / rate, count)
        return [float(x) for x in np.cumsum(gaps) - gaps[0]]


def enough(prompts: Sequence[str], level: int, count: int | None = None) -> list[str]:
    """The prompts again and again, `count` of them; by default until every client has two.

    Raises UserError where fewer than `level` would be at work.
    """
    number = count or max(len(prompts), 2 * level)
    if number < level:
        raise UserError(f"num_requests: {number} cannot keep {level} in flight; give {2 * level} or more")
    return list(itertools.islice(itertools.cycle(prompts), number))
