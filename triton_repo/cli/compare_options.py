"""What the options of compare-latency say."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from builder.errors import UserError

if TYPE_CHECKING:
    from triton_repo.rounds import Targets


def command_line(context: click.Context) -> str:
    """What was asked for, as a command to run again."""
    words = ["ffn-fusion", "compare-latency"]
    for parameter in context.command.params:
        name = parameter.name or ""
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        if isinstance(parameter, click.Argument):
            words.append(value)
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            words.append(parameter.opts[-1])
        else:
            words += [
                w for x in (value if parameter.multiple else [value]) for w in (parameter.opts[-1], str(x))
            ]
    return shlex.join(words)


def own_options(
    load_generator: str | None,
    rate: str | None,
    slo: str | None,
    natural_lengths: bool | None,
    lengths: str | None,
) -> dict[str, Any]:
    """What only the built-in load generator can do, as arguments of `compare`."""
    if load_generator == "aiperf":
        for name, value in (
            ("rate", rate),
            ("slo", slo),
            ("natural-lengths", natural_lengths),
            ("lengths", lengths),
        ):
            if value:
                raise click.UsageError(f"--{name} belongs to --load-generator built-in")
        return {}
    options: dict[str, Any] = {"equal_lengths": not natural_lengths, "targets": parse_slo(slo)}
    if rate is not None:
        options |= {"concurrency": parse_rates(rate), "open_loop": True}
    return options


def parse_slo(text: str | None) -> Targets | None:
    """`ttft=200,inter_token=30` in ms."""
    from dataclasses import fields

    from triton_repo.rounds import Targets

    if text is None:
        return None
    known = [x.name for x in fields(Targets)]
    values = dict(part.partition("=")[::2] for part in text.split(","))
    for name, value in values.items():
        if name not in known or not _positive(value):
            raise click.BadParameter(
                f"{name}={value}: give positive ms for {', '.join(known)}", param_hint="--slo"
            )
    return Targets(**{name: float(value) for name, value in values.items()})


def parse_rates(text: str) -> tuple[float, ...]:
    """`0.5,2` as requests/s."""
    parts = text.split(",")
    if not all(map(_positive, parts)) or len(set(parts)) != len(parts):
        raise click.BadParameter(f"{text!r} is no list of unlike positive numbers", param_hint="--rate")
    return tuple(map(float, parts))


def parse_lengths(text: str) -> tuple[tuple[int, int], ...]:
    """`32:64,512:64` as tokens in and out."""
    pairs = [part.split(":") for part in text.split(",")]
    if not all(len(pair) == 2 and all(x.isdecimal() and int(x) > 1 for x in pair) for pair in pairs):
        raise click.BadParameter(f"{text!r} is no list of IN:OUT tokens above 1", param_hint="--lengths")
    return tuple((int(a), int(b)) for a, b in pairs)


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def quality_models(
    data: tuple[Path, ...], baseline: Path | None, candidate: Path | None
) -> tuple[Path, Path] | None:
    """Both model directories, None where no quality is asked for."""
    if not data and baseline is None and candidate is None:
        return None
    if not data or baseline is None or candidate is None:
        raise click.UsageError("--data, --baseline-model and --candidate-model go together")
    return baseline, candidate


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
