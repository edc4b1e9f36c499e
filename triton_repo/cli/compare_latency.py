"""The compare-latency command."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from builder.errors import UserError
from builder.options import DIRECTORY, JSON, emit

if TYPE_CHECKING:
    from triton_repo.client import Endpoint


@click.command("compare-latency")
@click.argument("baseline")
@click.argument("candidate")
@click.option(
    "-o", "--output", type=DIRECTORY, required=True, help="Directory for report.json and report.html."
)
@click.option(
    "--tokenizer", type=DIRECTORY, help="Hugging Face directory with tokenizer.json; engines need it."
)
@click.option("--prompts", type=DIRECTORY, help="Text file with one prompt a line. Default: a few built in.")
@click.option("--max-tokens", type=click.IntRange(2), default=64, show_default=True)
@click.option("--concurrency", default="1,2,4", show_default=True, help="Requests in flight, a list.")
@click.option(
    "--rounds", type=click.IntRange(2), default=8, show_default=True, help="Interleaved rounds a level."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the bootstrap.")
@JSON
def compare_latency(
    baseline: str,
    candidate: str,
    output: Path,
    tokenizer: Path | None,
    prompts: Path | None,
    max_tokens: int,
    concurrency: str,
    rounds: int,
    seed: int,
    as_json: bool,
) -> None:
    """Measure CANDIDATE against BASELINE through Triton: two engines, or two URLs of running servers.

    \b
    Examples:
        ffn-fusion compare-latency engines/parent engines/fused --tokenizer model -o report
        ffn-fusion compare-latency http://a:8000 http://b:8000 -o report
    """
    from rich.console import Console

    from engines import manifest
    from triton_repo import compare, report

    texts = read_prompts(prompts) if prompts else list(compare.DEFAULT_PROMPTS)
    levels = parse_concurrency(concurrency)
    report.check_output(output)
    with ExitStack() as stack:
        ends = [_endpoint(stack, given, tokenizer) for given in (baseline, candidate)]
        facts = [None if _is_url(x) else manifest.read(Path(x)).counts() for x in (baseline, candidate)]
        status = stack.enter_context(Console(stderr=True).status("warming up"))
        comparison = compare.compare(
            *ends,
            prompts=texts,
            max_tokens=max_tokens,
            concurrency=levels,
            rounds=rounds,
            seed=seed,
            baseline_facts=facts[0],
            candidate_facts=facts[1],
            progress=status.update,
        )
    report.write_report(comparison, output)
    if as_json:
        emit(comparison.to_dict(), True, "")
        return
    report.print_table(comparison, Console())
    click.echo(f"{output / 'report.html'}")


def parse_concurrency(text: str) -> tuple[int, ...]:
    """`1,2,4` as numbers."""
    levels = tuple(int(part) if part.strip().isdecimal() else 0 for part in text.split(","))
    if min(levels) < 1 or len(set(levels)) != len(levels):
        raise click.BadParameter(
            f"{text!r} is no list of unlike positive numbers", param_hint="--concurrency"
        )
    return levels


def read_prompts(file: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text; give a text file with one prompt a line") from None
    if not lines:
        raise UserError(f"{file}: empty; give one prompt a line")
    return lines


def _is_url(given: str) -> bool:
    return given.startswith(("http://", "https://"))


def _endpoint(stack: ExitStack, given: str, tokenizer: Path | None) -> Endpoint:
    """A running endpoint: the URL given, or a server started for the engine given."""
    import tempfile

    from triton_repo.client import Endpoint
    from triton_repo.repository import write_repository
    from triton_repo.server import Server

    if _is_url(given):
        return Endpoint(given.rstrip("/"))
    if tokenizer is None:
        raise click.UsageError("engines need --tokenizer DIR")
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    write_repository(Path(given), tokenizer, scratch / "repository")
    return Endpoint(stack.enter_context(Server(scratch / "repository")).url)
