"""Rotary position embeddings, as Hugging Face describes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from builder.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding. `scaling` holds the numbers of its `kind`, as Hugging Face names them."""

    theta: float = 10000.0
    kind: str = "default"
    scaling: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ROPE_FIELDS:
            known = ", ".join(ROPE_FIELDS)
            raise UserError(f"rope_type: {self.kind!r} is not supported; supported are {known}")
        given = dict(self.scaling)
        for name, required in ROPE_FIELDS[self.kind].items():
            if required and name not in given:
                raise UserError(f"rope_scaling.{name}: missing, but rope_type {self.kind!r} needs it")
        for name, value in given.items():
            if name not in ROPE_FIELDS[self.kind]:
                raise UserError(f"rope_scaling.{name}: {value} has no meaning for rope_type {self.kind!r}")
            if not 0 <= value < 1e12 or (ROPE_FIELDS[self.kind][name] and value == 0):
                raise UserError(f"rope_scaling.{name}: {value} is not a positive number")

    @classmethod
    def from_mapping(cls, theta: float, scaling: Mapping[str, Any] | None) -> Rope:
        """Read Hugging Face's `rope_scaling` (key `rope_type`, or the older `type`).

        Raises UserError for a kind that is not known, a field that is missing or no number.
        """
        given = dict(scaling or {})
        kind = str(given.get("rope_type", given.get("type", "default")))
        numbers = []
        for name in ROPE_FIELDS.get(kind, ()):
            value = given.get(name)
            if value is None:
                continue
            if type(value) not in (int, float, bool):
                raise UserError(f"rope_scaling.{name}: {value!r} is not a number")
            numbers.append((name, float(value)))
        return cls(theta=float(theta), kind=kind, scaling=tuple(numbers))

    def to_mapping(self) -> dict[str, Any] | None:
        """Hugging Face's `rope_scaling` value; None where positions are not scaled."""
        if self.kind == "default":
            return None
        kinds = {"original_max_position_embeddings": int, "truncate": bool}
        return {"rope_type": self.kind, **{name: kinds.get(name, float)(x) for name, x in self.scaling}}

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by: 1 but for yarn (arXiv 2309.00071, 3.4)."""
        if self.kind != "yarn":
            return 1.0
        scaling = dict(self.scaling)
        given, factor = scaling.get("attention_factor"), scaling["factor"]
        if given is not None:
            return given
        above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if above and below:
            return yarn_magnitude(factor, above) / yarn_magnitude(factor, below)
        return yarn_magnitude(factor, 1.0)


def yarn_magnitude(factor: float, mscale: float) -> float:
    """0.1 * mscale * ln(factor) + 1, and 1 where nothing is stretched."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


# For each kind its fields and whether they are required.
ROPE_FIELDS: dict[str, dict[str, bool]] = {
    "default": {},
    "linear": {"factor": True},
    "llama3": {
        "factor": True,
        "low_freq_factor": True,
        "high_freq_factor": True,
        "original_max_position_embeddings": True,
    },
    "yarn": {
        "factor": True,
        "original_max_position_embeddings": True,
        "attention_factor": False,
        "beta_fast": False,
        "beta_slow": False,
        "mscale": False,
        "mscale_all_dim": False,
        "truncate": False,
    },
}
