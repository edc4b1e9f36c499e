"""Baseline against candidate: the same prompts, in interleaved rounds, as distributions and ratios.

Rounds alternate ABBA, so a drift of the machine meets both alike. Within a round `concurrency` clients
work through the requests, each sending its next when the last has ended (closed loop). Times are the
client's and include opening the connection.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import cycle, islice
from typing import Any

from builder.errors import UserError
from triton_repo.client import Endpoint, RequestTiming, measure
from triton_repo.statistics import RESAMPLES, Ratio, Statistics, ratios, statistics

VERSION = 1  # of report.json
SIDES = ("baseline", "candidate")
METRICS = {
    "ttft_ms": "time to first token",
    "inter_token_ms": "inter-token latency",
    "latency_ms": "request latency",
    "tokens_per_s": "tokens/s",
}
PACKAGES = ("ffn-fusion", "torch", "nvidia-pytriton", "tensorrt-llm")
DEFAULT_PROMPTS = (
    "def main(argv=None):\n",
    "import os\nimport sys\n\n",
    "class Node:\n    def __init__(self",
    "The function returns the number of",
)


@dataclass(frozen=True, kw_only=True)
class Round:
    """All requests of one side in one round, in the order of the prompts."""

    side: str
    concurrency: int
    wall_s: float
    timings: tuple[RequestTiming, ...]

    def samples(self, metric: str) -> list[float]:
        """The round's values of a metric, in ms or tokens/s (one value: the round's throughput)."""
        if metric == "ttft_ms":
            return [1e3 * t.ttft_s for t in self.timings]
        if metric == "inter_token_ms":
            return [1e3 * x for t in self.timings for x in t.inter_token_s]
        if metric == "latency_ms":
            return [1e3 * t.latency_s for t in self.timings]
        return [sum(t.num_chunks for t in self.timings) / self.wall_s]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric at one concurrency. `ratios` has candidate / baseline of p50, p90, p99 and mean."""

    metric: str
    concurrency: int
    baseline: Statistics
    candidate: Statistics
    ratios: dict[str, Ratio]

    @property
    def ratio(self) -> Ratio:
        """Of the medians."""
        return self.ratios["p50"]

    @property
    def speedup(self) -> Ratio:
        """How many times faster the candidate is at the median: above 1 is better in every metric."""
        return self.ratio if self.metric == "tokens_per_s" else self.ratio.inverse()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything the report shows."""

    rows: tuple[Row, ...]
    inter_token_ms: dict[str, list[float]]  # all values of each side at the first concurrency
    notes: tuple[str, ...]
    settings: dict[str, Any]
    baseline_facts: dict[str, Any] | None
    candidate_facts: dict[str, Any] | None
    quality: dict[str, Any] | None
    hardware: dict[str, Any]
    versions: dict[str, str]

    def row(self, metric: str, concurrency: int) -> Row:
        return next(r for r in self.rows if (r.metric, r.concurrency) == (metric, concurrency))

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json."""
        rows = [{**asdict(r), "ratio": asdict(r.ratio), "speedup": asdict(r.speedup)} for r in self.rows]
        return {"version": VERSION, **asdict(self), "rows": rows}


