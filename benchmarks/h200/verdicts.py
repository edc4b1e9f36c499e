"""What the figures say about the targets, and the result as a text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

TARGETS = {
    "batch-1 decode, share of the floor": 0.85,
    "fused faster than sequential at every batch up to 64, ratio": 1.0,
}
_BASES = ("sequential", "attention dropped")


def _batches(parts: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every table of variants, by where it stands."""
    for part, figures in parts.items():
        for label, value in figures.items():
            if isinstance(value, dict) and label.startswith("batch "):
                yield f"{part}, {label}", value
            elif isinstance(value, dict):
                inner = value.items()
                yield from ((f"{part}, {label}, {k}", v) for k, v in inner if k.startswith("batch "))


def _best(rows: dict[str, Any], name: str) -> float | None:
    """The least time of a variant over its ways of multiplying; an all-reduce counts where it is modelled."""
    found = [x.get("with_all_reduces_us", x["us"]) for n, x in rows.items() if n in (name, f"{name}, sums")]
    return min(found) if found else None


def verdicts(parts: dict[str, Any]) -> dict[str, Any]:
    """Sequential time over fused time everywhere, the best share of the floor at batch 1, both targets."""
    ratios: dict[str, float] = {}
    for where, rows in _batches(parts):
        base = next((b for b in _BASES if b in rows), None)
        fused = _best(rows, "fused")
        if base and fused:
            ratios[where] = round((_best(rows, base) or 0) / fused, 4)
    shares = [x["share"] for x in parts.get("decode 8B", {}).get("batch 1", {}).values()]
    wanted = dict(zip(("share", "ratio"), TARGETS.values(), strict=True))
    return {
        "sequential_over_fused": ratios,
        "slower_when_fused": sorted(name for name, x in ratios.items() if x <= wanted["ratio"]),
        "decode_8b_batch_1_share": max(shares, default=None),
        "met": {
            "share": bool(shares) and max(shares) >= wanted["share"],
            "ratio": bool(ratios) and min(ratios.values()) > wanted["ratio"],
        },
    }


def show(result: dict[str, Any]) -> str:
    """One line a figure."""
    hardware = result["hardware"]
    lines = [f"{hardware['device']}, torch {hardware['torch']}, CUDA {hardware['cuda']}"]
    if "rates" in result:
        rates = result["rates"]
        flops = ", ".join(f"{name} {x / 1e12:.4g} TFLOP/s" for name, x in rates["flops_per_s"].items())
        lines.append(f"copy {rates['copy_bytes_per_s'] / 1e9:.4g} GB/s, {flops}")
    for part, figures in result["parts"].items():
        told = {k: v for k, v in figures.items() if not isinstance(v, dict)}
        lines.append(f"{part}: " + ", ".join(f"{k} {v}" for k, v in told.items()))
    for where, rows in _batches(result["parts"]):
        lines += [f"  {where:44} {name:24} {_figure(x)}" for name, x in rows.items()]
    if "targets" in result:
        lines += [f"target {name}: {x}" for name, x in result["targets"]["wanted"].items()]
        lines += [f"met: {result['targets']['met']}"]
        lines += [f"slower when fused: {x}" for x in result["targets"]["slower_when_fused"]]
    return "\n".join(lines)


def _figure(row: dict[str, Any]) -> str:
    text = f"{row['us']:10.1f} us, floor {row['floor_us']:9.1f} us, {row['share']:.1%}"
    return text + (
        f", {row['with_all_reduces_us']} us with all-reduces" if "with_all_reduces_us" in row else ""
    )
