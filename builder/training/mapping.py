"""Which layer of the parent each layer of a student answers for, as the student's directory says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from builder import huggingface, manifest, tokenizer
from builder.checkpoint import Checkpoint
from builder.errors import UserError

Pair = tuple[int, int]  # a layer of the student, and the last layer of the parent that it holds


@dataclass(frozen=True, kw_only=True)
class Couple:
    """A student, its members numbered as the parent's layers, and the parent that it was made from.

    `record` is the student's ffn-fusion.json.
    """

    parent: Checkpoint
    student: Checkpoint
    record: dict[str, Any]
    pairs: tuple[Pair, ...]


def read(parent_dir: Path, student_dir: Path) -> Couple:
    """Both models and the mapping of their layers; no weights are read.

    Raises UserError where the student does not say what its layers hold, or was made from another model,
    and where vocabularies, hidden sizes or tokenizers differ.
    """
    parent, student = huggingface.read(parent_dir), huggingface.read(student_dir)
    for name in ("vocab_size", "hidden_size"):
        ours, theirs = (getattr(x.architecture, name) for x in (student, parent))
        if ours != theirs:
            raise UserError(
                f"student: {name} {ours}, the parent has {theirs}; give the model that the "
                "student was made from"
            )
    tokenizer.check_same(parent_dir, student_dir)
    record = _record(student_dir)
    if record.get("source") != parent.digest:
        raise UserError(
            f"{student_dir / manifest.NAME}: made from model {str(record.get('source'))[:12]}, the parent is "
            f"{parent.digest[:12]}; give the very directory that the student was made from"
        )
    sizes = len(student.architecture.layers), len(parent.architecture.layers)
    pairs = last_members(record["layers"], *sizes, str(student_dir / manifest.NAME))
    layers = tuple(
        replace(layer, members=tuple(i for i, place in enumerate(record["layers"]) if place == index))
        for index, layer in enumerate(student.architecture.layers)
    )
    student = replace(student, architecture=replace(student.architecture, layers=layers))
    return Couple(parent=parent, student=student, record=record, pairs=pairs)


def last_members(layers: Any, num_student: int, num_parent: int, where: str) -> tuple[Pair, ...]:
    """Pairs from `manifest.layer_mapping`; a student layer that holds none of the parent's has no pair.

    Raises UserError, beginning with `where`, on a mapping of other models.
    """
    if not isinstance(layers, list) or len(layers) != num_parent:
        found = len(layers) if isinstance(layers, list) else layers
        raise UserError(f"{where}: layers names {found!r} layers, the parent has {num_parent}; fuse it again")
    last: dict[int, int] = {}
    for index, place in enumerate(layers):
        if place is not None and (type(place) is not int or not 0 <= place < num_student):
            raise UserError(f"{where}: layers: {place!r} is no layer of the student; fuse it again")
        if place is not None:
            last[place] = index
    return tuple(sorted(last.items()))


def _record(student_dir: Path) -> dict[str, Any]:
    record = manifest.read(student_dir)
    if record is None or "layers" not in record:
        raise UserError(
            f"{student_dir / manifest.NAME}: does not say which layers of the parent are held where; write "
            "the student with `ffn-fusion fuse`"
        )
    return record
