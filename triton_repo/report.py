"""The comparison as a table, report.json, and one self-contained report.html."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.errors import UserError
from builder.storage import output_directory, write_json
from triton_repo import plots, svg, words
from triton_repo.compare import Comparison
from triton_repo.rounds import METRICS, SIDES
from triton_repo.words import SHORT, interval, number

if TYPE_CHECKING:
    from rich.console import Console

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
SETTINGS = {
    "load": "loop",
    "prompts": "prompts",
    "input_tokens": "prompt tokens",
    "max_tokens": "tokens an answer",
    "equal_lengths": "all of them asked for",
    "concurrency": "levels",
    "requests": "requests a round",
    "rounds": "rounds a side and level",
    "warm_up_rounds": "warm-up rounds",
    "targets": "targets, ms",
    "seed": "seed",
}


def check_output(directory: Path) -> None:
    """Refuse an output directory before minutes are spent on measuring."""
    if directory.exists():
        raise UserError(f"{directory}: exists; remove it or choose another output directory")
    svg.check()


def print_table(comparison: Comparison, console: Console) -> None:
    """All metrics on the terminal, and what the page's first screen says."""
    from rich.table import Table

    table = Table(
        title="candidate / baseline, with 95% interval", box=None, collapse_padding=True, pad_edge=False
    )
    for name in ("", words.unit(comparison), "", "p50", "p90", "p99", "mean", "ratio"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in comparison.rows:
        for side in SIDES:
            values = getattr(row, side)
            numbers = (number(x) for x in (values.p50, values.p90, values.p99, values.mean))
            first = (SHORT[row.metric], f"{row.concurrency:g}") if side == "baseline" else ("", "")
            table.add_row(*first, side[:4], *numbers, "" if side == "baseline" else interval(row.ratio))
    console.print(table)
    for line in _lines(comparison):
        console.print(line, highlight=False)
    console.print(words.machine(comparison), style="dim", highlight=False)
    console.print(words.headline(comparison), style="bold")


def _lines(comparison: Comparison) -> list[str]:
    """What is said below the table."""
    shapes = [
        f"{shape.input_tokens} tokens in, {shape.output_tokens} out: "
        + ", ".join(f"{words.short(x.metric)} {interval(x.ratio)}" for x in shape.rows)
        for shape in comparison.by_shape
    ]
    return [*shapes, *comparison.notes, *words.changed(comparison), words.cost(comparison)]


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
    """The page; it loads nothing and needs no script."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("triton_repo", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    level = comparison.settings["concurrency"][0]
    return environment.get_template("report.html.j2").render(
        c=comparison,
        words=words,
        metrics=METRICS,
        sides=SIDES,
        main=words.primary(comparison),
        others=[comparison.row(metric, level) for metric in comparison.metrics],
        by_length=[METRICS[row.metric] for shape in comparison.by_shape[:1] for row in shape.rows],
        client_ms=_client_ms(comparison) if comparison.server_times else {},
        ran=_ran(comparison),
        settings=_settings(comparison),
        plots={name: plot(comparison) for name, plot in plots.PLOTS.items()},
        over_load=plots.over_load(comparison),
    )


def _client_ms(comparison: Comparison) -> dict[str, float]:
    """Mean latency of all requests at all levels, which Triton counted too, by side."""
    rows = [row for row in comparison.rows if row.metric == "latency_ms"]
    sides = {side: [getattr(row, side) for row in rows] for side in SIDES}
    return {
        side: sum(x.mean * x.count for x in found) / sum(x.count for x in found)
        for side, found in sides.items()
    }


def _ran(comparison: Comparison) -> list[tuple[str, str, str]]:
    """What ran on each side: name, baseline, candidate. Of a server, what its repository tells."""
    facts = [facts or {} for facts in (comparison.baseline_facts, comparison.candidate_facts)]
    rows = [
        (text, *(str(f[key]) if f.get(key) is not None else "" for f in facts)) for key, text in RAN.items()
    ]
    return [(text, before, after) for text, before, after in rows if before or after]


def _settings(comparison: Comparison) -> list[tuple[str, str]]:
    known = comparison.settings
    return [(text, _setting(known[key])) for key, text in SETTINGS.items() if known.get(key) is not None]


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {x:g}" for name, x in value.items() if x is not None)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(f"{x:g}" for x in value) if isinstance(value, list | tuple) else str(value)
