"""The builder's commands: inspect, fuse, convert."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from builder.errors import UserError

if TYPE_CHECKING:
    from builder.plan import Plan

JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
DIRECTORY = click.Path(path_type=Path)


def emit(result: dict[str, Any], as_json: bool, text: str) -> None:
    """The result of a command on stdout: JSON for machines, else `text`."""
    click.echo(json.dumps(result, indent=2) if as_json else text)


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over bytes on stderr; call it with the bytes just done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bars:
        task = bars.add_task(label, total=total)
        yield lambda count: bars.update(task, advance=count)


def plan_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say what is dropped and fused."""
    options = (
        click.option("--plan", "plan_file", type=DIRECTORY, help="A plan.yaml with all of the below."),
        click.option("--drop-attention", metavar="LAYERS", help="Layers that lose attention: 6,7,42-51."),
        click.option(
            "--group",
            "groups",
            multiple=True,
            metavar="FIRST-LAST",
            help="Fuse this run into one layer; repeatable. Default: each run but its last layer.",
        ),
        click.option("--no-fuse", is_flag=True, help="Drop attention only."),
        click.option(
            "--norm",
            type=click.Choice(["fold", "last"]),
            help="Fold the members' norms into the weights (exact, the default), or give all the last one's.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def make_plan(
    plan_file: Path | None,
    drop_attention: str | None,
    groups: tuple[str, ...],
    no_fuse: bool,
    norm: str | None,
) -> Plan:
    """The plan that the options of `plan_options` describe."""
    from builder import plan

    if plan_file is not None:
        if drop_attention or groups or no_fuse or norm:
            raise click.UsageError(
                "--plan says it all; leave out --drop-attention, --group, --no-fuse, --norm"
            )
        return plan.read(plan_file)
    if no_fuse and groups:
        raise click.UsageError("--no-fuse and --group contradict each other")
    fuse = tuple(plan.parse_group(g) for g in groups) if groups else None
    return plan.Plan(
        drop_attention=plan.parse_layers(drop_attention) if drop_attention else (),
        fuse=() if no_fuse else fuse,
        norm=plan.parse_norm(norm or "fold"),
    )


@click.command()
@click.argument("model", type=DIRECTORY)
@click.option(
    "--tp", "tp_size", type=click.IntRange(1), default=8, show_default=True, help="Ranks to count for."
)
@click.option(
    "--kv-dtype",
    type=click.Choice(["float32", "bfloat16", "fp8"]),
    default="bfloat16",
    show_default=True,
    help="KV-cache elements to count.",
)
@JSON
def inspect(model: Path, tp_size: int, kv_dtype: str, as_json: bool) -> None:
    """Layers, widths, attention-free runs and costs of MODEL, a directory or a bare config.json.

    \b
    Example:
        ffn-fusion inspect Llama-3.1-8B --tp 8
    """
    from builder import huggingface

    architecture = huggingface.read_architecture(model)
    counts = architecture.counts(tp_size, {"float32": 4, "bfloat16": 2, "fp8": 1}[kv_dtype])
    runs = ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in counts["attention_free_runs"]) or "none"
    widths = ", ".join(f"{w:,}" for w in counts["ffn_widths"])
    text = "\n".join(
        (
            f"layers               {counts['layers']} ({counts['attention_layers']} with attention)",
            f"hidden size          {architecture.hidden_size:,}",
            f"heads                {architecture.num_attention_heads} x {architecture.head_dim}",
            f"FFN widths           {widths}",
            f"attention-free runs  {runs}",
            f"parameters           {counts['parameters']:,}",
            f"KV cache per token   {counts['kv_bytes_per_token']:,} bytes ({kv_dtype})",
            f"all-reduces          {counts['all_reduces_per_token']} per token at TP {tp_size}",
        )
    )
    emit({"model": str(model), **counts}, as_json, text)


@click.command()
@click.argument("model", type=DIRECTORY)
@plan_options
@click.option("-o", "--output", type=DIRECTORY, required=True, help="The fused Hugging Face directory.")
@JSON
def fuse(model: Path, output: Path, as_json: bool, **plan: Any) -> None:
    """Drop attention from MODEL, fuse the FFN runs that remain, write a nemotron-nas directory.

    Layer numbers are MODEL's. The last layer of a run is left out unless --group names it.

    \b
    Examples:
        ffn-fusion fuse Llama-3.1-70B --drop-attention 42-51 -o fused
        ffn-fusion fuse Llama-3.1-70B --drop-attention 42-51,53-70 --group 42-50 --group 53-69 -o fused
    """
    from builder import export, huggingface

    parent = huggingface.read(model)
    child = make_plan(**plan).apply(parent)
    if child.architecture == parent.architecture:
        raise UserError("fuse: nothing to drop and no run to fuse; name layers with --drop-attention")
    total = sum(x.num_bytes for x in child.tensors.values())
    with progress_bar("fusing", total) as progress:
        written = export.write(child, model, output, progress)
    mapping = [list(layer.members) for layer in written.layers]
    text = f"{output}: {len(parent.architecture.layers)} layers became {len(mapping)}"
    emit({"output": str(output), "layers": mapping, "parameters": written.num_parameters}, as_json, text)


@click.command()
@click.argument("model", type=DIRECTORY)
@plan_options
@click.option(
    "--tp", "tp_size", type=click.IntRange(1), default=1, show_default=True, help="Tensor-parallel ranks."
)
@click.option(
    "--pp", "pp_size", type=click.IntRange(1), default=1, show_default=True, help="Pipeline stages."
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Weights of the checkpoint; auto is the model's.",
)
@click.option("-o", "--output", type=DIRECTORY, required=True, help="The TensorRT-LLM checkpoint directory.")
@JSON
def convert(
    model: Path, tp_size: int, pp_size: int, dtype: str, output: Path, as_json: bool, **plan: Any
) -> None:
    """Write MODEL as a sharded TensorRT-LLM checkpoint, in one pass, fusing on the way if asked.

    Without --plan, --drop-attention or --group the layers stay as they are.

    \b
    Examples:
        ffn-fusion convert fused --tp 8 -o checkpoint
        ffn-fusion convert Llama-3.1-70B --drop-attention 42-51 --tp 8 -o checkpoint
    """
    from builder import huggingface, trtllm

    parent = huggingface.read(model)
    asked = any(plan[name] for name in ("plan_file", "drop_attention", "groups"))
    child = make_plan(**plan).apply(parent) if asked else parent
    target = None if dtype == "auto" else dtype
    total = sum(x.num_bytes for x in child.tensors.values())
    with progress_bar("converting", total) as progress:
        written = trtllm.convert(
            child, output, tp_size=tp_size, pp_size=pp_size, dtype=target, progress=progress
        )
    text = f"{output}: {len(written.layers)} layers for TP {tp_size}, PP {pp_size}"
    result = {"output": str(output), "layers": len(written.layers), "tp_size": tp_size, "pp_size": pp_size}
    emit(result, as_json, text)


COMMANDS = (inspect, fuse, convert)
