"""evaluate: how good a model is on text, and how near to its parent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from builder.options import (
    DIRECTORY,
    JSON,
    PARALLEL_BLOCKS,
    asked_plan,
    emit,
    plan_options,
    progress_bar,
)

if TYPE_CHECKING:
    from builder.checkpoint import Checkpoint
    from builder.evaluation import Estimate, Evaluation
    from builder.plan import Plan


@click.command()
@click.argument("model", type=DIRECTORY)
@click.option(
    "--data",
    type=DIRECTORY,
    multiple=True,
    required=True,
    help='Text, or .jsonl with "text" in each line; repeatable.',
)
@click.option(
    "--parent", type=DIRECTORY, help="The model to compare with. Default: MODEL before the plan's changes."
)
@plan_options
@PARALLEL_BLOCKS
@click.option("--samples", type=click.IntRange(1), default=64, show_default=True, help="At most so many.")
@click.option("--length", type=click.IntRange(2), default=256, show_default=True, help="Tokens of each.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of what is drawn.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Samples at once.")
@JSON
def evaluate(
    model: Path,
    data: tuple[Path, ...],
    parent: Path | None,
    samples: int,
    length: int,
    seed: int,
    batch: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Perplexity of MODEL on text and, beside a parent, KL(parent || MODEL) and the same likeliest tokens.

    MODEL may be changed on the way, by a plan or its options, without being written. All figures are means
    over samples with 95% bootstrap intervals. The reference decoder runs in float32, a block at a time.

    \b
    Examples:
        ffn-fusion evaluate Llama-3.1-8B --data text.txt
        ffn-fusion evaluate fused --parent Llama-3.1-8B --data text.txt
        ffn-fusion evaluate Llama-3.1-8B --drop-attention 20-24 --data text.txt
        ffn-fusion evaluate Llama-3.1-8B --parallel-blocks 12-15 --data text.txt --json
    """
    plan = asked_plan(options)
    child, against, other = _read(model, parent, plan)
    from dataclasses import asdict

    from builder.evaluation import score, summarize
    from builder.text import read_samples

    architecture = child.architecture
    tokens = read_samples(model, data, samples, length, architecture, seed)
    weights = [x for c in (child, other) if c for n, x in c.tensors.items() if n.startswith("layers.")]
    with progress_bar("evaluating", sum(x.num_bytes for x in weights)) as progress:
        found = summarize(score(child, tokens, other, batch=batch, progress=progress), seed)
    result = {
        "model": str(model),
        "parent": None if against is None else str(against),
        "plan": plan.to_dict() if plan else None,
        "layers": len(architecture.layers),
        "parallel_blocks": [list(window) for window in architecture.parallel],
        "data": {"files": [str(x) for x in data], "samples": len(tokens), "length": length, "seed": seed},
        "basis": "measured",
        **asdict(found),
    }
    heading = f"{model}: {len(architecture.layers)} layers{', changed as asked' if plan else ''}"
    intervals = "; 95% intervals over samples" if len(tokens) > 1 else ""
    footing = f"{len(tokens)} sample{'s' * (len(tokens) > 1)} of {length} tokens, seed {seed}{intervals}"
    emit(result, as_json, "\n".join((heading, *_lines(found), footing)))


def _read(
    model: Path, parent: Path | None, plan: Plan | None
) -> tuple[Checkpoint, Path | None, Checkpoint | None]:
    """MODEL as the plan changes it, the directory of its parent, and the parent; None without one."""
    from builder import huggingface, tokenizer

    source = huggingface.read(model)
    child = plan.apply(source) if plan else source
    if parent is not None:
        if (parent / "tokenizer.json").is_file():
            tokenizer.check_same(parent, model)
        return child, parent, huggingface.read(parent)
    return (child, model, source) if plan else (child, None, None)


def _lines(found: Evaluation) -> list[str]:
    lines = [f"perplexity            {_shown(found.perplexity, '.4g')}"]
    if found.parent_perplexity and found.kl and found.top1:
        lines += [
            f"parent's perplexity   {_shown(found.parent_perplexity, '.4g')}",
            f"KL(parent || model)   {_shown(found.kl, '.3g')} nats per token",
            f"same likeliest token  {_shown(found.top1, '.2%')}",
        ]
    return lines


def _shown(x: Estimate, form: str) -> str:
    """`4.21 [4.05, 4.39]`."""
    interval = "" if x.low is None else f" [{x.low:{form}}, {x.high:{form}}]"
    return f"{x.value:{form}}{interval}"
