"""More requests than an engine's queue takes, and an engine that has died, on a real tritonserver."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from builder.errors import UserError
from triton_repo.client import Endpoint, generate, stream
from triton_repo.grpc_stream import GrpcStream
from triton_repo.options import DeployOptions
from triton_repo.processes import descendants
from triton_repo.repository import write_repository
from triton_repo.server import Server

QUEUE = 3  # beside the tiny engine's batch of 4
REFUSED = (400, 503)
FULL = "the queue is full: 3 requests wait; try again later"


@pytest.fixture(scope="module")
def server(tiny_engine: Path, tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    output = tmp_path_factory.mktemp("repositories") / "tp1"
    write_repository(tiny_engine, tiny_hf, output, DeployOptions(max_queue_size=QUEUE))
    with Server(output) as running:
        yield running


def post(port: int, body: dict, verb: str = "generate") -> tuple[int, bytes, float]:
    """Status, body and seconds."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    begin = time.monotonic()
    connection.request("POST", f"/v2/models/ensemble/{verb}", json.dumps(body))
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    return response.status, answer, time.monotonic() - begin


@pytest.mark.parametrize("verb", ["generate", "generate_stream"])
def test_more_than_the_queue_takes(server: Server, verb: str) -> None:
    """Of 40 at once some are answered, the same as alone; the others are refused, sooner than those.

    Triton 2.51 gives status 400 for whatever a model of an ensemble raises, also for UNAVAILABLE.
    """
    body = {"text_input": "The quick brown fox", "max_tokens": 60, "stream": verb == "generate_stream"}
    expected = generate(Endpoint(server.url), body["text_input"], max_tokens=60)
    found: list[tuple[int, bytes, float]] = []
    threads = [
        threading.Thread(target=lambda: found.append(post(server.port, body, verb)), daemon=True)
        for _ in range(40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    answered = [x for x in found if x[0] == 200]
    refused = [x for x in found if x[0] in REFUSED]
    assert len(answered) + len(refused) == 40, {x[0] for x in found}
    assert len(answered) >= 4 + QUEUE
    assert len(refused) >= 5
    assert {text(x[1]) for x in answered} == {expected}
    assert all(FULL in str(x[1]) for x in refused)
    assert max(x[2] for x in refused) < max(x[2] for x in answered)
    assert post(server.port, {"text_input": "a", "max_tokens": 1})[0] == 200


def text(answer: bytes) -> str:
    """Of a whole answer, or of a stream's events."""
    events = answer.split(b"\n\n") if answer.startswith(b"data: ") else [answer]
    return "".join(json.loads(x.removeprefix(b"data: "))["text_output"] for x in events if x)


def test_cancelled_requests_give_their_places_back(server: Server) -> None:
    """The rank stands still, so that no request ends by itself: batch and queue are full until they are
    cancelled, and then the next one runs as if they had never been."""
    end, prompt = Endpoint(server.url), "The quick brown fox"
    expected = generate(end, prompt, max_tokens=20)
    (rank,) = [pid for pid in descendants(server.pid) if "engines.embedded.worker" in command(pid)]
    os.kill(rank, signal.SIGSTOP)
    try:
        streams = [GrpcStream(server.grpc_address, prompt, max_tokens=100) for _ in range(4 + QUEUE + 1)]
        until(lambda: any(not one._answers.empty() for one in streams))
        (refused,) = [one for one in streams if not one._answers.empty()]
        with pytest.raises(UserError, match=FULL):
            next(refused)
        for one in streams:
            one.cancel()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(generate, end, prompt, max_tokens=20)
            with pytest.raises(TimeoutError):  # it has a place: one too many would be refused at once
                waiting.result(2)
            os.kill(rank, signal.SIGCONT)
            assert waiting.result(20) == expected
    finally:
        os.kill(rank, signal.SIGCONT)


def until(what: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def test_a_dead_engine_is_told_at_once_and_loads_again(server: Server) -> None:
    """Every request is refused until the model is unloaded and loaded; then all is as before."""
    end = Endpoint(server.url)
    expected = generate(end, "The quick", max_tokens=20)
    (rank,) = [pid for pid in descendants(server.pid) if "engines.embedded.worker" in command(pid)]
    os.kill(rank, signal.SIGKILL)
    for _ in range(3):
        status, answer, seconds = post(server.port, {"text_input": "a", "max_tokens": 4})
        assert (status in REFUSED, seconds < 5) == (True, True), answer
        assert "the engine died: rank 0 ended by SIGKILL" in str(answer)
    with pytest.raises(UserError, match="the engine died"):
        list(stream(end, "a", max_tokens=4))
    server.reload()
    assert generate(end, "The quick", max_tokens=20) == expected
    assert not alive(rank)


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
