"""The comparison as a table, report.json, and one self-contained report.html."""

from __future__ import annotations

import io
import shutil
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.errors import UserError
from builder.storage import output_directory, write_json
from triton_repo.compare import Comparison
from triton_repo.rounds import METRICS, SIDES, Row

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = {"baseline": "#8a8f98", "candidate": "#2f80ed"}  # both read on light and on dark
INK = "#808080"
SHORT = {
    "ttft_ms": "TTFT, ms",
    "inter_token_ms": "inter-token, ms",
    "latency_ms": "request, ms",
    "tokens_per_s": "tokens/s",
    "user_tokens_per_s": "tokens/s, one",
}
REMOVED = {
    "layers": "layers",
    "attention_layers": "attention layers",
    "all_reduces_per_token": "all-reduces per token",
    "kv_bytes_per_token": "KV cache bytes per token",
    "parameters": "parameters",
}
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
    _pyplot()


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
            numbers = (_number(x) for x in (values.p50, values.p90, values.p99, values.mean))
            first = (SHORT[row.metric], str(row.concurrency)) if side == "baseline" else ("", "")
            table.add_row(*first, side[:4], *numbers, "" if side == "baseline" else interval(row))
    console.print(table)
    for note in comparison.notes:
        console.print(note, highlight=False)
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
    clients = "one client" if level == 1 else f"{level} clients"
    if not row.ratio.differs:
        return f"No difference in inter-token latency at {clients} (ratio {interval(row)})."
    factor, word = (1 / row.ratio.value, "faster") if row.ratio.value < 1 else (row.ratio.value, "slower")
    bounds = sorted(
        (1 / row.ratio.low, 1 / row.ratio.high) if row.ratio.value < 1 else (row.ratio.low, row.ratio.high)
    )
    return (
        f"The candidate is {factor:.2f} times {word} per token at {clients} "
        f"(95% interval {bounds[0]:.2f} to {bounds[1]:.2f})."
    )


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
        removed=_removed(comparison),
        distribution=Markup(_distribution(comparison)),
        concurrency=Markup(_concurrency(comparison)),
        removed_plot=Markup(_removed_plot(comparison)),
    )


def _removed(comparison: Comparison) -> list[tuple[str, int, int]]:
    """What the candidate has less of: name, baseline, candidate."""
    before, after = comparison.baseline_facts, comparison.candidate_facts
    if before is None or after is None or not REMOVED.keys() <= before.keys() & after.keys():
        return []
    return [(text, before[key], after[key]) for key, text in REMOVED.items()]


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


def _pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError("matplotlib is missing; pip install 'ffn-fusion[report]'") from None
    matplotlib.use("svg")
    from matplotlib import pyplot

    return pyplot


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    _pyplot().close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _axes(width: float = 6.0, height: float = 3.2) -> tuple[Any, Any]:
    pyplot = _pyplot()
    style = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11, "svg.hashsalt": "report"}
    colours = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    )
    pyplot.rcParams.update({**style, **colours})
    figure, axes = pyplot.subplots(figsize=(width, height))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=INK, alpha=0.2)
    return figure, axes


def _distribution(comparison: Comparison) -> str:
    """Share of tokens that came within a time, cut at the 99.5th percentile of the slower side.

    Empty where single values are not known.
    """
    import numpy as np

    if not comparison.inter_token_ms:
        return ""
    figure, axes = _axes()
    limit = max(np.percentile(values, 99.5) for values in comparison.inter_token_ms.values())
    for side in SIDES:
        values = np.sort(comparison.inter_token_ms[side])
        axes.step(values, np.arange(1, len(values) + 1) / len(values), color=COLOURS[side], label=side, lw=2)
    axes.set(xlim=(0, limit), ylim=(0, 1.01), xlabel="inter-token latency, ms", ylabel="share of tokens")
    axes.legend(frameon=False, loc="lower right")
    return _svg(figure)


def _concurrency(comparison: Comparison) -> str:
    """Median to 99th percentile of the request latency at every concurrency."""
    figure, axes = _axes()
    levels = comparison.settings["concurrency"]
    for number, side in enumerate(SIDES):
        rows = [getattr(comparison.row("latency_ms", level), side) for level in levels]
        places = [i + (number - 0.5) * 0.12 for i in range(len(levels))]
        medians = [r.p50 for r in rows]
        reach = [[0] * len(rows), [max(0.0, r.p99 - r.p50) for r in rows]]
        axes.errorbar(
            places, medians, yerr=reach, color=COLOURS[side], label=side, marker="o", capsize=4, lw=2
        )
    axes.set_xticks(range(len(levels)), [str(level) for level in levels])
    axes.set(xlabel="clients at once", ylabel="request latency, ms (p50 to p99)", ylim=(0, None))
    axes.legend(frameon=False, loc="lower right")
    return _svg(figure)


def _removed_plot(comparison: Comparison) -> str:
    """What is left of each count, as a share of the baseline's."""
    removed = [(name, before, after) for name, before, after in _removed(comparison) if before]
    if not removed:
        return ""
    figure, axes = _axes(height=0.5 * len(removed) + 0.9)
    names = [name for name, _, _ in removed][::-1]
    shares = [100 * after / before for _, before, after in removed][::-1]
    axes.barh(names, [100] * len(names), color=COLOURS["baseline"], alpha=0.35)
    bars = axes.barh(names, shares, color=COLOURS["candidate"])
    axes.bar_label(bars, [f"{share:.0f}%" for share in shares], padding=4)
    axes.set(xlabel="candidate, % of baseline", xlim=(0, max(115, *shares)))
    axes.grid(visible=False)
    return _svg(figure)
