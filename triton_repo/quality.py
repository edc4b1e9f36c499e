"""Quality of the two models of a comparison, beside their speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from builder.compared import read
from builder.evaluation import score, summarize
from builder.text import read_samples

SAMPLES, LENGTH = 64, 256  # of the text, and tokens of each


def measure(baseline: Path, candidate: Path, data: Sequence[Path], seed: int) -> dict[str, Any]:
    """Perplexity of both, and the candidate's divergence from the baseline, with intervals."""
    both = read(candidate, baseline, None)
    architecture = both.child.architecture
    length = min(LENGTH, architecture.max_position_embeddings)
    found = summarize(
        score(both.child, read_samples(candidate, data, SAMPLES, length, architecture, seed), both.parent)
    )
    assert found.parent_perplexity is not None, "there is a parent"
    assert found.kl is not None, "there is a parent"
    return {
        "baseline": {"perplexity": asdict(found.parent_perplexity), "kl": None},
        "candidate": {"perplexity": asdict(found.perplexity), "kl": asdict(found.kl)},
    }
