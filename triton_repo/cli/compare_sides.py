"""What the two arguments of compare-latency are: URLs of servers, or engines that are served for it."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from builder.errors import UserError

if TYPE_CHECKING:
    from triton_repo.client import Endpoint


def facts(*given: str) -> dict[str, Any]:
    """What is known of both sides: of an engine all that its manifest says, of a URL itself."""
    return dict(zip(("baseline_facts", "candidate_facts"), map(_side, given), strict=True))


def _side(given: str) -> dict[str, Any]:
    from triton_repo.client import server_facts
    from triton_repo.facts import of_engine

    return server_facts(given) if is_url(given) else of_engine(Path(given))


def elsewhere(*given: str) -> tuple[str, ...]:
    """The report names the machine that measured; servers may run on another."""
    hosts = {urlsplit(text).hostname or "" for text in given if is_url(text)}
    if all(host in ("localhost", "::1") or host.startswith("127.") for host in hosts):
        return ()
    return ("The servers run on other machines: processor, GPUs and packages told below are the client's.",)


def is_url(given: str) -> bool:
    return given.startswith(("http://", "https://"))


def endpoint(stack: ExitStack, given: str, tokenizer: Path | None, model: str | None) -> Endpoint:
    """A running endpoint: the URL given, or a server started for the embedded engine given."""
    from engines import manifest
    from triton_repo.client import Endpoint, discover
    from triton_repo.repository import write_repository
    from triton_repo.server import Server

    if is_url(given):
        return discover(given, model)
    backend = manifest.read(Path(given)).backend
    if backend != "embedded":
        raise UserError(
            f"{given}: backend {backend}; serve it (deploy) and give the server's URL, or add --via "
            "trtllm-bench"
        )
    assert tokenizer is not None, "checked by the command"
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    write_repository(Path(given), tokenizer, scratch / "repository")
    return Endpoint(stack.enter_context(Server(scratch / "repository")).url)
