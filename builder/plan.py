"""What is done to a model: plan.yaml, or the same said on the command line.

    model: DIGEST              the model it was made for; checked when given
    drop_attention: [7, 8, 9]  layers that lose their attention
    fuse: [[7, 8]]             runs that become one layer; left out: every run without its last layer
    norm: fold                 or `last`

Indices are layers of the input model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from builder.architecture import Architecture
from builder.checkpoint import Checkpoint
from builder.errors import UserError
from builder.surgery.attention import drop_attention
from builder.surgery.fusion import Group, Norm, default_groups, fuse

KEYS = ("model", "drop_attention", "fuse", "norm")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`fuse` None is every attention-free run without its last layer."""

    drop_attention: tuple[int, ...] = ()
    fuse: tuple[Group, ...] | None = None
    norm: Norm = "fold"
    model: str | None = None

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        """Rewrite `checkpoint`. Raises UserError where the plan does not fit it."""
        if self.model is not None and self.model != checkpoint.digest:
            raise UserError(f"plan: made for model {self.model[:12]}, this one is {checkpoint.digest[:12]}")
        dropped = drop_attention(checkpoint, set(self.drop_attention))
        return fuse(dropped, self.groups(dropped.architecture), self.norm)

    def groups(self, dropped: Architecture) -> list[Group]:
        """The groups to fuse in the architecture whose attention has been dropped."""
        return default_groups(dropped) if self.fuse is None else sorted(self.fuse)

    def to_dict(self) -> dict[str, Any]:
        """The content of plan.yaml."""
        values: dict[str, Any] = {"model": self.model, "drop_attention": list(self.drop_attention)}
        if self.fuse is not None:
            values["fuse"] = [list(group) for group in self.fuse]
        return {**values, "norm": self.norm}


def read(file: Path) -> Plan:
    """Read plan.yaml. Raises UserError naming the key that is off."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: not a mapping; keys are {', '.join(KEYS)}")
    for key in values:
        if key not in KEYS:
            raise UserError(f"{file}: key {key!r} is unknown; keys are {', '.join(KEYS)}")
    try:
        return Plan(
            drop_attention=tuple(_integer(i) for i in values.get("drop_attention") or ()),
            fuse=None if values.get("fuse") is None else tuple(_group(g) for g in values["fuse"]),
            norm=parse_norm(values.get("norm", "fold")),
            model=values.get("model"),
        )
    except (UserError, TypeError) as error:
        raise UserError(f"{file}: {error}") from None


def write(plan: Plan, file: Path) -> None:
    """Write plan.yaml."""
    file.write_text(yaml.safe_dump(plan.to_dict(), sort_keys=False), encoding="utf-8")


def parse_norm(value: object) -> Norm:
    """`fold` or `last`."""
    if value not in get_args(Norm):
        raise UserError(f"norm: {value!r} is not one of {', '.join(get_args(Norm))}")
    return value  # type: ignore[return-value]


def parse_layers(text: str) -> tuple[int, ...]:
    """`6,7,42-51` as layer numbers."""
    layers: list[int] = []
    for part in text.split(","):
        first, last = _bounds(part) if "-" in part else (_integer(part), _integer(part))
        layers.extend(range(first, last + 1))
    if len(set(layers)) != len(layers):
        raise UserError(f"layers: {text!r} names a layer twice")
    return tuple(layers)


def parse_group(text: str) -> Group:
    """`42-50` as (42, 50)."""
    return _bounds(text)


def _bounds(text: str) -> Group:
    first, _, last = text.partition("-")
    bounds = _integer(first), _integer(last)
    if bounds[0] > bounds[1]:
        raise UserError(f"layers: {text!r} runs backwards; write FIRST-LAST")
    return bounds


def _group(value: object) -> Group:
    if not isinstance(value, list) or len(value) != 2:
        raise UserError(f"fuse: {value!r} is not [first, last]")
    return _integer(value[0]), _integer(value[1])


def _integer(value: object) -> int:
    digits = value.strip() if isinstance(value, str) else value
    if isinstance(digits, bool) or not (
        isinstance(digits, int) or (isinstance(digits, str) and digits.isdecimal())
    ):
        raise UserError(f"layers: {value!r} is not a layer number; write e.g. 6,7,42-51")
    return int(digits)
