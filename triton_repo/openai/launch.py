"""The front end as a process of its own, beside a Triton server."""

from __future__ import annotations

import http.client
import importlib.util
import sys
from pathlib import Path
from urllib.parse import urlsplit

from builder.errors import UserError

HOST = "127.0.0.1"
PORT = 9000
GRACE_S = 30.0
_NEEDED = ("starlette", "uvicorn", "tritonclient", "grpc")


def check() -> None:
    """Raises UserError where a package is missing."""
    for name in _NEEDED:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is missing; pip install 'ffn-fusion[openai]'")


def command(
    address: str,
    tokenizer: Path,
    *,
    host: str = HOST,
    port: int = PORT,
    model_name: str | None = None,
    grace_s: float = GRACE_S,
) -> list[str]:
    """What starts it for the Triton server at `address`, host:port of its gRPC.

    The process prints its URL once it listens. SIGTERM ends it after `grace_s` seconds at most.
    """
    line = [sys.executable, "-m", "ffn_fusion", "serve-openai", address, "--tokenizer", str(tokenizer)]
    line += ["--host", host, "--port", str(port), "--grace", f"{grace_s:g}"]
    return line + (["--model-name", model_name] if model_name else [])


def ready(url: str, timeout_s: float = 5.0) -> bool:
    """Whether it and the Triton server behind it can answer."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        connection.request("GET", "/health", headers={"Connection": "close"})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
