"""What is gathered of a model in one precision."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engine.figures import Speed


@dataclass
class Samples:
    """What was seen of one set of engines; by batch, then engine, then round."""

    names: list[str]
    speeds: dict[int, dict[str, list[Speed]]] = field(default_factory=dict)
    tokens: dict[int, dict[str, list[list[int]]]] = field(default_factory=dict)


@dataclass
class Group:
    """A model in a precision; by engine what it tells of itself, and why it has no figures."""

    model: str
    precision: str
    directory: Path
    sets: list[Samples] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)
    other_cores: list[float] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    not_offered: dict[str, str] = field(default_factory=dict)
