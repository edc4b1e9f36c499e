"""What tables, plots and sentences of a comparison say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from triton_repo.compare import Comparison
from triton_repo.history import RATIO, Change
from triton_repo.rounds import SIDES, Ratio, Row

SHORT = {
    "ttft_ms": "TTFT, ms",
    "inter_token_ms": "inter-token, ms",
    "token_gap_ms": "token gap, ms",
    "latency_ms": "request, ms",
    "tokens_per_s": "tokens/s",
    "user_tokens_per_s": "tokens/s, one",
    "goodput_per_s": "good/s",
}
TIMES = {"inter_token_ms": "per token", "latency_ms": "per request", "ttft_ms": "to the first token"}
REMOVED = {
    "layers": "layers",
    "attention_layers": "attention layers",
    "all_reduces_per_token": "all-reduces per token",
    "kv_bytes_per_token": "KV cache bytes per token",
    "parameters": "parameters",
}


def primary(comparison: Comparison) -> Row:
    """The one metric that decides: inter-token latency at the first level, or the first time there is."""
    metric = next(name for name in TIMES if name in comparison.metrics)
    return comparison.row(metric, comparison.settings["concurrency"][0])


def unit(comparison: Comparison) -> str:
    """What a level counts."""
    return "requests/s" if comparison.settings.get("load") == "open" else "clients"


def at(comparison: Comparison, level: float) -> str:
    """`one client`, `4 clients`, `2.5 requests/s`."""
    return "one client" if (unit(comparison), level) == ("clients", 1) else f"{level:g} {unit(comparison)}"


def short(metric: str) -> str:
    """Its name without the unit."""
    return SHORT[metric].removesuffix(", ms")


def number(value: float) -> str:
    """`8.29`, `418`, `12,400`."""
    return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


def interval(ratio: Ratio | Change) -> str:
    """`0.52 [0.50, 0.55]`; of what cannot be compared, a goodput of 0, words."""
    value = ratio.ratio if isinstance(ratio, Change) else ratio.value
    return "no ratio" if math.isnan(value) else f"{value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def verdict(comparison: Comparison) -> str:
    """How much faster, in a sentence: faster, slower, or no certain difference."""
    row = primary(comparison)
    clients = at(comparison, row.concurrency)
    if not row.ratio.differs:
        return f"No certain difference in latency {TIMES[row.metric]} at {clients}."
    value = row.ratio.value
    factor, word = (1 / value, "faster") if value < 1 else (value, "slower")
    return f"The candidate is {factor:.2f} times {word} {TIMES[row.metric]} at {clients}."


def certainty(comparison: Comparison) -> str:
    """`95% interval 1.36 to 1.48`, of the factor in the verdict; where it has none, of the ratio."""
    ratio = primary(comparison).ratio
    if ratio.differs and ratio.value < 1:
        return f"95% interval {1 / ratio.high:.2f} to {1 / ratio.low:.2f}"
    which = "" if ratio.differs else f"ratio {ratio.value:.2f}, "
    return f"{which}95% interval {ratio.low:.2f} to {ratio.high:.2f}"


def headline(comparison: Comparison) -> str:
    """The verdict and how sure it is."""
    return f"{verdict(comparison).removesuffix('.')} ({certainty(comparison)})."


def outliers(comparison: Comparison) -> str:
    """`14 of 4,032 times are outliers, and kept`, over all levels; empty where single times are not known."""
    if not comparison.token_gap_ms:
        return ""
    times = (*TIMES, "token_gap_ms")
    found = [getattr(row, side) for row in comparison.rows if row.metric in times for side in SIDES]
    return (
        f"{sum(x.outliers for x in found):,} of {sum(x.count for x in found):,} times are outliers, and kept"
    )


def equal_work(comparison: Comparison) -> bool:
    """Whether the answers of both sides were equally long; where not, a note of `compare` says so."""
    return not any(note.startswith("Outputs differ in length") for note in comparison.notes)


def changed(comparison: Comparison) -> list[str]:
    """What differs from the kept run, a line each; that nothing does is a line as well."""
    against = comparison.against
    if against is None:
        return []
    found = [x for x in against.changes if x.slower or x.faster]
    lines = [
        f"{_compared(x)} than in {against.file}: {short(x.metric)} at {at(comparison, x.concurrency)} "
        f"{x.ratio:.2f} times [{x.low:.2f}, {x.high:.2f}]."
        for x in found
    ]
    packages = [f"Since {against.file}: {', '.join(against.packages)}."] if against.packages else []
    return [*(lines or [f"No certain change since {against.file}."]), *packages]


def _compared(change: Change) -> str:
    """`The candidate is slower`."""
    if change.side == RATIO:
        return f"The ratio candidate / baseline is {'larger' if change.slower else 'smaller'}"
    return f"The {change.side} is {'slower' if change.slower else 'faster'}"


def since(comparison: Comparison) -> str:
    """What became of the ratio that decides, since the kept run."""
    row = primary(comparison)
    key = RATIO, row.metric, row.concurrency
    changes = () if comparison.against is None else comparison.against.changes
    found = next((x for x in changes if (x.side, x.metric, x.concurrency) == key), None)
    if found is None:
        return "not comparable"
    return f"ratio {found.ratio:.2f} times" if found.slower or found.faster else "no certain change"


def cost(comparison: Comparison) -> str:
    """What the speed costs in quality, in a sentence."""
    if not comparison.quality:
        return "Quality: not measured."
    (_, first), *_, (name, last) = comparison.quality.items()
    kl = "" if last.get("kl") is None else f", KL to the parent {estimate(last['kl'], '.4f')}"
    before, after = (estimate(x["perplexity"], ".2f") for x in (first, last))
    return f"Perplexity {before} becomes {after}{kl} ({name})."


def costs(comparison: Comparison) -> list[tuple[str, str]]:
    """`cost` in parts: a name and what becomes of it."""
    if not comparison.quality:
        return [("quality", "not measured")]
    (_, first), *_, (_, last) = comparison.quality.items()
    perplexities = (point(x["perplexity"]) for x in (first, last))
    found = [("perplexity", " → ".join(f"{x:.2f}" for x in perplexities))]
    return found if last.get("kl") is None else [*found, ("KL to the parent", estimate(last["kl"], ".4f"))]


def point(x: float | Mapping[str, float]) -> float:
    """Of a number, or of one with its interval."""
    return x["value"] if isinstance(x, Mapping) else x


def estimate(x: float | Mapping[str, float], form: str) -> str:
    """`1.23 [1.20, 1.26]`, or the number alone."""
    if not isinstance(x, Mapping):
        return format(x, form)
    if x.get("low") is None:
        return format(x["value"], form)
    return f"{x['value']:{form}} [{x['low']:{form}}, {x['high']:{form}}]"


def removed(comparison: Comparison) -> list[tuple[str, int, int]]:
    """What the candidate has less of: name, baseline, candidate."""
    before, after = comparison.baseline_facts, comparison.candidate_facts
    if before is None or after is None or not REMOVED.keys() <= before.keys() & after.keys():
        return []
    return [(text, before[key], after[key]) for key, text in REMOVED.items()]


def machine(comparison: Comparison) -> str:
    """The machine that measured: CPU, GPUs with their clocks, packages."""
    hardware = comparison.hardware
    parts = [f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['machine']}"]
    for text, same in groupby(map(_gpu, hardware["gpus"])):
        count = len(list(same))
        parts.append(f"{count} x {text}" if count > 1 else text)
    parts += [f"{name} {version}" for name, version in comparison.versions.items()]
    return "; ".join(parts)


def _gpu(gpu: dict[str, Any]) -> str:
    clock = f", {gpu['clock']} MHz after measuring" if gpu.get("clock") is not None else ""
    return f"{gpu['name']} (driver {gpu['driver']}, SM clock at most {gpu['max_clock']} MHz{clock})"
