"""What evaluate tells of text and of tasks, as JSON and as lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from builder.checkpoint import Checkpoint
from builder.compared import Compared
from builder.evaluation import Estimate, Evaluation, score, summarize
from builder.options import progress_bar
from builder.text import read_samples

WIDTH = 200  # of a table, so that no name is cut
BAR = 20  # characters of a cosine of 1


def on_text(
    model: Path, data: tuple[Path, ...], compared: Compared, seed: int, samples: int, length: int, batch: int
) -> tuple[dict[str, Any], list[str]]:
    """The figures on text, as JSON and as lines."""
    tokens = read_samples(model, data, samples, length, compared.child.architecture, seed)
    both = (compared.child, compared.parent)
    weights = [x for c in both if c for n, x in c.tensors.items() if n.startswith("layers.")]
    with progress_bar("evaluating", sum(x.num_bytes for x in weights)) as progress:
        scores = score(
            compared.child, tokens, compared.parent, pairs=compared.pairs, batch=batch, progress=progress
        )
    found = summarize(scores, seed)
    result: dict[str, Any] = {
        "data": {"files": [str(x) for x in data], "samples": len(tokens), "length": length, "seed": seed},
        **asdict(found),
    }
    result["hidden_cosine"] = result["hidden_cosine"] or None
    if compared.unpaired:
        result["hidden_cosine_missing"] = compared.unpaired
    footing = f"{len(tokens)} sample{'s' * (len(tokens) > 1)} of {length} tokens, seed {seed}"
    return result, [*_lines(found), *_cosines(found, compared), footing]


def _lines(found: Evaluation) -> list[str]:
    rows = [("perplexity", *_shown(found.perplexity, ".4g"), "")]
    if found.parent_perplexity and found.kl and found.top1:
        rows += [
            ("parent's perplexity", *_shown(found.parent_perplexity, ".4g"), ""),
            ("KL(parent || model)", *_shown(found.kl, ".3g"), "nats per token"),
            ("same likeliest token", *_shown(found.top1, ".2%"), ""),
        ]
    return _table(("", "value", "95% interval", ""), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Plain lines, the first `left` columns and the last flush left."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < left or i == len(header) - 1 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=WIDTH, color_system=None, markup=False, highlight=False, emoji=False)
    with console.capture() as text:
        console.print(table)
    return [line.rstrip() for line in text.get().splitlines()]


def _shown(x: Estimate, form: str) -> tuple[str, str]:
    """`4.21` and `[4.05, 4.39]`."""
    return f"{x.value:{form}}", "" if x.low is None else f"[{x.low:{form}}, {x.high:{form}}]"


def _cosines(found: Evaluation, compared: Compared) -> list[str]:
    """A line for each pair of layers, with a bar; or why there are none."""
    if compared.unpaired:
        return [f"cosine of hidden states: not known; {compared.unpaired}"]
    if not found.hidden_cosine:
        return []
    rows = [
        (
            f"{x.layer}",
            f"{x.parent_layer}",
            *_shown(x.cosine, ".4f"),
            "#" * max(0, round(BAR * x.cosine.value)),
        )
        for x in found.hidden_cosine
    ]
    return ["", *_table(("layer", "parent's", "hidden cosine", "95% interval", ""), rows, left=0), ""]


def in_tasks(
    model: Path,
    compared: Compared,
    seed: int,
    batch: int,
    *,
    tasks: tuple[str, ...],
    task_dir: Path | None,
    shots: int | None,
    limit: int | None,
) -> tuple[dict[str, Any], list[str]]:
    """The scores in tasks, of MODEL and then of the parent, as JSON and as lines."""
    from builder.harness import Model
    from builder.tasks import find_tasks, measure

    found = find_tasks(tasks, task_dir, shots)

    def scores(checkpoint: Checkpoint, directory: Path) -> dict[str, Any]:
        return measure(Model(checkpoint, directory, batch), found, limit=limit, seed=seed)

    ours = scores(compared.child, model)
    theirs = None
    if compared.parent is not None:
        assert compared.directory is not None, "where the parent is"
        theirs = scores(compared.parent, compared.directory)
    rows = [
        (task, name, _score(value), "" if theirs is None else _score(theirs[task][name]))
        for task, metrics in ours.items()
        for name, value in metrics.items()
    ]
    lines = _table(("task", "metric", "model", "" if theirs is None else "parent"), rows, left=2)
    setting = {"shots": shots, "limit": limit, "directory": None if task_dir is None else str(task_dir)}
    return {"tasks": ours, "parent_tasks": theirs, "task_settings": setting}, lines


def _score(value: dict[str, float | None]) -> str:
    """`0.512 +- 0.014`, the standard error."""
    error = "" if value["stderr"] is None else f" +- {value['stderr']:.3f}"
    return f"{value['value']:.3f}{error}"
