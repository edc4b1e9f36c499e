"""Measured latency: the table that `profile` writes, read as the costs of a model's parts."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from builder.architecture import FFN, Architecture, Attention, Linear
from builder.errors import UserError
from builder.storage import json_bytes, read_json

VERSION = 1
SHAPE = ("hidden_size", "num_attention_heads", "head_dim", "vocab_size")
CONDITIONS = ("tp_size", "batch", "context")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Seconds of a decode step of `batch` sequences with `context` tokens each, by part, as measured.

    `attention` holds (KV heads, seconds), `ffn` (width, seconds), both ascending and of the whole model's
    sizes; `outside` is the rest of a step. `noise` is the largest difference between two rounds' figures
    for one part. `hardware` and `versions` say where, `method` how.
    """

    version: int = VERSION
    model: str
    hidden_size: int
    num_attention_heads: int
    head_dim: int
    vocab_size: int
    tp_size: int
    batch: int
    context: int
    dtype: str
    quant: str | None
    device: str
    outside: float
    attention: tuple[tuple[int, float], ...]
    ffn: tuple[tuple[int, float], ...]
    noise: float
    hardware: dict[str, Any]
    versions: dict[str, str]
    method: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `read` reads them back."""
        return asdict(self)


def write(table: Table, file: Path) -> None:
    """Write a table as JSON, whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_bytes(json_bytes(table.to_dict()))
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def read(file: Path) -> Measured:
    """The costs in a table. Raises UserError by key."""
    values = read_json(file)
    if values.get("version") != VERSION:
        raise UserError(f"{file}: version {values.get('version')!r} is not {VERSION}; run `profile` again")
    wrong = {f.name for f in fields(Table)} ^ set(values)
    if wrong:
        raise UserError(f"{file}: key {sorted(wrong)[0]!r} is missing or unknown; run `profile` again")
    for name in (*SHAPE, *CONDITIONS):
        if type(values[name]) is not int or values[name] < 1:
            raise UserError(f"{file}: {name} {values[name]!r} is not a positive integer; run `profile` again")
    if values["outside"] != 0 and not _is_seconds(values["outside"]):  # 0: less than the noise
        raise UserError(f"{file}: outside {values['outside']!r} is not a time; run `profile` again")
    parts = {name: _pairs(file, name, values[name]) for name in ("attention", "ffn")}
    return Measured(file=file, table=Table(**{**values, **parts}))


def _pairs(file: Path, name: str, value: object) -> tuple[tuple[int, float], ...]:
    """Sizes and seconds, ascending. Raises UserError where they are not that."""
    good = isinstance(value, list) and all(
        isinstance(x, list) and len(x) == 2 and type(x[0]) is int and x[0] > 0 and _is_seconds(x[1])
        for x in value
    )
    if not good or not isinstance(value, list):
        raise UserError(f"{file}: {name} is not a list of [size, seconds]; run `profile` again")
    pairs = tuple((x[0], float(x[1])) for x in value)
    if any(a[0] >= b[0] for a, b in pairwise(pairs)):
        raise UserError(f"{file}: {name} is not in ascending order of size; run `profile` again")
    return pairs


def _is_seconds(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < 1e6  # type: ignore[operator]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Costs from a table; between two measured widths the seconds lie on a line."""

    file: Path
    table: Table

    @property
    def measured(self) -> bool:
        return True

    @property
    def source(self) -> str:
        return f"measured: {self.file}"

    @property
    def widest(self) -> int:
        """The widest FFN that was measured; 0 where none was."""
        return self.table.ffn[-1][0] if self.table.ffn else 0

    def check(self, architecture: Architecture, **conditions: int) -> None:
        """Raise UserError where the table is of other sizes than `architecture`'s, or of other conditions.

        `conditions` are any of tp_size, batch and context.
        """
        for name in SHAPE:
            ours, asked = getattr(self.table, name), getattr(architecture, name)
            if ours != asked:
                raise UserError(
                    f"{self.file}: measured for {name} {ours}, the model has {asked}; run `profile` on it"
                )
        for name, asked in conditions.items():
            ours = getattr(self.table, name)
            if ours != asked:
                flag = "tp" if name == "tp_size" else name
                raise UserError(
                    f"{self.file}: measured with {name} {ours}, not {asked}; run `profile --{flag} {asked}`"
                )

    def attention(self, attention: Attention | Linear | None) -> float:
        """Raises UserError for KV heads that were not measured."""
        if attention is None:
            return 0.0
        known = dict(self.table.attention)
        if isinstance(attention, Linear):
            raise self._missing("a matrix in the place of attention")
        if attention.num_key_value_heads not in known:
            heads = ", ".join(map(str, known)) or "none"
            raise UserError(
                f"{self.file}: attention with {attention.num_key_value_heads} KV heads was not measured, "
                f"only {heads}; run `profile --kv-heads {attention.num_key_value_heads}`"
            )
        return known[attention.num_key_value_heads]

    def ffn(self, ffn: FFN | Linear | None) -> float:
        """Raises UserError for a width outside those measured."""
        if ffn is None:
            return 0.0
        if isinstance(ffn, Linear):
            raise self._missing("a matrix in the place of an FFN")
        width, table = ffn.intermediate_size, self.table.ffn
        if not table or not table[0][0] <= width <= table[-1][0]:
            between = f"only {table[0][0]} to {table[-1][0]}" if table else "none was"
            raise UserError(
                f"{self.file}: an FFN of width {width} was not measured, {between}; "
                "run `profile` with --widths or a larger --max-width"
            )
        place = bisect_left(table, (width, 0.0))
        high, above = table[place]
        if high == width:
            return above
        low, below = table[place - 1]
        return below + (above - below) * (width - low) / (high - low)

    def outside(self) -> float:
        return self.table.outside

    def all_reduce(self) -> float:
        """0.0: a table does not tell them from their parts, so blocks in parallel are counted one by one."""
        return 0.0

    def _missing(self, what: str) -> UserError:
        return UserError(f"{self.file}: {what} was not measured; estimate without --profile")
