"""The options of deploy --serve, and what it does with them."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from builder.errors import UserError
from builder.options import emit

LOOPBACK = "127.0.0.1"
_OPTIONS: dict[str, tuple[Any, str]] = {
    "detach": (None, "Serve in the background; see status, stop, logs."),
    "name": (str, "Of a server in the background. Default: the repository's directory."),
    "host": (str, f"Address to listen on. Default: {LOOPBACK}."),
    "grace": (click.IntRange(0, 3600), "Seconds that running requests get when it ends. Default: 5."),
    "openai-port": (click.IntRange(1, 65535), "Serve OpenAI's API there as well."),
    "allow-repository-control": (None, "Clients may load and unload models, and set logging and tracing."),
    "allow-shared-memory": (None, "Clients may register shared memory."),
    "supervise": (None, "For --detach itself."),
}


def serving_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add them; each is None, or False, where not given."""
    for flag, (kind, text) in reversed(_OPTIONS.items()):
        kinds: dict[str, Any] = {"is_flag": True} if kind is None else {"type": kind, "default": None}
        hidden = flag == "supervise"
        command = click.option(f"--{flag}", help=f"--serve: {text}", hidden=hidden, **kinds)(command)
    return command


def take(options: dict[str, Any]) -> dict[str, Any]:
    """Those of serving, which leave `options`."""
    return {name: options.pop(name) for name in (flag.replace("-", "_") for flag in _OPTIONS)}


def first_given(serving: dict[str, Any]) -> str:
    """`--openai-port`."""
    return "--" + next(name for name, value in serving.items() if value).replace("_", "-")


def check_host(host: str) -> None:
    """Raise UserError where it is no address; warn on stderr where others can reach it."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise UserError(f"host: {host!r} is no IP address; 0.0.0.0 is all of this machine's") from None
    if address.version != 4:
        raise UserError(f"host: {host} is an IPv6 address, which Triton's front ends do not take; give IPv4")
    if not address.is_loopback:
        click.echo(f"warning: whoever reaches {host} can use the models; there is no password", err=True)


def run(
    repository: Path,
    http_port: int,
    as_json: bool,
    *,
    detach: bool,
    name: str | None,
    supervise: bool,
    host: str | None,
    grace: int | None,
    openai_port: int | None,
    **allowed: bool,
) -> None:
    """Serve a repository of an embedded engine, here or in the background."""
    from triton_repo import registry, rules, supervision
    from triton_repo.server import GRACE_S, Server

    if name is not None and not (detach or supervise):
        raise click.UsageError("--name belongs to --detach")
    if not supervise:
        check_host(host or LOOPBACK)
    configs = rules.check(repository)
    called = name or repository.resolve().name
    registry.place(called)
    if detach:
        if http_port == 0:
            raise click.UsageError("--detach needs a port; leave --http-port 0 out")
        record = supervision.detach(called, _again(repository, http_port, called))
        text = f"serving {repository} on {record.url} as {called}; `ffn-fusion stop {called}` ends it"
        emit({"repository": str(repository), "url": record.url, "name": called}, as_json, text)
        return
    server = Server(
        repository,
        http_port=http_port,
        host=host or LOOPBACK,
        grace_s=GRACE_S if grace is None else grace,
        control=allowed["allow_repository_control"],
        shared_memory=allowed["allow_shared_memory"],
        log=registry.place(called) / "triton.log" if supervise else None,
    )
    front = [] if openai_port is None else _front(repository, server, http_port, openai_port)
    if supervise:
        supervision.supervise(called, server, _text_model(configs), front=front)
        return

    def ready(running: Server) -> None:
        url = f"{running.url}/v2/models/{_text_model(configs)}/generate"
        emit({"repository": str(repository), "url": running.url}, as_json, f"serving {repository} on {url}")
        if openai_port is not None:
            click.echo(f"OpenAI's API on http://{server.host}:{openai_port}/v1", err=as_json)
        sys.stdout.flush()

    supervision.serve(server, lambda line: click.echo(line, err=True), ready, front=front)


def _again(repository: Path, http_port: int, name: str) -> list[str]:
    """This command line as the supervising process has it."""
    given = click.get_current_context().params
    line = [sys.executable, "-m", "ffn_fusion", "deploy", str(repository.resolve()), "--serve", "--supervise"]
    line += ["--name", name, "--http-port", str(http_port)]
    for flag, (kind, _) in _OPTIONS.items():
        value = given[flag.replace("-", "_")]
        if flag not in ("detach", "name", "supervise") and value not in (None, False):
            line += [f"--{flag}"] if kind is None else [f"--{flag}", str(value)]
    return line


def _text_model(configs: dict[str, Any]) -> str:
    return "ensemble" if "ensemble" in configs else "tensorrt_llm"


def _front(repository: Path, server: Any, http_port: int, openai_port: int) -> list[str]:
    """The command line of OpenAI's API beside the server."""
    from triton_repo import rules
    from triton_repo.openai import launch

    launch.check()
    if http_port == 0:
        raise click.UsageError("--openai-port needs a server's port; leave --http-port 0 out")
    tokens = rules.check(repository)["tensorrt_llm"]
    tokenizer = Path(tokens.parameters["tokenizer_dir"].string_value)
    grpc = f"{LOOPBACK if server.host == '0.0.0.0' else server.host}:{http_port + 1}"
    return launch.command(grpc, tokenizer, host=server.host, port=openai_port)
