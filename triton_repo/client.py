"""A client of Triton's generate endpoints that times what it receives."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from builder.errors import UserError
from triton_repo.dialect import ENGINE, LLMAPI, Dialect, stream_id
from triton_repo.facts import FACTS


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

    @property
    def mean_gap_s(self) -> float:
        """Inter-token latency of the request; 0 of a single token."""
        return sum(self.inter_token_s) / max(1, len(self.inter_token_s))


@dataclass(frozen=True)
class Endpoint:
    """A model behind a Triton server's HTTP address; `discover` asks the server which one."""

    url: str
    model: str = ENGINE.model
    timeout_s: float = 120.0
    dialect: Dialect = ENGINE

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            valid = parts.scheme == "http" and parts.hostname and parts.port != 0
        except ValueError:  # a port that is none
            valid = False
        if not valid:
            raise UserError(f"url: {self.url!r} is no http:// address; give e.g. http://127.0.0.1:8000")


def discover(url: str, model: str | None = None) -> Endpoint:
    """The text model of a server, in the dialect that it speaks.

    Raises UserError where the server does not answer or has no model that takes text.
    """
    url = url.rstrip("/")
    for name in [model] if model else [ENGINE.model, LLMAPI.model]:
        inputs = _inputs(Endpoint(url, name))
        if inputs is None:
            continue
        for dialect in (ENGINE, LLMAPI):
            if {"text_input", dialect.max_tokens} <= inputs:
                return Endpoint(url, name, dialect=dialect)
    wanted = model or f"{ENGINE.model} or {LLMAPI.model}"
    raise UserError(f"{url}: serves no {wanted} that takes text; deploy a repository there")


def _inputs(endpoint: Endpoint) -> set[str] | None:
    """Names of the model's inputs; None where the server has no such model."""
    with _request(endpoint, "GET", "") as response:
        body = response.read()
        if response.status != 200:
            return None
    try:
        return {tensor["name"] for tensor in json.loads(body)["inputs"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{endpoint.url}: is no Triton server; give the HTTP address of one") from None


def takes(endpoint: Endpoint, sampling: str) -> bool:
    """Whether the model has the input of a sampling option, by our name for it."""
    name, _ = endpoint.dialect.sampling.get(sampling, (None, None))
    return name in (_inputs(endpoint) or ())


def model_statistics(endpoint: Endpoint) -> list[dict[str, Any]] | None:
    """`model_stats` of all models, by Triton's statistics extension; None where the server has none."""
    with _request(replace(endpoint, model="stats"), "GET", "") as response:  # in a model's place: of all
        body = response.read()
    try:
        return list(json.loads(body)["model_stats"])
    except (ValueError, KeyError, TypeError):
        return None


def server_facts(url: str) -> dict[str, Any]:
    """What a server's tensorrt_llm says of its engine; the URL alone where it says nothing."""
    url = url.rstrip("/")
    with _request(Endpoint(url, LLMAPI.model), "GET", "/config") as response:
        body = response.read()
    try:
        told = json.loads(body)["parameters"][FACTS]["string_value"]
        return {"engine": url, **json.loads(told)}
    except (ValueError, KeyError, TypeError):  # somebody else's repository
        return {"engine": url}


@contextmanager
def _request(
    endpoint: Endpoint, method: str, verb: str, body: dict[str, Any] | None = None
) -> Iterator[http.client.HTTPResponse]:
    """One request on a connection of its own: a kept one would delay the server's shutdown."""
    parts = urlsplit(endpoint.url)
    connection = http.client.HTTPConnection(
        parts.hostname or "", parts.port or 80, timeout=endpoint.timeout_s
    )
    path = f"{parts.path.rstrip('/')}/v2/models/{endpoint.model}{verb}"
    try:
        sent = None if body is None else json.dumps(body)
        connection.request(method, path, sent, {"Content-Type": "application/json"})
        yield connection.getresponse()
    except TimeoutError:
        raise UserError(f"{endpoint.url}: no answer within {endpoint.timeout_s:.0f} s") from None
    except ConnectionRefusedError:
        raise UserError(f"{endpoint.url}: connection refused; is the server running?") from None
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{endpoint.url}: the server broke off ({error or type(error).__name__})") from None
    finally:
        connection.close()


@contextmanager
def _post(endpoint: Endpoint, verb: str, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
    with _request(endpoint, "POST", f"/{verb}", body) as response:
        if response.status != 200:
            raise UserError(f"{endpoint.url}: {_error(response.read())} (HTTP {response.status})")
        yield response


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
    body = endpoint.dialect.body(prompt, max_tokens, False, sampling)
    with _post(endpoint, "generate", body) as response:
        return _event(endpoint, response.read())


def stream(endpoint: Endpoint, prompt: str, *, max_tokens: int, **sampling: Any) -> Iterator[str]:
    """The continuation as it comes, a piece a token; pieces may be empty."""
    body = endpoint.dialect.body(prompt, max_tokens, True, sampling)
    body["id"] = stream_id()
    with _post(endpoint, "generate_stream", body) as response:
        events = (_event(endpoint, line[5:]) for line in response if line.startswith(b"data:"))
        yield from pieces(events, endpoint.dialect, endpoint.url)


def pieces(texts: Iterator[str], dialect: Dialect, url: str) -> Iterator[str]:
    """What each streamed text adds. Raises UserError where a whole text does not begin as the last did."""
    if not dialect.cumulative:
        yield from texts
        return
    shown = ""
    for text in texts:
        if not text.startswith(shown):
            raise UserError(f"{url}: streamed text changed what it had said before; is model.py ours?")
        yield text[len(shown) :]
        shown = text


def measure(
    endpoint: Endpoint, prompt: str, *, max_tokens: int, since: float | None = None, **sampling: Any
) -> RequestTiming:
    """Stream one request and time its chunks, from now or from `since` on the clock of perf_counter."""
    start = time.perf_counter() if since is None else since
    times, texts = [], []
    for piece in stream(endpoint, prompt, max_tokens=max_tokens, **sampling):
        times.append(time.perf_counter())
        texts.append(piece)
    if not times:
        raise UserError(f"{endpoint.url}: the stream ended without a token")
    return RequestTiming(
        ttft_s=times[0] - start,
        inter_token_s=tuple(b - a for a, b in pairwise(times)),
        latency_s=times[-1] - start,
        text="".join(texts),
    )
