"""The compare-latency command."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from builder.errors import UserError
from builder.options import DIRECTORY, JSON, emit
from triton_repo.cli.compare_options import (
    command_line,
    own_options,
    parse_concurrency,
    parse_lengths,
    quality_models,
    read_prompts,
)
from triton_repo.cli.compare_sides import elsewhere, endpoint, facts, is_url

if TYPE_CHECKING:
    from triton_repo.compare import Comparison

TRITON, BENCH = "triton", "trtllm-bench"
DEFAULTS = {TRITON: {"concurrency": "1,2,4", "rounds": 8}, BENCH: {"concurrency": "1,32", "rounds": 5}}
# Options of one way of measuring only.
OWN = ("rate", "slo", "natural_lengths", "lengths")  # of the built-in load generator
QUALITY = ("data", "baseline_model", "candidate_model")
ONLY = {
    TRITON: ("prompts", "model", "load_generator", *OWN, *QUALITY),
    BENCH: ("input_tokens",),
}


@click.command("compare-latency")
@click.argument("baseline")
@click.argument("candidate")
@click.option(
    "-o", "--output", type=DIRECTORY, required=True, help="Directory for report.json and report.html."
)
@click.option(
    "--via",
    type=click.Choice([TRITON, BENCH]),
    default=TRITON,
    show_default=True,
    help="trtllm-bench measures TensorRT-LLM's engine directories on this machine, without a server.",
)
@click.option(
    "--tokenizer", type=DIRECTORY, help="Hugging Face directory of the model; engines and aiperf need it."
)
@click.option("--prompts", type=DIRECTORY, help="Text file with one prompt a line. Default: a few built in.")
@click.option("--model", help="Model to ask at a URL. Default: ensemble, or tensorrt_llm of the LLM API.")
@click.option(
    "--load-generator",
    type=click.Choice(["built-in", "aiperf"]),
    help="Who sends requests to Triton. Default: built-in.",
)
@click.option("--max-tokens", type=click.IntRange(2), default=64, show_default=True)
@click.option(
    "--concurrency", help="Requests in flight, a list. Default: 1,2,4; trtllm-bench: 1,32. GPUs: try 1,32."
)
@click.option(
    "--rounds", type=click.IntRange(2), help="Interleaved rounds a level. Default: 8; trtllm-bench: 5."
)
@click.option(
    "--input-tokens", type=click.IntRange(1), help="Random prompt tokens of trtllm-bench. Default: 128."
)
@click.option(
    "--num-requests",
    type=click.IntRange(1),
    help="Of a round. Default: every prompt and two a client; --rate: 32; trtllm-bench: 32 or 4 a client.",
)
@click.option("--rate", help="Open loop: requests/s that come as they please, a list, for --concurrency.")
@click.option("--slo", help="Count good requests/s: ttft=200,inter_token=30,latency=2000 in ms, some or all.")
@click.option("--natural-lengths", is_flag=True, default=None, help="Let answers end by themselves.")
@click.option("--lengths", help="Also measure prompts and answers of these tokens, IN:OUT: 32:64,512:64.")
@click.option("--data", type=DIRECTORY, multiple=True, help="Text: the page tells the quality as well.")
@click.option("--baseline-model", type=DIRECTORY, help="--data: the Hugging Face directory of BASELINE.")
@click.option("--candidate-model", type=DIRECTORY, help="--data: that of CANDIDATE.")
@click.option("--history", type=DIRECTORY, help="Keep the run there, and tell what changed since the last.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random prompts and arrivals.")
@JSON
def compare_latency(
    baseline: str,
    candidate: str,
    output: Path,
    via: str,
    history: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure CANDIDATE against BASELINE: two engines, or two URLs of running Triton servers.

    Embedded engines are served for the time of measuring. TensorRT-LLM's need a server that runs (deploy
    starts one), or --via trtllm-bench, which takes their directories.

    \b
    Examples:
        ffn-fusion compare-latency engines/parent engines/fused --tokenizer model -o report
        ffn-fusion compare-latency http://a:8000 http://b:8000 --concurrency 1,32 -o report
        ffn-fusion compare-latency http://a:8000 http://b:8000 --rate 2,8 --slo ttft=200 -o report
        ffn-fusion compare-latency parent fused --via trtllm-bench --tokenizer model -o report
        ffn-fusion compare-latency http://a http://b --load-generator aiperf --tokenizer model -o report
    """
    from rich.console import Console

    from triton_repo import history as kept_runs
    from triton_repo import report

    for name in ONLY[BENCH if via == TRITON else TRITON]:
        if options[name]:
            other = TRITON if via == BENCH else BENCH
            raise click.UsageError(f"--{name.replace('_', '-')} belongs to --via {other}")
    if options["rate"] and options["concurrency"]:
        raise click.UsageError("--rate is an open loop, --concurrency a closed one; give one of them")
    defaults = {name: value for name, value in DEFAULTS[via].items() if options[name] is None}
    options.update(defaults, concurrency=parse_concurrency(str({**options, **defaults}["concurrency"])))
    report.check_output(output)
    kept = None if history is None else kept_runs.read(history)
    with ExitStack() as stack:
        runs = (
            stack.enter_context(_runs(output))
            if via == BENCH or options["load_generator"] == "aiperf"
            else None
        )
        if via == BENCH:
            assert runs is not None, "made above"
            comparison = _through_bench(stack, baseline, candidate, runs, **options)
        else:
            comparison = _through_triton(stack, baseline, candidate, runs, **options)
        command = command_line(click.get_current_context())
        comparison = replace(comparison, settings={**comparison.settings, "command": command})
        if kept is not None:
            found = kept_runs.against_last(kept, comparison.to_dict())
            comparison = replace(comparison, against=found)
        report.write_report(comparison, output, runs)
    if history is not None:
        kept_runs.keep(history, comparison.to_dict())
    if as_json:
        emit(comparison.to_dict(), True, "")
        return
    report.print_table(comparison, Console())
    click.echo(f"{output / 'report.html'}")


