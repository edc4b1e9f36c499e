"""What Triton says of its own time: how long requests waited, and how long its models had them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from triton_repo.client import Endpoint, model_statistics

PARTS = ("success", "queue", "compute_infer")  # of the statistics extension, in ns
Counts = dict[str, tuple[int, ...]]  # by model: calls, and the ns of each part


def read(endpoint: Endpoint) -> Counts | None:
    """All models of a server, None where it does not tell. Raises UserError where the server is gone.

    A model behind one that streams is called once a response. `success` of an ensemble has the whole time of
    its requests, to their last response; all times of the model that streams end with the call that takes
    the request.
    """
    try:
        told = {x["name"]: _counts(x["inference_stats"]) for x in model_statistics(endpoint) or ()}
    except (KeyError, TypeError):
        return None
    return told or None


def _counts(stats: Mapping[str, Any]) -> tuple[int, ...]:
    return stats["success"]["count"], *(stats[part]["ns"] for part in PARTS)


class ServerTimes:
    """The sums of one side; enter it for each round."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.sums: Counts = {}

    def __enter__(self) -> None:
        self._before = read(self.endpoint)

    def __exit__(self, kind: type | None, *error: object) -> None:
        after = None if self._before is None or kind is not None else read(self.endpoint)
        none = (0,) * (1 + len(PARTS))
        for name, counts in (after or {}).items():
            three = (self.sums.get(name, none), counts, (self._before or {}).get(name, none))
            self.sums[name] = tuple(k + a - b for k, a, b in zip(*three, strict=True))

    def means(self) -> dict[str, dict[str, float]]:
        """By model: calls, and milliseconds a request; empty where the server does not tell."""
        if self.endpoint.model not in self.sums:
            return {}
        requests = max(1, self.sums[self.endpoint.model][0])
        return {
            name: {
                "requests": requests,
                "calls": calls,
                "queue_ms": queue / requests / 1e6,
                "compute_ms": compute / requests / 1e6,
                "total_ms": total / requests / 1e6,
            }
            for name, (calls, total, queue, compute) in sorted(self.sums.items())
            if calls
        }
