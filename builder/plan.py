"""What is done to a model: plan.yaml, or the same said on the command line.

    model: DIGEST                  the model it was made for; checked when given
    drop_attention: [7, 8, 9]      layers that lose their attention
    drop_ffn: [3]                  layers that lose their FFN
    ffn_channels: {5: "0-4095"}    the channels that an FFN keeps, as text or a list
    kv_heads: {6: 2}               the KV heads that an attention keeps, each the mean of neighbours
    fuse: [[7, 8]]                 runs that become one layer; left out: every run without its last layer
    norm: fold                     or `last`
    parallel: [[38, 41]]           windows of blocks that all read the window's input; in no written format

Indices are layers of the input model. They are applied in this order, `parallel` before `fuse`; layers with
neither attention nor FFN then go.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import yaml

from builder.architecture import Architecture
from builder.checkpoint import Checkpoint
from builder.errors import UserError
from builder.surgery.attention import drop_attention, pool_kv_heads
from builder.surgery.ffn import drop_ffn, narrow_ffn
from builder.surgery.fusion import Group, Norm, default_groups, fuse, remove_empty
from builder.surgery.parallel import parallelize

KEYS = ("model", "drop_attention", "drop_ffn", "ffn_channels", "kv_heads", "fuse", "norm", "parallel")
MAX_NUMBER = 10_000_000  # no model has more layers or channels


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`fuse` None is every attention-free run without its last layer."""

    drop_attention: tuple[int, ...] = ()
    drop_ffn: tuple[int, ...] = ()
    ffn_channels: tuple[tuple[int, tuple[int, ...]], ...] = ()
    kv_heads: tuple[tuple[int, int], ...] = ()
    fuse: tuple[Group, ...] | None = None
    norm: Norm = "fold"
    model: str | None = None
    parallel: tuple[Group, ...] = ()

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        """Rewrite `checkpoint`. Raises UserError where the plan does not fit it."""
        cut = self.cut(checkpoint)
        cut = replace(cut, architecture=parallelize(cut.architecture, self.parallel))
        return remove_empty(fuse(cut, self.groups(cut.architecture), self.norm))

    def cut(self, checkpoint: Checkpoint) -> Checkpoint:
        """`checkpoint` with what is dropped, narrowed and pooled, its layers still numbered as before.

        Raises UserError where the plan does not fit it.
        """
        if self.model is not None and self.model != checkpoint.digest:
            raise UserError(f"plan: made for model {self.model[:12]}, this one is {checkpoint.digest[:12]}")
        cut = drop_attention(checkpoint, self.drop_attention)
        cut = drop_ffn(cut, self.drop_ffn)
        cut = narrow_ffn(cut, dict(self.ffn_channels))
        return pool_kv_heads(cut, dict(self.kv_heads))

    def groups(self, dropped: Architecture) -> list[Group]:
        """The groups to fuse in the architecture whose attention has been dropped."""
        return default_groups(dropped) if self.fuse is None else sorted(self.fuse)

    def to_dict(self) -> dict[str, Any]:
        """The content of plan.yaml."""
        values: dict[str, Any] = {"model": self.model, "drop_attention": list(self.drop_attention)}
        if self.drop_ffn:
            values["drop_ffn"] = list(self.drop_ffn)
        if self.ffn_channels:
            values["ffn_channels"] = {layer: format_numbers(x) for layer, x in self.ffn_channels}
        if self.kv_heads:
            values["kv_heads"] = dict(self.kv_heads)
        if self.fuse is not None:
            values["fuse"] = [list(group) for group in self.fuse]
        values["norm"] = self.norm
        if self.parallel:
            values["parallel"] = [list(window) for window in self.parallel]
        return values


