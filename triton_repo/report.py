"""The comparison as a table, report.json, and one self-contained report.html."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from builder.errors import UserError
from builder.storage import output_directory, write_json
from triton_repo import plots
from triton_repo.compare import METRICS, SIDES, Comparison
from triton_repo.statistics import NAMES, Ratio

if TYPE_CHECKING:
    from rich.console import Console

SHORT = {
    "ttft_ms": "TTFT, ms",
    "inter_token_ms": "inter-token, ms",
    "latency_ms": "request, ms",
    "tokens_per_s": "tokens/s",
}
REMOVED = {
    "layers": "layers",
    "attention_layers": "attention layers",
    "all_reduces_per_token": "all-reduces per token",
    "kv_bytes_per_token": "KV cache bytes per token",
    "parameters": "parameters",
}


def check_output(directory: Path) -> None:
    """Refuse an output directory before minutes are spent on measuring."""
    if directory.exists():
        raise UserError(f"{directory}: exists; remove it or choose another output directory")
    plots.require()


def print_table(comparison: Comparison, console: Console) -> None:
    """All metrics on the terminal."""
    from rich.table import Table

    table = Table(
        title="candidate / baseline, with 95% interval", box=None, collapse_padding=True, pad_edge=False
    )
    for name in ("", "clients", "", "p50", "p90", "p99", "mean", "ratio"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in comparison.rows:
        for side in SIDES:
            values = getattr(row, side)
            numbers = (_number(getattr(values, name)) for name in NAMES)
            first = (SHORT[row.metric], str(row.concurrency)) if side == "baseline" else ("", "")
            table.add_row(*first, side[:4], *numbers, "" if side == "baseline" else interval(row.ratio))
    console.print(table)
    for note in comparison.notes:
        console.print(note)
    console.print(headline(comparison), style="bold")


def interval(ratio: Ratio) -> str:
    """`0.52 [0.50, 0.55]`."""
    return f"{ratio.value:.2f} [{_number(ratio.low)}, {_number(ratio.high)}]"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}" if value < 1e4 else f"{value:.1e}"


def headline(comparison: Comparison) -> str:
    """How much faster, and how sure, in one sentence."""
    level = comparison.settings["concurrency"][0]
    row = comparison.row("inter_token_ms", level)
    clients = "one client" if level == 1 else f"{level} clients"
    if not row.ratio.differs:
        return (
            f"No difference shown in inter-token latency at {clients} "
            f"(candidate / baseline {interval(row.ratio)})."
        )
    faster = row.speedup.value > 1
    factor = row.speedup if faster else row.ratio
    return (
        f"The candidate is {factor.value:.2f} times {'faster' if faster else 'slower'} per token "
        f"at {clients} (95% interval {factor.low:.2f} to {factor.high:.2f})."
    )


def write_report(comparison: Comparison, directory: Path) -> None:
    """Write report.json and report.html into the new directory. Raises UserError where it exists."""
    html = render(comparison)
    with output_directory(directory) as partial:
        write_json(partial / "report.json", comparison.to_dict())
        (partial / "report.html").write_text(html, encoding="utf-8")


def render(comparison: Comparison) -> str:
    """The page; it loads nothing."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    removed = removed_counts(comparison)
    drawn = {
        "distribution": plots.distribution(comparison),
        "concurrency": plots.concurrency(comparison),
        "intervals": plots.intervals(comparison),
        "shares": plots.shares(removed),
    }
    environment = Environment(
        loader=PackageLoader("triton_repo", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        c=comparison,
        headline=headline(comparison),
        levels=comparison.settings["concurrency"],
        metrics=METRICS,
        interval=interval,
        number=_number,
        removed=removed,
        figures={name: Markup(svg) for name, svg in drawn.items()},
    )


def removed_counts(comparison: Comparison) -> list[tuple[str, int, int]]:
    """What the candidate has less of: name, baseline, candidate. Empty where a side's facts are unknown."""
    before, after = comparison.baseline_facts, comparison.candidate_facts
    if before is None or after is None:
        return []
    return [(text, before[key], after[key]) for key, text in REMOVED.items()]
