"""The options of deploy --serve, and what it does with them."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from builder.errors import UserError
from builder.options import emit

if TYPE_CHECKING:
    from triton_repo.front import Front
    from triton_repo.server import Server

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


def given(serving: dict[str, Any]) -> list[str]:
    """`--openai-port` and what else was; 0 is something."""
    names = [name for name, value in serving.items() if value is not None and value is not False]
    return ["--" + name.replace("_", "-") for name in names]


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


def run(repository: Path, http_port: int, as_json: bool, **options: Any) -> None:
    """Serve a repository of an embedded engine, here or in the background."""
    from triton_repo import registry, rules, supervision

    detach, supervise = options["detach"], options["supervise"]
    if options["name"] is not None and not (detach or supervise):
        raise click.UsageError("--name belongs to --detach")
    if http_port == 0 and (detach or options["openai_port"] is not None):
        flag = "--detach" if detach else "--openai-port"
        raise click.UsageError(f"{flag} needs a server's port; leave --http-port 0 out")
    if not supervise:
        check_host(options["host"] or LOOPBACK)
    configs = rules.check(repository)
    name, model = options["name"] or repository.resolve().name, _text_model(configs)
    log = registry.place(name) / "triton.log" if supervise else None
    server = _server(repository, http_port, log, options)
    front = None if options["openai_port"] is None else _front(configs, server, options["openai_port"])
    if detach:
        record = supervision.detach(name, server, model, _again(repository, http_port, name))
        text = f"serving {repository} on {record.url} as {name}; `ffn-fusion stop {name}` ends it"
        emit({"repository": str(repository), "url": record.url, "name": name}, as_json, text)
    elif supervise:
        supervision.supervise(name, server, model, front=front)
    else:
        ready = partial(_ready, repository, model, options["openai_port"], as_json)
        supervision.serve(server, lambda line, _: click.echo(line, err=True), ready, front=front)


def _server(repository: Path, http_port: int, log: Path | None, options: dict[str, Any]) -> Server:
    from triton_repo.server import GRACE_S, Server

    return Server(
        repository,
        http_port=http_port,
        host=options["host"] or LOOPBACK,
        grace_s=GRACE_S if options["grace"] is None else options["grace"],
        control=options["allow_repository_control"],
        shared_memory=options["allow_shared_memory"],
        log=log,
    )


def _ready(repository: Path, model: str, openai_port: int | None, as_json: bool, server: Server) -> None:
    url = f"{server.url}/v2/models/{model}/generate"
    emit({"repository": str(repository), "url": server.url}, as_json, f"serving {repository} on {url}")
    if openai_port is not None:
        click.echo(f"OpenAI's API on http://{server.host}:{openai_port}/v1", err=as_json)
    sys.stdout.flush()


def _again(repository: Path, http_port: int, name: str) -> list[str]:
    """This command line as the supervising process has it."""
    options = click.get_current_context().params
    line = [sys.executable, "-m", "ffn_fusion", "deploy", str(repository.resolve()), "--serve", "--supervise"]
    line += ["--name", name, "--http-port", str(http_port)]
    for flag, (kind, _) in _OPTIONS.items():
        value = options[flag.replace("-", "_")]
        if flag not in ("detach", "name", "supervise") and value is not None and value is not False:
            line += [f"--{flag}"] if kind is None else [f"--{flag}", str(value)]
    return line


def _text_model(configs: dict[str, Any]) -> str:
    return "ensemble" if "ensemble" in configs else "tensorrt_llm"


def _front(configs: dict[str, Any], server: Server, port: int) -> Front:
    """OpenAI's API beside the server."""
    from triton_repo import ports
    from triton_repo.front import Front
    from triton_repo.openai import launch

    launch.check()
    ports.check(port, server.host, "openai_port")
    tokenizer = Path(configs["tensorrt_llm"].parameters["tokenizer_dir"].string_value)
    line = launch.command(server.grpc_address, tokenizer, host=server.host, port=port, grace_s=server.grace_s)
    return Front(line, server.grace_s)
