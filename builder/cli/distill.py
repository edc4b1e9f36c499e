"""distill: a fused student learns its parent's hidden states and logits again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from builder.errors import UserError
from builder.options import DIRECTORY, JSON, Finite, emit

POSITIVE = Finite(min=0, min_open=True)
SHARE = Finite(0, 1)
WEIGHT = Finite(0)
Command = Callable[..., None]


def _together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    return lambda command: functools.reduce(lambda found, option: option(found), reversed(options), command)


# What a stage of --stages may set for itself.
_stage_options = _together(
    click.option("--tokens", metavar="N", help="Of the training, such as 2e6; without --stages."),
    click.option("--context", metavar="N", help="Tokens of a sequence; without --stages."),
    click.option(
        "--loss",
        type=click.Choice(["distill", "pretrain", "supervised"]),
        default="distill",
        show_default=True,
        help="From the parent, of the next token, or of the next token in responses.",
    ),
    click.option(
        "--batch-tokens", metavar="N", default="65536", show_default=True, help="Of a step, all ranks'."
    ),
    click.option("--learning-rate", type=POSITIVE, default=1e-4, show_default=True, help="Its peak."),
    click.option("--warmup", type=SHARE, default=0.05, show_default=True, help="Share of the steps."),
    click.option(
        "--final",
        type=SHARE,
        default=0.1,
        show_default=True,
        help="Share of the learning rate at the end.",
    ),
    click.option(
        "--cosine-weight",
        "cosine",
        type=WEIGHT,
        default=1.0,
        show_default=True,
        help="Of the hidden states' cosine distance.",
    ),
    click.option(
        "--kl-weight",
        "kl",
        type=WEIGHT,
        default=1.0,
        show_default=True,
        help="Of KL(parent || student) of the logits.",
    ),
    click.option("--temperature", type=POSITIVE, default=1.0, show_default=True, help="Of the logits."),
    click.option(
        "--separate-documents",
        is_flag=True,
        help="Documents that share a sequence do not see each other; positions begin anew at each.",
    ),
)


# How it is computed.
_settings_options = _together(
    click.option(
        "--micro-batch",
        type=click.IntRange(1),
        default=8,
        show_default=True,
        help="Sequences at once on a rank; a step's others are accumulated.",
    ),
    click.option("--clip", type=POSITIVE, default=1.0, show_default=True, help="The gradient's norm."),
    click.option("--weight-decay", type=WEIGHT, default=0.0, show_default=True, help="Of matrices."),
    click.option("--bf16", is_flag=True, help="Compute in bfloat16 (autocast); weights stay float32."),
    click.option(
        "--activation-checkpointing",
        "recompute",
        is_flag=True,
        help="Compute blocks a second time in the backward pass, for less memory.",
    ),
    click.option(
        "--checkpoint-every", type=click.IntRange(1), default=500, show_default=True, metavar="STEPS"
    ),
)


# Where the parent's logits are kept, and how.
_store_options = _together(
    click.option(
        "--parent-logits",
        type=DIRECTORY,
        metavar="DIR",
        help="Compute the parent's logits first, once, and keep them here for other trainings too.",
    ),
    click.option(
        "--top-k",
        type=click.IntRange(1),
        help="Tokens whose log-probabilities are kept, beside that of all others together. Default: 64.",
    ),
    click.option(
        "--log-probs",
        type=click.Choice(["float16", "float32"]),
        help="How they are kept. Default: float16.",
    ),
)


@click.command()
@click.option("--parent", type=DIRECTORY, required=True, help="The model that the student was made from.")
@click.option("--student", type=DIRECTORY, required=True, help="What `ffn-fusion fuse` wrote.")
@click.option(
    "--data",
    type=DIRECTORY,
    multiple=True,
    help='Text, .jsonl with "text" in each line, or one .npy of token numbers; repeatable.',
)
@click.option("-o", "--output", type=DIRECTORY, required=True, help="The trained Hugging Face directory.")
@click.option("--stages", "stages_file", type=DIRECTORY, help="A YAML file of stages.")
@_stage_options
@_settings_options
@_store_options
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the order of the data."
)
@click.option("--checkpoint-dir", type=DIRECTORY, help="Default: OUTPUT.training; removed when all is done.")
@click.option("--keep-checkpoints", is_flag=True, help="Leave the checkpoint directory.")
@click.option("--log", "log_file", type=DIRECTORY, help="JSON, a line for each step. Default: OUTPUT.jsonl.")
@click.option("--plot", type=DIRECTORY, help="A picture of the curves, such as curve.png.")
@JSON
def distill(
    parent: Path,
    student: Path,
    data: tuple[Path, ...],
    output: Path,
    stages_file: Path | None,
    seed: int,
    checkpoint_dir: Path | None,
    keep_checkpoints: bool,
    log_file: Path | None,
    plot: Path | None,
    parent_logits: Path | None,
    top_k: int | None,
    log_probs: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a STUDENT that `fuse` made until it does as its PARENT again; write a nemotron-nas directory.

    The loss is the cosine distance of hidden states, each student layer's to the last parent layer that it
    holds, plus KL(parent || student) of the logits. The same command again goes on from the newest
    checkpoint. Under torchrun the weights are cut over all ranks (FSDP2).

    \b
    A YAML of stages: {tokens, context} and any of batch_tokens, learning_rate, warmup, final, loss, cosine,
    kl, temperature, separate_documents, data:
        stages:
          - {tokens: 54e9, context: 8192}
          - {tokens: 5e9, context: 16384}

    \b
    Examples:
        ffn-fusion distill --parent P --student fused --data text.jsonl --tokens 2e6 --context 1024 -o out
        ffn-fusion distill --parent P --student fused --data text.jsonl --stages stages.yaml --bf16 -o out
        ffn-fusion distill --parent P --student fused ... --parent-logits logits --cosine-weight 0 -o out
        torchrun --nproc-per-node 8 -m ffn_fusion distill --parent P --student fused ... -o out
    """
    names = ("tokens", "context")
    settings = {name: options.pop(name) for name in SETTINGS}
    if stages_file is not None and any(options[x] is not None for x in names):
        raise click.UsageError("--stages says it all; leave out --tokens and --context")
    if stages_file is None and any(options[x] is None for x in names):
        raise click.UsageError("give --tokens and --context, or --stages")
    if parent_logits is None and (top_k is not None or log_probs is not None):
        raise click.UsageError("--top-k and --log-probs are for --parent-logits")
    from builder.training.distillation import Job
    from builder.training.distillation import distill as train
    from builder.training.processes import rank
    from builder.training.trainer import Settings

    try:
        result = train(
            Job(
                parent=parent,
                student=student,
                output=output,
                stages=_stages(stages_file, options, data),
                settings=Settings(**settings),
                checkpoint_dir=checkpoint_dir or _beside(output, ".training"),
                log=log_file or _beside(output, ".jsonl"),
                plot=plot,
                seed=seed,
                keep_checkpoints=keep_checkpoints,
                store=_store(parent_logits, top_k, log_probs),
            )
        )
    except UserError:
        if rank():
            raise SystemExit(1) from None  # rank 0 says why
        raise
    if rank() == 0:
        emit(result, as_json, _text(result))


