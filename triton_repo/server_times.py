"""What Triton says of its own time: how long requests waited, and how long its models had them."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping
from typing import Any

from triton_repo.client import Endpoint

Counts = dict[str, tuple[int, int, int]]  # requests, ns in the queue, ns of computing, by model


def read(endpoint: Endpoint) -> Counts | None:
    """All models of a server, None where it does not tell.

    `queue` and `compute_infer` of the statistics extension. Of a model that streams, computing ends with the
    call that takes the request, not with its last token.
    """
    try:
        with urllib.request.urlopen(
            f"{endpoint.url}/v2/models/stats", timeout=endpoint.timeout_s
        ) as response:
            models = json.load(response)["model_stats"]
        return {x["name"]: _counts(x["inference_stats"]) for x in models}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _counts(stats: Mapping[str, Any]) -> tuple[int, int, int]:
    return stats["success"]["count"], stats["queue"]["ns"], stats["compute_infer"]["ns"]


class ServerTimes:
    """The sums of one side over its rounds."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.sums: Counts = {}

    def __enter__(self) -> None:
        self._before = read(self.endpoint)

    def __exit__(self, *error: object) -> None:
        after = read(self.endpoint)
        if self._before is None or after is None:
            return
        for name, counts in after.items():
            before = self._before.get(name, (0, 0, 0))
            known = self.sums.get(name, (0, 0, 0))
            count, queue, compute = (k + a - b for k, a, b in zip(known, counts, before, strict=True))
            self.sums[name] = count, queue, compute

    def means(self) -> dict[str, dict[str, float]]:
        """Milliseconds a request, by model."""
        return {
            name: {"requests": count, "queue_ms": queue / count / 1e6, "compute_ms": compute / count / 1e6}
            for name, (count, queue, compute) in sorted(self.sums.items())
            if count
        }
