"""analyze: what the layers of a model do, measured on text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from builder.options import DIRECTORY, JSON, emit

if TYPE_CHECKING:
    from builder.analysis.record import Analysis
    from builder.plan import Plan


@click.command()
@click.argument("model", type=DIRECTORY)
@click.option(
    "--data",
    "files",
    type=DIRECTORY,
    multiple=True,
    required=True,
    help='Plain text, or .jsonl with a "text" a line; repeatable.',
)
@click.option("--samples", type=click.IntRange(1), default=32, show_default=True, help="Pieces of text.")
@click.option("--length", type=click.IntRange(2), default=256, show_default=True, help="Tokens of each.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Chooses the pieces.")
@click.option("--plan", "plan_file", type=DIRECTORY, help="A plan.yaml: the drops and groups to look at.")
@click.option("--drop-attention", metavar="LAYERS", help="Layers that will lose attention: 6,7,42-51.")
@click.option(
    "--group",
    "groups",
    multiple=True,
    metavar="FIRST-LAST",
    help="A run of FFNs to compare, fused and not; repeatable. Default: each run but its last layer.",
)
@click.option(
    "--widths",
    default="0.5,0.25",
    show_default=True,
    metavar="SHARES",
    help="Shares of an FFN's channels to try, 'none' for no such alternatives.",
)
@click.option(
    "--window", type=click.IntRange(2), default=4, show_default=True, help="Whole blocks in a window."
)
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Sequences at a time.")
@click.option("--stream", is_flag=True, help="Hold one layer's weights at a time, and all samples' states.")
@click.option(
    "--passes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Share the variants out over so many sweeps: less memory for their states, more runs of the model.",
)
@click.option("-o", "--output", type=DIRECTORY, required=True, help="The directory of the analysis.")
@JSON
def analyze(
    model: Path,
    files: tuple[Path, ...],
    samples: int,
    length: int,
    seed: int,
    output: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure on text what each layer of MODEL is needed for, and what fusing would cost.

    Writes analysis.json, which `plan` reads, channels.safetensors, plots and one page, analysis.html. Layer
    numbers are MODEL's. Under mpirun the samples are dealt over the processes.

    \b
    Examples:
        ffn-fusion analyze Llama-3.1-8B --data text.txt -o analysis
        ffn-fusion analyze Llama-3.1-70B --data text.jsonl --drop-attention 42-51 --stream -o analysis
        mpirun -n 4 ffn-fusion analyze MODEL --data text.txt --samples 64 -o analysis
    """
    widths = _shares(options["widths"])
    from builder import huggingface, text
    from builder.analysis import page
    from builder.analysis.record import Data
    from builder.analysis.study import Settings
    from builder.analysis.study import analyze as study
    from builder.team import Team

    team = Team.join()
    plan = team.together(lambda: _plan(options["plan_file"], options["drop_attention"], options["groups"]))
    team.first(lambda: page.check_output(output))
    checkpoint = team.together(lambda: huggingface.read(model))
    ids = team.first(lambda: text.read_samples(model, files, samples, length, checkpoint.architecture, seed))
    data = Data(files=tuple(map(str, files)), samples=len(ids), length=length, seed=seed, tokens=ids.numel())
    settings = Settings(
        batch=options["batch"],
        widths=widths,
        window=options["window"],
        stream=options["stream"],
        passes=options["passes"],
    )
    analysis, channels = study(checkpoint, ids, data, plan, settings, team=team, bar=_bar)
    team.first(lambda: page.write(analysis, channels, output, model.absolute().name))
    if team.rank == 0:
        emit(_result(analysis, output), as_json, _text(analysis, output, samples))


def _result(analysis: Analysis, output: Path) -> dict[str, Any]:
    from builder.analysis.summary import sentences

    whole = analysis.to_dict()
    names = ("model", "num_layers", "data", "baseline", "planned_drops", "groups", "windows", "evaluations")
    return {"output": str(output), **{n: whole[n] for n in names}, "summary": sentences(analysis)}


def _text(analysis: Analysis, output: Path, asked: int) -> str:
    from builder.analysis.summary import measured_on, sentences

    lines = [f"{output}: {analysis.num_layers} layers", measured_on(analysis)]
    if analysis.data.samples < asked:
        lines.append(f"The text has no more: {asked} samples were asked for.")
    return "\n".join(lines + sentences(analysis))


def _plan(plan_file: Path | None, dropped: str | None, groups: tuple[str, ...]) -> Plan:
    from builder import plan

    if plan_file is not None:
        if dropped or groups:
            raise click.UsageError("--plan says it all; leave out --drop-attention, --group")
        return plan.read(plan_file)
    return plan.Plan(
        drop_attention=plan.parse_layers(dropped) if dropped else (),
        fuse=tuple(plan.parse_group(group) for group in groups) or None,
    )


def _shares(text: str) -> tuple[float, ...]:
    """`0.5,0.25` as numbers between 0 and 1."""
    if text == "none":
        return ()
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.UsageError(f"--widths: {text!r} is not a list of shares; write 0.5,0.25") from None
    if not all(0 < share < 1 for share in shares):
        raise click.UsageError(f"--widths: {text!r} has a share outside 0 to 1; write 0.5,0.25")
    return shares


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None] | None]:
    """A bar over the blocks that are run, on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("analysing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bars:
        task = bars.add_task("", total=total)
        yield lambda count: bars.update(task, advance=count)