SETTINGS = ("micro_batch", "clip", "weight_decay", "bf16", "recompute", "checkpoint_every")


def _beside(output: Path, ending: str) -> Path:
    return output.absolute().with_name(output.absolute().name + ending)


def _stages(file: Path | None, options: dict[str, Any], data: tuple[Path, ...]) -> Any:
    """The stages, each with its data."""
    from builder.training import stages

    given = tuple(str(x) for x in data)
    options["batch_tokens"] = stages.integer("batch_tokens", options["batch_tokens"])
    if file is not None:
        common = {k: x for k, x in options.items() if k not in ("tokens", "context")}
        found = stages.read(file, common)
    else:
        sizes = {name: stages.integer(name, options[name]) for name in ("tokens", "context")}
        found = (stages.Stage(**{**options, **sizes}),)
    found = tuple(stages.with_data(x, given) for x in found)
    for number, stage in enumerate(found, start=1):
        if not stage.data:
            raise click.UsageError(f"stage {number} has no data; give --data, or `data` in its stage")
    return found


def _store(directory: Path | None, top_k: int | None, dtype: str | None) -> Any:
    from builder.training.stored import Store

    return directory and Store(directory=directory, top_k=top_k or 64, dtype=dtype or "float16")


def _text(result: dict[str, Any]) -> str:
    first, last = result["first"], result["last"]
    terms = [x for x in ("cosine", "kl", "lm") if last[x] is not None]
    lines = [f"{result['output']}: {result['steps']:,} steps, {result['tokens']:,} tokens"]
    lines.append(f"{result['tokens_per_second']:,.0f} tokens/s on {result['ranks']} ranks")
    for name in ("loss", *terms):
        before = "" if first[name] is None else f"{first[name]:.4f} -> "
        lines.append(f"{name:8}{before}{last[name]:.4f}")
    if result["parent_logits"]:
        lines.append(
            "{directory}: top {top_k}, {bytes_per_token} bytes a token, {bytes:,} bytes; "
            "{computed:,} of {steps:,} steps computed now".format(**result["parent_logits"])
        )
    return "\n".join(lines)