def compare(
    baseline: Endpoint,
    candidate: Endpoint,
    *,
    prompts: Sequence[str],
    max_tokens: int,
    concurrency: Sequence[int] = (1, 2, 4),
    rounds: int = 8,
    warmup: int = 2,
    seed: int = 0,
    baseline_facts: dict[str, Any] | None = None,
    candidate_facts: dict[str, Any] | None = None,
    quality: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Measure both endpoints, greedily, `rounds` rounds a side at each concurrency.

    `warmup` rounds a side and level come first and are not counted; `seed` is the bootstrap's. Facts are
    counts of the architectures (layers, parameters...), quality maps a model's name to its perplexity and
    KL. Raises UserError where a setting makes no sense or a server fails.
    """
    _check(prompts, max_tokens, concurrency, rounds, warmup)
    ends = dict(zip(SIDES, (baseline, candidate), strict=True))
    measured: list[Round] = []
    for level in concurrency:
        requests = requests_of(prompts, level)
        for number in range(-warmup, rounds):
            text = f"round {number + 1} of {rounds}" if number >= 0 else "warm-up"
            progress(f"concurrency {level}, {text}")
            order = SIDES if number % 2 == 0 else SIDES[::-1]
            done = [_run_round(side, ends[side], requests, max_tokens, level) for side in order]
            measured += done if number >= 0 else []
    from engines import hardware

    return Comparison(
        rows=tuple(row(measured, metric, level, seed) for level in concurrency for metric in METRICS),
        inter_token_ms={
            side: [x for r in _of(measured, side, concurrency[0]) for x in r.samples("inter_token_ms")]
            for side in SIDES
        },
        notes=notes(measured),
        settings={
            "prompts": len(prompts),
            "max_tokens": max_tokens,
            "concurrency": list(concurrency),
            "rounds": rounds,
            "warmup": warmup,
            "seed": seed,
            "resamples": RESAMPLES,
        },
        baseline_facts=baseline_facts,
        candidate_facts=candidate_facts,
        quality=quality,
        hardware={**hardware.cpu(), "gpus": hardware.gpus()},
        versions=_versions(),
    )


def _check(
    prompts: Sequence[str], max_tokens: int, concurrency: Sequence[int], rounds: int, warmup: int
) -> None:
    if not prompts:
        raise UserError("prompts: empty; give at least one")
    if max_tokens < 2:
        raise UserError(f"max_tokens: {max_tokens}; give 2 or more, else there is no time between tokens")
    if not concurrency or min(concurrency) < 1 or len(set(concurrency)) != len(concurrency):
        raise UserError(f"concurrency: {list(concurrency)}; give unlike positive numbers")
    if rounds < 2:
        raise UserError(f"rounds: {rounds}; give 2 or more, else there is no interval")
    if warmup < 0:
        raise UserError(f"warmup: {warmup}; give 0 or more rounds")


def requests_of(prompts: Sequence[str], level: int) -> list[str]:
    """The prompts, repeated up to a multiple of the clients, so that as many run at once as is said."""
    return list(islice(cycle(prompts), -(-len(prompts) // level) * level))


def _run_round(side: str, endpoint: Endpoint, requests: Sequence[str], max_tokens: int, level: int) -> Round:
    start = time.perf_counter()
    with ThreadPoolExecutor(level) as clients:
        timings = tuple(clients.map(lambda p: measure(endpoint, p, max_tokens=max_tokens), requests))
    return Round(side=side, concurrency=level, wall_s=time.perf_counter() - start, timings=timings)


def _of(rounds: Sequence[Round], side: str, level: int) -> list[Round]:
    return [r for r in rounds if (r.side, r.concurrency) == (side, level)]


def row(rounds: Sequence[Round], metric: str, level: int, seed: int) -> Row:
    """The statistics and ratios of one metric at one concurrency. Raises UserError if a side has no values."""
    groups = {side: [r.samples(metric) for r in _of(rounds, side, level)] for side in SIDES}
    try:
        return Row(
            metric=metric,
            concurrency=level,
            ratios=ratios(groups["baseline"], groups["candidate"], seed),
            baseline=statistics([x for g in groups["baseline"] for x in g]),
            candidate=statistics([x for g in groups["candidate"] for x in g]),
        )
    except ValueError:
        raise UserError(
            f"{METRICS[metric]}: too few values at concurrency {level}, outputs end after one token; "
            "give other prompts"
        ) from None


def notes(rounds: Sequence[Round]) -> tuple[str, ...]:
    """What keeps the two sides from having done equal work, request by request."""
    sides = [[t for r in rounds if r.side == side for t in r.timings] for side in SIDES]
    pairs = list(zip(*sides, strict=True))
    total = len(pairs)
    lengths = sum(b.num_chunks != c.num_chunks for b, c in pairs)
    texts = sum(b.text != c.text for b, c in pairs)
    found = []
    if lengths:
        means = [sum(t.num_chunks for t in side) / total for side in sides]
        found.append(
            f"Outputs differ in length in {lengths} of {total} requests: {means[0]:.1f} tokens a request from "
            f"the baseline, {means[1]:.1f} from the candidate. Request latency is not of equal work."
        )
    if texts:
        found.append(f"Outputs differ in text in {texts} of {total} requests, as those of two models do.")
    return tuple(found)


def _versions() -> dict[str, str]:
    """Versions of the packages that take part and are installed here."""
    installed = {d.name for d in metadata.distributions()} & set(PACKAGES)
    return {name: metadata.version(name) for name in PACKAGES if name in installed}
