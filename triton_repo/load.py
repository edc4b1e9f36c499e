"""How requests come: from so many clients (closed loop), or at random times of their own (open loop)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from triton_repo.client import Endpoint, RequestTiming, measure


@dataclass(frozen=True, kw_only=True)
class Load:
    """The same work for both sides. `open_loop`: a level is requests/s, else clients at once.

    In an open loop requests come as a Poisson process does, whether the server keeps up or not, and their
    times count from when they were due: a server that falls behind is not spared those that it delays.
    """

    prompts: Sequence[str]
    max_tokens: int
    open_loop: bool = False
    equal_lengths: bool = True
    seed: int = 0

    def requests(self, level: float) -> int:
        """Of one round: each client has two at least."""
        clients = 1 if self.open_loop else int(level)
        return max(len(self.prompts), 2 * clients)

    def run(self, endpoint: Endpoint, level: float, number: int) -> tuple[float, tuple[RequestTiming, ...]]:
        """One round: its seconds, and what each request took. Both sides' round of a number are alike.

        Raises UserError where a request fails.
        """
        asked = list(itertools.islice(itertools.cycle(self.prompts), self.requests(level)))
        sampling: dict[str, Any] = {}
        if self.equal_lengths and "min_tokens" in endpoint.dialect.sampling:
            sampling["min_tokens"] = self.max_tokens
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
