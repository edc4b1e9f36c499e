"""What tables, plots and sentences of a comparison call things."""

from __future__ import annotations

from triton_repo.compare import Comparison

SHORT = {
    "ttft_ms": "TTFT, ms",
    "inter_token_ms": "inter-token, ms",
    "latency_ms": "request, ms",
    "tokens_per_s": "tokens/s",
    "user_tokens_per_s": "tokens/s, one",
    "goodput_per_s": "good/s",
}
REMOVED = {
    "layers": "layers",
    "attention_layers": "attention layers",
    "all_reduces_per_token": "all-reduces per token",
    "kv_bytes_per_token": "KV cache bytes per token",
    "parameters": "parameters",
}


def unit(comparison: Comparison) -> str:
    """What a level counts."""
    return "requests/s" if comparison.settings.get("load") == "open" else "clients"


def at(comparison: Comparison, level: float) -> str:
    """`one client`, `4 clients`, `2.5 requests/s`."""
    return "one client" if (unit(comparison), level) == ("clients", 1) else f"{level:g} {unit(comparison)}"


def removed(comparison: Comparison) -> list[tuple[str, int, int]]:
    """What the candidate has less of: name, baseline, candidate."""
    before, after = comparison.baseline_facts, comparison.candidate_facts
    if before is None or after is None or not REMOVED.keys() <= before.keys() & after.keys():
        return []
    return [(text, before[key], after[key]) for key, text in REMOVED.items()]
