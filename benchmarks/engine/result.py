"""A run's figures as JSON and as text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.engine import figures, models
from benchmarks.engine.entries import ENTRIES, OURS, PEERS
from benchmarks.engine.group import Group

REFERENCE = "transformers"  # whose tokens the others should give
_BUSY = 0.1  # cores
_TOLD = ("settings", "convert_s", "build_s", "prepare_s", "load_s")


def of_group(group: Group) -> dict[str, Any]:
    """One group's part of the JSON."""
    batches = sorted({batch for samples in group.sets for batch in samples.speeds})
    told = {
        name: {key: facts[key] for key in _TOLD if key in facts}
        for name, facts in group.facts.items()
        if name != "memory"
    }
    return {
        "model": group.model,
        "precision": group.precision,
        "together": [samples.names for samples in group.sets],
        "weights_per_token": models.read_per_token(group.directory),
        "read_gb_per_s": figures.spread(group.bandwidth) if group.bandwidth else None,
        "other_cores_busy": figures.spread(group.other_cores) if group.other_cores else None,
        "engines": told,
        "not_offered": group.not_offered,
        "errors": group.errors,
        "batches": {str(batch): _batch(group, batch) for batch in batches},
    }


def _batch(group: Group, batch: int) -> dict[str, Any]:
    names = [entry.name for entry in ENTRIES]
    rows = {name: _row(group, batch, name) for name in names if _runs(group, batch, name)}
    return {"rows": rows, "ratios": _ratios(group, batch)}


def _runs(group: Group, batch: int, name: str) -> list[figures.Speed]:
    """Of all sets that have the engine."""
    return [run for samples in group.sets for run in samples.speeds.get(batch, {}).get(name, ())]


def _row(group: Group, batch: int, name: str) -> dict[str, Any]:
    runs = _runs(group, batch, name)
    decode = [run.decode for run in runs]
    row: dict[str, Any] = {
        "decode_tokens_per_s": figures.spread(decode),
        "prefill_s": figures.spread([run.prefill_s for run in runs]),
        "rounds": len(runs),
    }
    if batch == 1 and group.bandwidth:
        size = models.read_per_token(group.directory) * models.WEIGHT_BYTES[group.precision]
        share = statistics.median(decode) * size / 1e9 / statistics.median(group.bandwidth)
        row["read_share"] = round(share, 3)
    tokens = [t[batch] for t in (x.tokens for x in group.sets) if name in t.get(batch, {})]
    reference = [t[batch] for t in (x.tokens for x in group.sets) if REFERENCE in t.get(batch, {})]
    if reference:
        row["tokens"] = figures.agreement(tokens[-1][name], reference[-1][REFERENCE])
    return row


def _ratios(group: Group, batch: int) -> dict[str, Any]:
    """Ours over each peer, from the rounds in which they took turns."""
    found = {}
    for peer in PEERS:
        for samples in group.sets:
            speeds = samples.speeds.get(batch, {})
            if OURS.name in speeds and peer.name in speeds:
                ours, theirs = ([x.decode for x in speeds[n]] for n in (OURS.name, peer.name))
                target = peer.target if batch == 1 else None
                found[f"{OURS.name}/{peer.name}"] = figures.ratio(ours, theirs, target)
    return found


def versions(groups: Sequence[Group]) -> dict[str, str]:
    """Of all engines' packages."""
    found: dict[str, str] = {}
    for group in groups:
        for facts in group.facts.values():
            found |= facts.get("versions", {})
    return found


def show(result: dict[str, Any]) -> str:
    """The result as a text."""
    machine = result["machine"]
    lines = [f"{machine['processor']}, {machine['cores']} cores; tokens/s while decoding, prefill in s"]
    for group in result["groups"]:
        lines += ["", *_group_lines(group)]
    lines += [f"{who}: {error}" for who, error in result["errors"].items()]
    return "\n".join(lines)


def _group_lines(group: dict[str, Any]) -> list[str]:
    read = group["read_gb_per_s"]
    lines = [f"{group['model']} {group['precision']}" + (f", memory {read['median']} GB/s" if read else "")]
    for batch, part in group["batches"].items():
        lines += [_row_line(batch, name, row) for name, row in part["rows"].items()]
        lines += [_ratio_line(batch, name, figure) for name, figure in part["ratios"].items()]
    lines += [f"  {name:13} not offered: {reason}" for name, reason in group["not_offered"].items()]
    lines += [f"  {name:13} failed: {error}" for name, error in group["errors"].items()]
    others = group["other_cores_busy"]
    if others and others["median"] > _BUSY:
        lines.append(
            f"  others kept {others['median']:.1f} cores busy meanwhile: measure again on a quiet machine"
        )
    return lines


def _row_line(batch: str, name: str, row: dict[str, Any]) -> str:
    decode, share = row["decode_tokens_per_s"], row.get("read_share")
    text = f"  batch {batch:>2}  {name:13} {decode['median']:8.1f} ({decode['min']:.1f}-{decode['max']:.1f})"
    text += f"  prefill {row['prefill_s']['median']:.2f}"
    text += f"  {share:.0%} of memory" if share is not None else ""
    return text + (f"  {row['tokens']['same']:.0%} of the tokens" if "tokens" in row else "")


def _ratio_line(batch: str, name: str, figure: dict[str, Any]) -> str:
    target = f"  target {figure['target']}: {'met' if figure['met'] else 'missed'}" if "met" in figure else ""
    return f"  batch {batch:>2}  {name:18} x {figure['median_of_rounds']:.2f}{target}"
