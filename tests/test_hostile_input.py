"""What a client may send a real tritonserver over HTTP: an answer or a clear error, and the server stays."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from triton_repo.client import Endpoint, generate
from triton_repo.processes import descendants
from triton_repo.repository import write_repository
from triton_repo.server import Server

PROMPT = "The quick brown fox"
# Triton's own HTTP front answers JSON that is none, and values of a wrong type, with status 500.
TRITONS = ("failed to parse", "Unable to parse", "attempt to ", "Unexpected", "not found in the JSON")
DEEP = 100_000


@pytest.fixture(scope="module")
def server(tiny_engine: Path, tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    output = tmp_path_factory.mktemp("repositories") / "tp1"
    write_repository(tiny_engine, tiny_hf, output)
    with Server(output) as running:
        yield running


class Connection:
    """One kept-alive connection, as clients have it."""

    def __init__(self, port: int) -> None:
        self.http = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def ask(self, body: bytes, verb: str = "generate", model: str = "ensemble") -> tuple[int, bytes]:
        self.http.request("POST", f"/v2/models/{model}/{verb}", body, {"Content-Type": "application/json"})
        response = self.http.getresponse()
        return response.status, response.read()


@pytest.fixture
def connection(server: Server) -> Iterator[Connection]:
    made = Connection(server.port)
    yield made
    made.http.close()


def request(**fields: Any) -> bytes:
    return json.dumps({"text_input": PROMPT, "max_tokens": 2, **fields}).encode()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (request(temprature=0.5), "temprature: no such field; did you mean temperature?"),
        (request(parameters={"foo": 1}), "foo: no such field; leave it out"),
        (request(foo=[1]), "parameter 'foo' has invalid type"),
        (request(max_tokens=-1), "max_tokens: -1 is not positive"),
        (request(max_tokens=2**31), "max_tokens: -2147483648 is not positive"),
        (request(temperature=float("nan")), "temperature: nan is not between"),
        (request(stop_words=[f"w{i}" for i in range(5000)]), "stop_words: 5000 words, at most 256"),
        (
            request(text_input="ab " * 3_500_000),
            "text_input: 10500000 bytes, more than the engine's max_input_len",
        ),
        (request(stop_words=["x" * 100_000]), "stop_words: 100000 bytes, more than"),
        (request(text_input="a" * 60_000), "max_input_len is 96"),
        (b'{"text_input": "\xff\xfe", "max_tokens": 2}', "text_input: not valid UTF-8"),
        (b'{"text_input": ' + b"[" * DEEP + b"]" * DEEP + b', "max_tokens": 2}', "text_input"),
        (request(text_input=["a", "b"]), "batch size does not match"),
        (b'{"max_tokens": 2}', "missing required input"),
    ],
)
def test_requests_are_refused(server: Server, connection: Connection, body: bytes, message: str) -> None:
    status, answer = connection.ask(body)
    assert status == 400, answer
    assert message in json.loads(answer)["error"]
    assert generate(Endpoint(server.url), PROMPT, max_tokens=2)


@pytest.mark.parametrize(
    "body",
    [b"", b"hello", b"[]", b"[" * 5_000_000, request(max_tokens="2"), b'{"text_input": "\\ud800"}'],
    ids=["empty", "words", "list", "brackets", "string", "surrogate"],
)
def test_json_that_tritons_front_does_not_read(server: Server, connection: Connection, body: bytes) -> None:
    status, answer = connection.ask(body)
    assert status == 500
    assert any(words in json.loads(answer)["error"] for words in TRITONS)
    assert generate(Endpoint(server.url), PROMPT, max_tokens=2)


def test_a_stream_is_refused_with_a_status(connection: Connection) -> None:
    status, answer = connection.ask(request(max_tokens=0, stream=True), "generate_stream")
    assert status == 400
    assert "max_tokens: 0 is not positive" in json.loads(answer.removeprefix(b"data: "))["error"]


def tensor(name: str, shape: list[int], data: list[Any], kind: str = "INT32") -> dict[str, Any]:
    return {"name": name, "datatype": kind, "shape": shape, "data": data}


LENGTH = tensor("SEQUENCE_LENGTH", [1, 1], [1])
FINAL = tensor("FINAL", [1, 1], [True], "BOOL")
PROMPT_OF_2 = {"input_ids": [1, 2], "input_lengths": 2, "request_output_len": 2}


@pytest.mark.parametrize(
    ("model", "body", "message"),
    [
        ("tensorrt_llm", {"streaming": False, "seed": 1, "end_id": 1}, "input_ids: missing"),
        ("tensorrt_llm", {**PROMPT_OF_2, "input_ids": [-1, 5]}, "input_ids: token -1 is not below"),
        ("tensorrt_llm", {**PROMPT_OF_2, "input_lengths": -2}, "input_ids: empty"),
        ("tensorrt_llm", {**PROMPT_OF_2, "stop_words_list": [1] * 1025 + [*range(1, 1026)]}, "at most 1024"),
        ("preprocessing", [tensor("END_ID", [1, 1], [1]), tensor("PAD_ID", [1, 1], [1])], "0 prompts"),
        ("postprocessing", [LENGTH, FINAL], "TOKENS_BATCH: missing"),
        ("postprocessing", [tensor("TOKENS_BATCH", [1, 1, 1], [-1]), LENGTH], "a token is negative"),
    ],
)
def test_the_steps_refuse_too(
    server: Server, connection: Connection, model: str, body: Any, message: str
) -> None:
    """Clients reach them by name. What is refused keeps no place in the queue."""
    whole, verb = ({"inputs": body}, "infer") if isinstance(body, list) else (body, "generate")
    for _ in range(300):  # more than batch and queue take
        status, answer = connection.ask(json.dumps(whole).encode(), verb, model)
        assert (status, message in json.loads(answer)["error"]) == (400, True), answer
    assert generate(Endpoint(server.url), PROMPT, max_tokens=2)


def test_an_end_that_is_no_token_ends_nothing(connection: Connection) -> None:
    body = {**PROMPT_OF_2, "end_id": 2**31 - 1, "min_tokens": 2}
    status, answer = connection.ask(json.dumps(body).encode(), model="tensorrt_llm")
    assert (status, len(json.loads(answer)["output_ids"])) == (200, 2)


TEXT = st.text(max_size=30)
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, 1, -1, 2**31, 2**63, 0.5, 1e-9])
)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXT),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
INT32 = st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 40)
FLOAT = st.floats(width=32) | st.floats(0, 2) | st.floats(-2, 2)
WORDS = st.lists(TEXT, max_size=4) | st.lists(TEXT, min_size=250, max_size=260)
TYPED = {
    **dict.fromkeys(("top_k", "min_tokens", "beam_width", "end_id", "pad_id"), INT32),
    **dict.fromkeys(("temperature", "top_p", "repetition_penalty", "presence_penalty"), FLOAT),
    **dict.fromkeys(("frequency_penalty", "length_penalty"), FLOAT),
    **dict.fromkeys(("return_log_probs", "stream", "return_context_logits"), st.booleans()),
    **dict.fromkeys(("stop_words", "bad_words"), WORDS),
    "seed": st.integers(0, 2**64 - 1),
    "id": TEXT,
}
FEW = st.lists(st.sampled_from(sorted(TYPED)), max_size=2, unique=True)


@st.composite
def typed(draw: st.DrawFn) -> dict[str, Any]:
    """Values of the right types, within their ranges or not, and sometimes a field that is none."""
    body = {"text_input": draw(st.text(max_size=40)), "max_tokens": draw(st.integers(-1, 6) | INT32)}
    body |= {name: draw(TYPED[name]) for name in draw(FEW)}
    return body | draw(st.dictionaries(TEXT, st.integers(0, 5), max_size=1) | st.just({}))


ANY_BODY = st.dictionaries(st.sampled_from([*TYPED, "text_input", "max_tokens"]) | TEXT, ANYTHING, max_size=5)
JSON = st.one_of(typed(), typed(), typed(), typed() | ANY_BODY).map(json.dumps).map(str.encode)
RAW = st.one_of(JSON, JSON, JSON, JSON, st.binary(max_size=60), JSON.map(lambda x: x[: len(x) // 2]))


def test_two_thousand_requests(server: Server) -> None:
    """Every answer is text, or an error that says why; afterwards all processes are the same."""
    seen = {"answers": 0, "refused": 0, "unread": 0}
    before = descendants(server.pid)
    expected = generate(Endpoint(server.url), PROMPT, max_tokens=8)
    connection = Connection(server.port)

    @settings(
        max_examples=2000,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(body=RAW, stream=st.booleans())
    def ask(body: bytes, stream: bool) -> None:
        status, answer = connection.ask(body, "generate_stream" if stream else "generate")
        if status == 200:
            seen["answers"] += 1
            assert b'"text_output"' in answer or b'"error"' in answer
            return
        error = json.loads(answer.removeprefix(b"data: "))["error"]
        assert error.strip()
        if status == 500:
            assert any(words in error for words in TRITONS), (body, error)
            seen["unread"] += 1
        else:
            assert status == 400, (body, status, error)
            seen["refused"] += 1

    ask()
    connection.http.close()
    assert sum(seen.values()) >= 2000
    assert min(seen.values()) > 50, seen
    assert generate(Endpoint(server.url), PROMPT, max_tokens=8) == expected
    assert descendants(server.pid) == before
