"""What each step told: a line of JSON each, a bar on a terminal, and curves."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from builder.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Entry:
    """After `step` steps. Losses are means over the tokens of the step; `seconds` is what the step took.

    `cosine`, `kl` and `lm` are the terms without their weights, None where a stage has none.
    """

    step: int
    stage: int
    tokens: int  # of the training so far
    loss: float
    cosine: float | None
    kl: float | None
    lm: float | None
    learning_rate: float
    grad_norm: float
    seconds: float


class Report(Protocol):
    """Takes the entry of each step."""

    def __call__(self, entry: Entry) -> None: ...


def read(file: Path) -> list[Entry]:
    """All entries; a last line that a kill cut off is left out."""
    entries = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else ():
        if line.endswith("\n"):
            entries.append(Entry(**json.loads(line)))
    return entries


@contextmanager
def writer(file: Path, step: int) -> Iterator[Report]:
    """Appends entries; those after `step`, which a killed process wrote and nobody kept, go first."""
    kept = [x for x in read(file) if x.step <= step]
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text("".join(map(_line, kept)), encoding="utf-8")
    partial.rename(file)
    with file.open("a", encoding="utf-8") as stream:

        def report(entry: Entry) -> None:
            stream.write(_line(entry))
            stream.flush()

        yield report


def _line(entry: Entry) -> str:
    return json.dumps(asdict(entry)) + "\n"


@contextmanager
def bar(steps: int, done: int) -> Iterator[Report | None]:
    """Loss, tokens/s and the time left on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    told = TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s")
    with Progress(*columns, told, console=Console(file=sys.stderr)) as bars:
        task = bars.add_task("", total=steps, completed=done, loss="", speed="")
        begin, first = time.monotonic(), None

        def report(entry: Entry) -> None:
            nonlocal first
            first = entry.tokens if first is None else first
            speed = f"{(entry.tokens - first) / max(1e-9, time.monotonic() - begin):,.0f}"
            bars.update(task, completed=entry.step, loss=f"{entry.loss:.4f}", speed=speed)

        yield report


@contextmanager
def counter(label: str, total: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """A bar on stderr, where that is a terminal and it is to be shown; call it when one more is done."""
    if not (shown and sys.stderr.isatty()):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr)) as bars:
        task = bars.add_task(label, total=total)
        yield lambda: bars.advance(task)


def notice(text: str) -> None:
    """A line on stderr."""
    sys.stderr.write(f"{text}\n")


def check_plot() -> None:
    """Raise UserError where matplotlib is missing, before hours are spent."""
    _pyplot()


def plot(entries: Sequence[Entry], file: Path) -> None:
    """The loss, its terms and the learning rate over tokens, as a picture; stages are set apart by lines."""
    pyplot = _pyplot()
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 5), height_ratios=(3, 1), layout="constrained"
    )
    tokens = [x.tokens for x in entries]
    for name in ("loss", "cosine", "kl", "lm"):
        values = [getattr(x, name) for x in entries]
        if any(x is not None for x in values):
            numbers = [float("nan") if x is None else x for x in values]
            above.plot(tokens, numbers, label=name, linewidth=1.6 if name == "loss" else 0.9)
    above.set_yscale("log")
    above.set_ylabel("mean over a step's tokens")
    above.legend(frameon=False)
    below.plot(tokens, [x.learning_rate for x in entries])
    below.set_ylabel("learning rate")
    below.set_xlabel("tokens")
    for before, after in pairwise(entries):
        if before.stage != after.stage:
            for axes in (above, below):
                axes.axvline(before.tokens, linewidth=0.8, linestyle="--", color="#808080")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError(
            "plot: matplotlib is not installed; pip install 'ffn-fusion[report]', or leave out --plot"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