def read(file: Path) -> Plan:
    """Read plan.yaml. Raises UserError naming the key that is off."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: not a mapping; keys are {', '.join(KEYS)}")
    for key in values:
        if key not in KEYS:
            raise UserError(f"{file}: key {key!r} is unknown; keys are {', '.join(KEYS)}")
    try:
        return Plan(
            drop_attention=_numbers(values.get("drop_attention") or ()),
            drop_ffn=_numbers(values.get("drop_ffn") or ()),
            ffn_channels=tuple((k, _numbers(x)) for k, x in _per_layer(values, "ffn_channels")),
            kv_heads=tuple((k, _integer(x)) for k, x in _per_layer(values, "kv_heads")),
            fuse=None if values.get("fuse") is None else _groups(values, "fuse"),
            norm=parse_norm(values.get("norm", "fold")),
            model=values.get("model"),
            parallel=_groups(values, "parallel"),
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


def parse_kv_heads(text: str) -> tuple[tuple[int, int], ...]:
    """`6,42-45=2` as pairs of layer and KV heads."""
    layers, equals, heads = text.partition("=")
    if not equals:
        raise UserError(f"kv_heads: {text!r} is not LAYERS=HEADS; write e.g. 6,42-45=2")
    return tuple((layer, _integer(heads)) for layer in parse_layers(layers))


def format_numbers(numbers: tuple[int, ...]) -> str:
    """Ascending numbers as `6,7,42-51`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def parse_layers(text: str) -> tuple[int, ...]:
    """`6,7,42-51` as numbers of layers or channels."""
    layers: list[int] = []
    for part in text.split(","):
        first, last = _bounds(part) if "-" in part else (_integer(part), _integer(part))
        if last > MAX_NUMBER:
            raise UserError(f"layers: {part!r} is beyond any layer or channel; {MAX_NUMBER:,} is the most")
        layers.extend(range(first, last + 1))
    if len(set(layers)) != len(layers):
        raise UserError(f"layers: {text!r} names a layer twice")
    return tuple(layers)


def parse_group(text: str) -> Group:
    """`42-50` as (42, 50)."""
    return _bounds(text)


def parse_windows(text: str) -> tuple[Group, ...]:
    """`38-41,71-74` as ((38, 41), (71, 74))."""
    for part in text.split(","):
        if "-" not in part:
            raise UserError(f"parallel: {part!r} is not FIRST-LAST; write e.g. 38-41,71-74")
    return tuple(_bounds(part) for part in text.split(","))


def _bounds(text: str) -> Group:
    first, _, last = text.partition("-")
    bounds = _integer(first), _integer(last)
    if bounds[0] > bounds[1]:
        raise UserError(f"layers: {text!r} runs backwards; write FIRST-LAST")
    return bounds


def _numbers(value: object) -> tuple[int, ...]:
    if isinstance(value, str):
        return parse_layers(value)
    if not isinstance(value, list | tuple):
        raise UserError(f"layers: {value!r} is not a list; write e.g. [6, 7] or 42-51")
    return tuple(_integer(x) for x in value)


def _per_layer(values: dict[str, Any], key: str) -> list[tuple[int, Any]]:
    given = values.get(key) or {}
    if not isinstance(given, dict):
        raise UserError(f"{key}: {given!r} is not a mapping from layers")
    return [(_integer(layer), x) for layer, x in given.items()]


def _groups(values: dict[str, Any], key: str) -> tuple[Group, ...]:
    groups = []
    for value in values.get(key) or ():
        if not isinstance(value, list) or len(value) != 2:
            raise UserError(f"{key}: {value!r} is not [first, last]")
        groups.append((_integer(value[0]), _integer(value[1])))
    return tuple(groups)


def _integer(value: object) -> int:
    digits = value.strip() if isinstance(value, str) else value
    if isinstance(digits, bool) or not (
        isinstance(digits, int) or (isinstance(digits, str) and digits.isdecimal())
    ):
        raise UserError(f"layers: {value!r} is not a layer number; write e.g. 6,7,42-51")
    return int(digits)
