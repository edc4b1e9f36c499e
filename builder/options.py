"""What the commands' options have in common, and how results and progress are shown."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from builder.plan import Plan

JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
DIRECTORY = click.Path(path_type=Path)


class Finite(click.FloatRange):
    """A number within bounds that is neither infinite nor NaN, which compares false with every bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def emit(result: dict[str, Any], as_json: bool, text: str) -> None:
    """The result of a command on stdout: JSON for machines, else `text`."""
    click.echo(json.dumps(result, indent=2) if as_json else text)


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int], None] | None]:
    """A bar over bytes on stderr, where that is a terminal; call it with the bytes just done."""
    if not sys.stderr.isatty():
        yield None
        return
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
        click.option("--drop-ffn", metavar="LAYERS", help="Layers that lose their FFN."),
        click.option(
            "--kv-heads",
            multiple=True,
            metavar="LAYERS=N",
            help="Pool these layers' KV heads to N: 12-15=2; repeatable.",
        ),
        click.option(
            "--group",
            "groups",
            multiple=True,
            metavar="FIRST-LAST",
            help="Fuse this run into one layer; repeatable. Default: each run but its last layer.",
        ),
        click.option("--no-fuse", is_flag=True, help="Fuse nothing."),
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
    drop_ffn: str | None,
    kv_heads: tuple[str, ...],
    groups: tuple[str, ...],
    no_fuse: bool,
    norm: str | None,
    parallel_blocks: str | None = None,
) -> Plan:
    """The plan that the options of `plan_options`, and `PARALLEL_BLOCKS`, describe."""
    from builder import plan

    if plan_file is not None:
        if drop_attention or drop_ffn or kv_heads or groups or no_fuse or norm:
            raise click.UsageError(
                "--plan says it all; leave out --drop-attention, --drop-ffn, --kv-heads, --group, "
                "--no-fuse, --norm"
            )
        if parallel_blocks is not None:
            raise click.UsageError("--plan says it all; write --parallel-blocks into it as `parallel`")
        return plan.read(plan_file)
    if no_fuse and groups:
        raise click.UsageError("--no-fuse and --group contradict each other")
    fuse = tuple(plan.parse_group(g) for g in groups) if groups else None
    return plan.Plan(
        drop_attention=plan.parse_layers(drop_attention) if drop_attention else (),
        drop_ffn=plan.parse_layers(drop_ffn) if drop_ffn else (),
        kv_heads=tuple(pair for text in kv_heads for pair in plan.parse_kv_heads(text)),
        fuse=() if no_fuse else fuse,
        norm=plan.parse_norm(norm or "fold"),
        parallel=() if parallel_blocks is None else plan.parse_windows(parallel_blocks),
    )


def asked_plan(options: Mapping[str, Any]) -> Plan | None:
    """The plan of `plan_options` and `PARALLEL_BLOCKS`; None where none of them asks for a change.

    Blocks in parallel alone fuse nothing.
    """
    changes = ("plan_file", "drop_attention", "drop_ffn", "kv_heads", "groups")
    names = (*changes, "no_fuse", "norm", "parallel_blocks")
    given = {name: options[name] for name in names if name in options}
    if any(given[name] for name in changes):
        return make_plan(**given)
    if given["norm"]:
        raise click.UsageError("--norm says how to fuse; name what to fuse, with --group or --drop-attention")
    return make_plan(**{**given, "no_fuse": True}) if given.get("parallel_blocks") is not None else None


PARALLEL_BLOCKS = click.option(
    "--parallel-blocks",
    metavar="FIRST-LAST,...",
    help="Windows of whole blocks that all read the window's input: 38-41,71-74.",
)


def random_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that put random weights in the place of a model's."""
    options = (
        click.option(
            "--random-weights",
            is_flag=True,
            help="MODEL is a config.json, or a directory without weights: make some up, to measure latency.",
        ),
        click.option("--seed", type=click.IntRange(0), help="Of the random weights. Default: 0."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def random_seed(random_weights: bool, seed: int | None) -> int | None:
    """The seed of `random_options`, None where MODEL has its own weights."""
    if not random_weights and seed is not None:
        raise click.UsageError("--seed is for --random-weights")
    return (seed or 0) if random_weights else None


THREADS = click.option(
    "--threads",
    type=click.IntRange(1),
    help="Threads that read and write; default: the cores + 1, 16 at most.",
)


def target_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say what checkpoint is wanted."""
    options = (
        click.option("--tp", "tp_size", type=click.IntRange(1), default=1, help="Tensor-parallel ranks."),
        click.option("--pp", "pp_size", type=click.IntRange(1), default=1, help="Pipeline stages."),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            default="auto",
            show_default=True,
            help="Weights of the checkpoint; auto is the model's.",
        ),
        click.option(
            "--no-fused-mlp",
            is_flag=True,
            help="The engine will be built with use_fused_mlp disabled: FFNs may be twice as wide.",
        ),
        click.option(
            "--quant",
            type=click.Choice(["fp8"]),
            help="e4m3 weights and scales; needs --calib. DeciLM has no INT8 or INT4 in TensorRT-LLM.",
        ),
        click.option("--kv-cache", type=click.Choice(["fp8"]), help="Scales for an FP8 KV cache."),
        click.option(
            "--calib", type=DIRECTORY, multiple=True, help="Text file for activation scales; repeatable."
        ),
        click.option("--calib-samples", type=click.IntRange(1), default=128, show_default=True),
        click.option("--calib-length", type=click.IntRange(2), default=512, show_default=True),
    )
    for option in reversed(options):
        command = option(command)
    return command
