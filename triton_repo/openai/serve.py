"""The front end's process: it asks Triton what it serves, listens, and ends with its running requests."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from builder.errors import UserError
from triton_repo.openai import launch
from triton_repo.openai.app import Frontend
from triton_repo.openai.models import MODEL, limits_of, model_of
from triton_repo.openai.prompts import Limits, Prompts
from triton_repo.openai.upstream import Upstream


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`address` is host:port of Triton's gRPC. `model_name` None is the tokenizer directory's name.

    `max_seq_len` is for a server that does not tell its own. `timeout_s` bounds a request, `grace_s` the end.
    """

    address: str
    tokenizer: Path
    host: str = launch.HOST
    port: int = launch.PORT
    model_name: str | None = None
    max_seq_len: int | None = None
    timeout_s: float = 3600.0
    grace_s: float = launch.GRACE_S


def serve(settings: Settings, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; `say` gets the URL once it listens.

    Raises UserError where Triton does not answer, has no such model, or the port is taken.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    asyncio.run(_serve(settings, say))


async def _serve(settings: Settings, say: Callable[[str], None]) -> None:
    upstream = Upstream(settings.address, settings.timeout_s)
    try:
        frontend = await make_frontend(settings, upstream)
        with _listen(settings.host, settings.port) as listening:
            config = uvicorn.Config(
                frontend.app(),
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=math.ceil(settings.grace_s),
            )
            say(f"http://{_address(listening)}/v1")
            await uvicorn.Server(config).serve([listening])
    finally:
        await upstream.close()


async def make_frontend(settings: Settings, upstream: Upstream) -> Frontend:
    """What answers, from what Triton says of its model. Raises UserError where it has none."""
    config = await upstream.config(MODEL)
    limits = limits_of(config)
    if settings.max_seq_len is not None:
        limits = Limits(max_input_len=limits.max_input_len, max_seq_len=settings.max_seq_len)
    prompts = Prompts(settings.tokenizer, limits)
    name = settings.model_name or settings.tokenizer.resolve().name
    model = model_of(config, upstream, prompts)
    return Frontend(name=name, model=model, prompts=prompts, upstream=upstream)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise UserError(
            f"{host}:{port}: cannot listen: {error.strerror or error}; choose another --host or --port"
        ) from None


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
