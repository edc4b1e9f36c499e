"""The serving commands: deploy, what looks after servers, compare-latency, demo, doctor."""

from __future__ import annotations

from pathlib import Path

import click

from builder.options import DIRECTORY, JSON, emit
from triton_repo.cli.compare_latency import compare_latency
from triton_repo.cli.deploy import deploy
from triton_repo.cli.openai import serve_openai
from triton_repo.cli.servers import logs, status, stop


@click.command()
@click.option(
    "-o", "--output", type=DIRECTORY, default=Path("demo"), show_default=True, help="Directory to write."
)
def demo(output: Path) -> None:
    """Go the whole way on a small real model: train, drop, fuse, convert, build, serve, compare.

    Needs no GPU and no network. The parent is trained once and kept in the user's cache directory.
    """
    from triton_repo.demo import run

    run(output)


@click.command()
@JSON
def doctor(as_json: bool) -> None:
    """What this machine can do, and why not the rest."""
    from triton_repo.doctor import checks

    results = checks()
    lines = [f"{'ready  ' if c.ready else 'missing'}  {c.name:28} {c.detail}" for c in results]
    emit({c.name: {"ready": c.ready, "detail": c.detail} for c in results}, as_json, "\n".join(lines))


COMMANDS = (deploy, status, stop, logs, serve_openai, compare_latency, demo, doctor)
