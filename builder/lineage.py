"""Which layer of a parent each layer of a model answers for, also of one that a plan changes on the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from builder import manifest
from builder.checkpoint import Checkpoint
from builder.errors import UserError
from builder.training.mapping import Pair, last_members


def pairs(directory: Path, source: Checkpoint, child: Checkpoint, parent: Checkpoint) -> tuple[Pair, ...]:
    """The pairs of `child`, made by a plan from `source`, or `source` itself, and of `parent`.

    `source` is the model of `directory`, whose record says what it holds of the parent. Raises UserError
    where there is no such record, or it is of another parent.
    """
    file = directory / manifest.NAME
    sizes = len(child.architecture.layers), len(parent.architecture.layers)
    through = manifest.layer_mapping(child.architecture, len(source.architecture.layers))
    if parent.digest == source.digest:
        return last_members(through, *sizes, str(file))
    record = manifest.read(directory)
    if record is None or "layers" not in record:
        raise UserError(f"{file}: does not say which layers of the parent are held where")
    if record.get("source") != parent.digest:
        raise UserError(
            f"{file}: made from model {str(record.get('source'))[:12]}, the parent is {parent.digest[:12]}"
        )
    last_members(record["layers"], len(source.architecture.layers), sizes[1], str(file))  # checks them
    return last_members(composed(record["layers"], through), *sizes, str(file))


def composed(first: Sequence[int | None], second: Sequence[int | None]) -> list[int | None]:
    """The mapping of layers by `first` and then by `second`."""
    return [None if place is None else second[place] for place in first]
