"""The two sides of an evaluation: a model as a plan changes it, and its parent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from builder import huggingface, lineage, tokenizer
from builder.checkpoint import Checkpoint
from builder.errors import UserError
from builder.plan import Plan
from builder.training.mapping import Pair


@dataclass(frozen=True, kw_only=True)
class Compared:
    """MODEL as the plan changes it and, where there is one, its parent, with where that is.

    `pairs` are of layers of both; `unpaired` says why there are none.
    """

    child: Checkpoint
    parent: Checkpoint | None = None
    directory: Path | None = None
    pairs: tuple[Pair, ...] = ()
    unpaired: str | None = None


def read(model: Path, directory: Path | None, plan: Plan | None) -> Compared:
    """Both sides; without a plan and a parent the model alone. No weights are read."""
    source = huggingface.read(model)
    child = plan.apply(source) if plan else source
    if directory is None:
        if plan is None:
            return Compared(child=child)
        directory, parent = model, source
    else:
        if (directory / "tokenizer.json").is_file():
            tokenizer.check_same(directory, model)
        parent = huggingface.read(directory)
    if parent.architecture.hidden_size != child.architecture.hidden_size:
        why = (
            f"hidden_size {child.architecture.hidden_size}, the parent has {parent.architecture.hidden_size}"
        )
        return Compared(child=child, parent=parent, directory=directory, unpaired=why)
    try:
        pairs = lineage.pairs(model, source, child, parent)
    except UserError as error:
        return Compared(child=child, parent=parent, directory=directory, unpaired=str(error))
    return Compared(child=child, parent=parent, directory=directory, pairs=pairs)
