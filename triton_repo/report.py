"""The comparison as a table, report.json, and one self-contained report.html."""

from __future__ import annotations

import shutil
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.errors import UserError
from builder.storage import output_directory, write_json
from triton_repo import plots
from triton_repo.compare import Comparison
from triton_repo.rounds import METRICS, SIDES, Row
from triton_repo.words import SHORT, at, removed, unit

if TYPE_CHECKING:
    from rich.console import Console

TIMES = ("ttft_ms", "inter_token_ms", "latency_ms")
RAN = {
    "engine": "engine",
    "backend": "backend",
    "dtype": "weights",
    "tp_size": "tensor-parallel ranks",
    "pp_size": "pipeline stages",
    "tensorrt_llm": "built with TensorRT-LLM",
    "built_on": "built on",
    "parallel_blocks": "blocks in parallel",
}


def check_output(directory: Path) -> None:
    """Refuse an output directory before minutes are spent on measuring."""
    if directory.exists():
        raise UserError(f"{directory}: exists; remove it or choose another output directory")
    plots.pyplot_or_refuse()


def print_table(comparison: Comparison, console: Console) -> None:
    """All metrics on the terminal."""
    from rich.table import Table

    table = Table(
        title="candidate / baseline, with 95% interval", box=None, collapse_padding=True, pad_edge=False
    )
    for name in ("", unit(comparison), "", "p50", "p90", "p99", "mean", "ratio"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in comparison.rows:
        for side in SIDES:
            values = getattr(row, side)
            numbers = (_number(x) for x in (values.p50, values.p90, values.p99, values.mean))
            first = (SHORT[row.metric], f"{row.concurrency:g}") if side == "baseline" else ("", "")
            table.add_row(*first, side[:4], *numbers, "" if side == "baseline" else interval(row))
    console.print(table)
    for shape in comparison.by_shape:
        told = ", ".join(f"{SHORT[m].partition(',')[0]} {interval(shape.row(m))}" for m in TIMES)
        console.print(f"{shape.input_tokens} tokens in, {shape.output_tokens} out: {told}", highlight=False)
    for note in comparison.notes:
        console.print(note, highlight=False)
    for line in changed(comparison):
        console.print(line, highlight=False)
    console.print(machine(comparison), style="dim", highlight=False)
    console.print(headline(comparison), style="bold")


def interval(row: Row) -> str:
    """`0.52 [0.50, 0.55]`."""
    return f"{row.ratio.value:.2f} [{row.ratio.low:.2f}, {row.ratio.high:.2f}]"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def headline(comparison: Comparison) -> str:
    """How much faster, and how sure, in one sentence."""
    level = comparison.settings["concurrency"][0]
    row = comparison.row("inter_token_ms", level)
    clients = at(comparison, level)
    if not row.ratio.differs:
        return f"No certain difference in inter-token latency at {clients} (ratio {interval(row)})."
    factor, word = (1 / row.ratio.value, "faster") if row.ratio.value < 1 else (row.ratio.value, "slower")
    bounds = sorted(
        (1 / row.ratio.low, 1 / row.ratio.high) if row.ratio.value < 1 else (row.ratio.low, row.ratio.high)
    )
    return (
        f"The candidate is {factor:.2f} times {word} per token at {clients} "
        f"(95% interval {bounds[0]:.2f} to {bounds[1]:.2f})."
    )


def changed(comparison: Comparison) -> list[str]:
    """What differs from the kept run, a line each; that nothing does is a line as well."""
    if comparison.against is None:
        return []
    found = [x for x in comparison.against.changes if x.slower or x.faster]
    lines = [
        f"{x.side} is {'slower' if x.slower else 'faster'} than in {comparison.against.file}: "
        f"{SHORT[x.metric]} at {at(comparison, x.concurrency)} {x.ratio:.2f} times "
        f"[{x.low:.2f}, {x.high:.2f}]"
        for x in found
    ]
    return lines or [f"No certain change since {comparison.against.file}."]


def cost(comparison: Comparison) -> str:
    """What the speed costs, in a sentence."""
    if not comparison.quality:
        return "Quality was not measured: give --data and both models."
    *_, (name, last) = comparison.quality.items()
    kl = "" if last.get("kl") is None else f", KL to the parent {_value(last['kl']):.4f}"
    first = next(iter(comparison.quality.values()))
    return (
        f"Perplexity {_value(first['perplexity']):.2f} becomes {_value(last['perplexity']):.2f}{kl} ({name})."
    )


def _value(x: Any) -> float:
    """Of a number, or of one with its interval."""
    return float(x["value"] if isinstance(x, dict) else x)


def _shown(x: Any, form: str) -> str:
    """`1.23 [1.20, 1.26]`, or the number alone."""
    if not isinstance(x, dict) or x.get("low") is None:
        return format(_value(x), form)
    return f"{x['value']:{form}} [{x['low']:{form}}, {x['high']:{form}}]"


def write_report(comparison: Comparison, directory: Path, runs: Path | None = None) -> None:
    """Write report.json and report.html into the new directory, and a copy of `runs`, what the tool left.

    Raises UserError where the directory exists.
    """
    html = render(comparison)
    with output_directory(directory) as partial:
        if runs is not None:
            shutil.copytree(runs, partial / "runs")
        write_json(partial / "report.json", comparison.to_dict())
        (partial / "report.html").write_text(html, encoding="utf-8")


def render(comparison: Comparison) -> str:
    """The page; it loads nothing."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("triton_repo", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        c=comparison,
        headline=headline(comparison),
        levels=comparison.settings["concurrency"],
        metrics={name: METRICS[name] for name in comparison.metrics},
        interval=interval,
        ran=_ran(comparison),
        machine=machine(comparison),
        removed=removed(comparison),
        unit=unit(comparison),
        at=at,
        cost=cost(comparison),
        changed=changed(comparison),
        shown=_shown,
        outliers=sum(getattr(r, s).outliers for r in comparison.rows for s in SIDES),
        ratios=Markup(plots.ratios(comparison)),
        in_rounds=Markup(plots.in_rounds(comparison)),
        distribution=Markup(plots.distribution(comparison)),
        concurrency=Markup(plots.over_load(comparison)),
        removed_plot=Markup(plots.what_is_left(comparison)),
    )


def _ran(comparison: Comparison) -> list[tuple[str, str, str]]:
    """What ran on each side: name, baseline, candidate. Of a server, what its repository tells."""
    facts = [facts or {} for facts in (comparison.baseline_facts, comparison.candidate_facts)]
    rows = [
        (text, *(str(f[key]) if f.get(key) is not None else "" for f in facts)) for key, text in RAN.items()
    ]
    return [(text, before, after) for text, before, after in rows if before or after]


def machine(comparison: Comparison) -> str:
    """The machine that measured: CPU, GPUs with their clocks, packages."""
    hardware = comparison.hardware
    parts = [f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['machine']}"]
    gpus = [_gpu(gpu) for gpu in hardware["gpus"]]
    for text, same in groupby(gpus):
        count = len(list(same))
        parts.append(f"{count} x {text}" if count > 1 else text)
    parts += [f"{name} {version}" for name, version in comparison.versions.items()]
    return "; ".join(parts)


def _gpu(gpu: dict[str, Any]) -> str:
    clock = f", {gpu['clock']} MHz after measuring" if gpu.get("clock") is not None else ""
    return f"{gpu['name']} (driver {gpu['driver']}, SM clock at most {gpu['max_clock']} MHz{clock})"
