"""evaluate: how good a model is on text, and how near to its parent."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import click

from builder.errors import UserError
from builder.options import (
    DIRECTORY,
    JSON,
    PARALLEL_BLOCKS,
    asked_plan,
    emit,
    plan_options,
)


@click.command()
@click.argument("model", type=DIRECTORY)
@click.option(
    "--data",
    type=DIRECTORY,
    multiple=True,
    help='Text, or .jsonl with "text" in each line; repeatable.',
)
@click.option(
    "--parent", type=DIRECTORY, help="The model to compare with. Default: MODEL before the plan's changes."
)
@click.option("--task", "tasks", multiple=True, help="A task of lm-eval, such as mmlu; repeatable.")
@click.option("--task-dir", type=DIRECTORY, help="Task files beside lm-eval's own.")
@click.option("--shots", type=click.IntRange(0), help="Examples before each question. Default: the task's.")
@click.option("--limit", type=click.IntRange(1), help="Questions of each task, at most. Default: all.")
@plan_options
@PARALLEL_BLOCKS
@click.option("--samples", type=click.IntRange(1), default=64, show_default=True, help="At most so many.")
@click.option("--length", type=click.IntRange(2), default=256, show_default=True, help="Tokens of each.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of what is drawn.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Samples at once.")
@JSON
def evaluate(
    model: Path, data: tuple[Path, ...], parent: Path | None, seed: int, as_json: bool, **options: Any
) -> None:
    """Perplexity of MODEL on text and, beside a parent, KL(parent || MODEL), the same likeliest tokens and
    the cosine of hidden states; and its scores in tasks of lm-eval.

    MODEL may be changed on the way, by a plan or its options, without being written. Figures of text are
    means over samples with 95% bootstrap intervals; the reference decoder runs in float32, a block at a time.
    For tasks it holds all weights, of a parent after those of MODEL.

    \b
    Examples:
        ffn-fusion evaluate Llama-3.1-8B --data text.txt
        ffn-fusion evaluate fused --parent Llama-3.1-8B --data text.txt
        ffn-fusion evaluate Llama-3.1-8B --drop-attention 20-24 --data text.txt
        ffn-fusion evaluate Llama-3.1-8B --parallel-blocks 12-15 --data text.txt --json
        ffn-fusion evaluate fused --parent Llama-3.1-8B --task mmlu --task gsm8k --limit 200
    """
    plan = asked_plan(options)
    wanted = {name: options.pop(name) for name in ("tasks", "task_dir", "shots", "limit")}
    if not (data or wanted["tasks"]):
        raise click.UsageError("give --data, --task, or both")
    if not wanted["tasks"] and any(x is not None for x in list(wanted.values())[1:]):
        raise click.UsageError("--task-dir, --shots and --limit belong to --task")
    if wanted["tasks"]:
        _check_harness()
    from builder.cli import scores
    from builder.compared import read

    compared = read(model, parent, plan)
    sizes = {name: options[name] for name in ("samples", "length", "batch")}
    architecture = compared.child.architecture
    result: dict[str, Any] = {
        "model": str(model),
        "parent": None if compared.directory is None else str(compared.directory),
        "plan": plan.to_dict() if plan else None,
        "layers": len(architecture.layers),
        "parallel_blocks": [list(window) for window in architecture.parallel],
        "basis": "measured",
    }
    lines = [f"{model}: {len(architecture.layers)} layers{', changed as asked' if plan else ''}"]
    if data:
        found, told = scores.on_text(model, data, compared, seed, **sizes)
        result |= found
        lines += told
    if wanted["tasks"]:
        found, told = scores.in_tasks(model, compared, seed, sizes["batch"], **wanted)
        result |= found
        lines += told
    emit(result, as_json, "\n".join(lines))


def _check_harness() -> None:
    """Raise UserError where lm-eval is not installed; its bars are for terminals."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm_eval is missing; pip install 'ffn-fusion[lm-eval]'")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it once, and torch imports tqdm
