"""profile: what the parts of a model cost on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from builder.errors import UserError
from builder.options import DIRECTORY, JSON, emit

if TYPE_CHECKING:
    from builder.architecture import Architecture
    from builder.search.measured import Table
    from engines.profiling import Wanted


@click.command()
@click.argument("model", type=DIRECTORY)
@click.option("--tp", "tp_size", type=click.IntRange(1), default=1, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences at once.")
@click.option(
    "--context", type=click.IntRange(1), default=512, show_default=True, help="Tokens of each sequence."
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Of weights and KV cache; auto is the model's.",
)
@click.option("--quant", type=click.Choice(["int8", "fp8"]), help="Weights in 8 bits, as of build-engine.")
@click.option(
    "--kv-heads",
    "kv_heads",
    metavar="N,N",
    help="KV heads of attentions to measure. Default: those of the model.",
)
@click.option("--widths", metavar="N,N", help="FFN widths to measure. Default: a ladder to --max-width.")
@click.option(
    "--max-width", type=click.IntRange(1), help="End of the ladder. Default: 4 x the model's widest FFN."
)
@click.option(
    "--copies", type=click.IntRange(1), default=4, show_default=True, help="Layers more than the base has."
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Through all engines.")
@click.option("--steps", type=click.IntRange(2), default=32, show_default=True, help="Timed in a round.")
@click.option("-o", "--output", type=DIRECTORY, required=True, help="The table, a JSON file.")
@JSON
def profile(
    model: Path,
    kv_heads: str | None,
    widths: str | None,
    max_width: int | None,
    dtype: str,
    output: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the parts of MODEL on this machine: attention by KV heads, FFN by width, and the rest.

    Small embedded engines with random weights of MODEL's sizes are built and decode in turns. MODEL may be
    a bare config.json. `estimate --profile` and `plan --profile` read the table.

    \b
    Examples:
        ffn-fusion profile model --tp 2 --context 512 -o table.json
        ffn-fusion profile config.json --device cuda --kv-heads 8,4 --max-width 65536 -o table.json
        ffn-fusion estimate model --profile table.json
    """
    from builder import huggingface
    from builder.search import measured
    from engines.embedded.session import EngineError
    from engines.profiling import profile as run

    _check_output(output)
    declared = huggingface.declared(model, None if dtype == "auto" else dtype)
    wanted = _wanted(declared.architecture, declared.dtype, (kv_heads, widths), max_width, options)
    try:
        with TemporaryDirectory() as work:
            table = run(declared.architecture, wanted, Path(work), digest=declared.digest, report=_report)
    except EngineError as error:
        raise UserError(f"{model}: {error}") from error
    if table.noise > min(seconds for _, seconds in (*table.attention, *table.ffn)):
        _report(
            "warning: rounds differ by more than the smallest part takes; measure again on a quiet machine"
        )
    measured.write(table, output)
    emit({"output": str(output), **table.to_dict()}, as_json, _describe(table, output))


def _check_output(output: Path) -> None:
    """Before the work rather than after it."""
    if not output.parent.is_dir():
        raise UserError(f"{output.parent}: no such directory; create it first")
    if output.exists():
        raise UserError(f"{output}: exists; remove it or choose another output file")


def _wanted(
    architecture: Architecture,
    dtype: str,
    given: tuple[str | None, str | None],
    max_width: int | None,
    options: dict[str, Any],
) -> Wanted:
    """The given numbers of KV heads and widths, or those of the model and a ladder of widths."""
    from builder.plan import parse_layers
    from engines.profiling import Wanted, base_layers, ladder, rounded

    widths = {x.intermediate_size for x in architecture.layers if x.intermediate_size}
    heads = {x.num_key_value_heads for x in architecture.layers if x.num_key_value_heads}
    if not widths or not heads:
        raise UserError("profile: the model has no attention or no FFN at all; give one that has both")
    kv_heads, wide = given
    if wide is not None:
        if max_width is not None:
            raise click.UsageError("--max-width ends the ladder that --widths replaces; give one of them")
        rungs = rounded(parse_layers(wide), options["tp_size"])
    else:
        rungs = ladder(sorted(widths), max_width or 4 * max(widths), options["tp_size"])
    chosen = sorted(heads if kv_heads is None else parse_layers(kv_heads))
    wanted = Wanted(kv_heads=tuple(chosen), widths=rungs, dtype=dtype, **options)
    return replace(wanted, layers=base_layers(architecture, wanted))


def _describe(table: Table, output: Path) -> str:
    quant = f" with {table.quant} weights" if table.quant else ""
    lines = [
        f"{output}: measured on this machine's {table.device}, TP {table.tp_size}, batch {table.batch}, "
        f"context {table.context}, {table.dtype}{quant}; microseconds of a decode step",
        *(f"attention, {heads:,} KV heads {seconds * 1e6:14.1f}" for heads, seconds in table.attention),
        *(f"FFN, width {width:<12,} {seconds * 1e6:14.1f}" for width, seconds in table.ffn),
        f"outside the layers {table.outside * 1e6:18.1f}",
        f"largest spread between rounds {table.noise * 1e6:7.1f}",
    ]
    return "\n".join(lines)


def _report(line: str) -> None:
    click.echo(line, err=True)
