"""status, stop and logs: of the servers that run in the background."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from builder.options import JSON, emit

if TYPE_CHECKING:
    from triton_repo.registry import Record


@click.command()
@click.argument("name", required=False)
@JSON
def status(name: str | None, as_json: bool) -> None:
    """What the servers that `deploy --serve --detach` started are doing: all of them, or NAME.

    \b
    Example:
        ffn-fusion status
    """
    from triton_repo import registry

    records = registry.everything() if name is None else [registry.find(name)]
    told = [_told(record) for record in records]
    lines = [f"{'name':20}{'state':12}{'url':28}{'uptime':>10}{'answered':>10}{'repairs':>9}  repository"]
    for x in told:
        answered = "" if x["answered"] is None else x["answered"]
        lines.append(
            f"{x['name']:20}{x['state']:12}{x['url']:28}{x['uptime']:>10}{answered:>10}{x['repaired']:>9}  "
            f"{x['repository']}"
        )
    emit({"servers": told}, as_json, "\n".join(lines) if told else "no server runs in the background")


def _told(record: Record) -> dict[str, Any]:
    """A record with what is so now."""
    from triton_repo import registry

    state: str = record.state if record.alive else "dead"
    ready, answered = _asked(record) if record.alive else (False, None)
    if state == "serving" and not ready:
        state = "not ready"
    return {**asdict(record), "state": state, "uptime": registry.uptime(record), "answered": answered}


def _asked(record: Record) -> tuple[bool, int | None]:
    """Whether the server is ready, and the requests that its text model has answered."""
    model = f"{record.url}/v2/models/{record.model}"
    try:
        with urllib.request.urlopen(f"{model}/ready", timeout=5) as response:
            ready = response.status == 200
        with urllib.request.urlopen(f"{model}/stats", timeout=5) as response:
            stats = json.load(response)["model_stats"][0]
    except (OSError, ValueError, KeyError, urllib.error.URLError):
        return False, None
    return ready, int(stats["inference_stats"]["success"]["count"])


@click.command()
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="All of them.")
def stop(name: str | None, everything: bool) -> None:
    """End a server that runs in the background: NAME, or the only one. Running requests get its --grace.

    \b
    Example:
        ffn-fusion stop chat
    """
    from triton_repo import registry, supervision

    if everything and name:
        raise click.UsageError("NAME and --all contradict each other")
    for record in registry.everything() if everything else [registry.find(name)]:
        ended = supervision.stop(record)
        click.echo(f"{record.name}: {'stopped' if ended else 'had died; forgotten'}")


@click.command()
@click.argument("name", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on as lines come, until interrupted or it ends.")
@click.option("--triton", is_flag=True, help="tritonserver's log, not the supervisor's.")
def logs(name: str | None, follow: bool, triton: bool) -> None:
    """What a server in the background has logged: NAME, or the only one.

    \b
    Example:
        ffn-fusion logs chat --triton -f
    """
    from triton_repo import registry

    record = registry.find(name)
    file = registry.place(record.name) / ("triton.log" if triton else "supervisor.log")
    with file.open(encoding="utf-8", errors="replace") as stream:
        while True:
            click.echo(stream.read(), nl=False)
            if not follow or not record.alive:
                return
            time.sleep(0.2)
