"""A client of Triton's generate endpoints that times what it receives."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from builder.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RequestTiming:
    """Seconds as the client sees them. A chunk is one streamed response, one token of the engine."""

    ttft_s: float
    inter_token_s: tuple[float, ...]
    latency_s: float
    text: str

    @property
    def num_chunks(self) -> int:
        return len(self.inter_token_s) + 1


@dataclass(frozen=True)
class Endpoint:
    """A model behind a Triton server's HTTP address."""

    url: str
    model: str = "ensemble"
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme != "http" or not parts.hostname:
            raise UserError(f"url: {self.url!r} is no http:// address; give e.g. http://127.0.0.1:8000")


@contextmanager
def _post(endpoint: Endpoint, verb: str, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
    """One request on a connection of its own: a kept one would delay the server's shutdown."""
    parts = urlsplit(endpoint.url)
    connection = http.client.HTTPConnection(
        parts.hostname or "", parts.port or 80, timeout=endpoint.timeout_s
    )
    path = f"{parts.path.rstrip('/')}/v2/models/{endpoint.model}/{verb}"
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise UserError(f"{endpoint.url}: {_error(response.read())} (HTTP {response.status})")
        yield response
    except TimeoutError:
        raise UserError(f"{endpoint.url}: no answer within {endpoint.timeout_s:.0f} s") from None
    except ConnectionRefusedError:
        raise UserError(f"{endpoint.url}: connection refused; is the server running?") from None
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{endpoint.url}: the server broke off ({error or type(error).__name__})") from None
    finally:
        connection.close()


def _error(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace").strip() or "no reason given"


def _event(endpoint: Endpoint, data: bytes) -> str:
    """The text of one response. Errors come with HTTP 200 too."""
    try:
        value = json.loads(data)
    except ValueError:
        raise UserError(f"{endpoint.url}: the server broke off inside a response") from None
    if "error" in value:
        raise UserError(f"{endpoint.url}: {value['error']}")
    return str(value["text_output"])


def generate(endpoint: Endpoint, prompt: str, *, max_tokens: int, **sampling: Any) -> str:
    """The whole continuation of `prompt`. Raises UserError naming the server."""
    with _post(
        endpoint, "generate", {"text_input": prompt, "max_tokens": max_tokens, **sampling}
    ) as response:
        return _event(endpoint, response.read())


def stream(endpoint: Endpoint, prompt: str, *, max_tokens: int, **sampling: Any) -> Iterator[str]:
    """The continuation as it comes, a piece a token; pieces may be empty."""
    body = {"text_input": prompt, "max_tokens": max_tokens, "stream": True, **sampling}
    with _post(endpoint, "generate_stream", body) as response:
        for line in response:
            if line.startswith(b"data:"):
                yield _event(endpoint, line[5:])


def measure(endpoint: Endpoint, prompt: str, *, max_tokens: int, **sampling: Any) -> RequestTiming:
    """Stream one request and time its chunks."""
    start = time.perf_counter()
    times, pieces = [], []
    for piece in stream(endpoint, prompt, max_tokens=max_tokens, **sampling):
        times.append(time.perf_counter())
        pieces.append(piece)
    if not times:
        raise UserError(f"{endpoint.url}: the stream ended without a token")
    return RequestTiming(
        ttft_s=times[0] - start,
        inter_token_s=tuple(b - a for a, b in pairwise(times)),
        latency_s=times[-1] - start,
        text="".join(pieces),
    )