def _through_triton(
    stack: ExitStack,
    baseline: str,
    candidate: str,
    runs: Path | None,
    *,
    tokenizer: Path | None,
    prompts: Path | None,
    model: str | None,
    load_generator: str | None,
    input_tokens: int | None,
    rate: str | None,
    slo: str | None,
    natural_lengths: bool | None,
    lengths: str | None,
    data: tuple[Path, ...],
    baseline_model: Path | None,
    candidate_model: Path | None,
    **options: Any,
) -> Comparison:
    from triton_repo import aiperf, compare, shapes
    from triton_repo.quality import measure

    own = own_options(load_generator, rate, slo, natural_lengths, lengths)
    options |= own
    models = quality_models(data, baseline_model, candidate_model)
    if model is not None and not (is_url(baseline) or is_url(candidate)):
        raise click.UsageError("--model is for URLs; engines are served as ensemble")
    options["prompts"] = read_prompts(prompts) if prompts else list(compare.DEFAULT_PROMPTS)
    if load_generator == "aiperf":
        if tokenizer is None:
            raise click.UsageError("--load-generator aiperf needs --tokenizer DIR")
        aiperf.find()
    if lengths is not None:
        if tokenizer is None:
            raise click.UsageError("--lengths needs --tokenizer DIR")
        options["shapes"] = shapes.make(parse_lengths(lengths), options["prompts"], tokenizer)
    options.update(facts(baseline, candidate), notes=elsewhere(baseline, candidate))
    if tokenizer is None and not (is_url(baseline) and is_url(candidate)):
        raise click.UsageError("engines need --tokenizer DIR")
    quality = None if models is None else measure(*models, data, options["seed"])
    ends = [endpoint(stack, given, tokenizer, model) for given in (baseline, candidate)]
    options.update(progress=_progress(stack, "warming up"))
    if runs is None:
        return compare.compare(*ends, quality=quality, **options)
    assert tokenizer is not None, "checked above"
    return replace(aiperf.compare(*ends, tokenizer=tokenizer, runs=runs, **options), quality=quality)


def _through_bench(
    stack: ExitStack,
    baseline: str,
    candidate: str,
    runs: Path | None,
    *,
    prompts: None,
    model: None,
    load_generator: None,
    input_tokens: int | None,
    rate: None,
    slo: None,
    natural_lengths: None,
    lengths: None,
    data: tuple[()],
    baseline_model: None,
    candidate_model: None,
    **options: Any,
) -> Comparison:
    from triton_repo.bench_comparison import compare_engines

    assert runs is not None, "made by the command"
    for given in (baseline, candidate):
        if is_url(given):
            raise UserError(f"{given}: --via trtllm-bench takes engine directories; leave --via out for URLs")
    return compare_engines(
        Path(baseline),
        Path(candidate),
        runs=runs,
        input_tokens=input_tokens or 128,
        progress=_progress(stack, "loading engines"),
        **facts(baseline, candidate),
        **options,
    )


@contextmanager
def _runs(output: Path) -> Iterator[Path]:
    """A directory beside the output for what a tool writes; it stays when the block fails."""
    directory = output.absolute().parent / f".{output.name}.runs"
    if not directory.parent.is_dir():
        raise UserError(f"{directory.parent}: no such directory; create it first")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    try:
        yield directory
    except BaseException:
        if not any(directory.glob("**/*.log")):  # nothing ran
            shutil.rmtree(directory)
        raise
    shutil.rmtree(directory)


def _progress(stack: ExitStack, text: str) -> Any:
    from rich.console import Console

    return stack.enter_context(Console(stderr=True).status(text)).update
