"""The real tritonserver: penalties, bad words and log-probabilities reach the engine and come back."""

from __future__ import annotations

import json
import math
import queue
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_server import PROMPT

from builder import tokenizer as tokenizers
from builder.errors import UserError
from engines.embedded.session import Output, Request, Session
from triton_repo.client import Endpoint, generate
from triton_repo.repository import write_repository
from triton_repo.server import Server

LOG_PROBS = {"output_log_probs", "cum_log_probs"}


@pytest.fixture(scope="module")
def server(tiny_engine: Path, tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    output = tmp_path_factory.mktemp("repositories") / "tp1"
    write_repository(tiny_engine, tiny_hf, output)
    with Server(output) as running:
        yield running


def answers(server: Server, verb: str, **fields: Any) -> list[dict[str, Any]]:
    """The JSON of one response, or of a stream's."""
    request = urllib.request.Request(
        f"{server.url}/v2/models/ensemble/{verb}", json.dumps({"text_input": PROMPT, **fields}).encode()
    )
    with urllib.request.urlopen(request) as response:
        lines = response.read().decode().splitlines()
    return [json.loads(line.removeprefix("data:")) for line in lines if line]


class Engine:
    """What the engine gives without Triton."""

    def __init__(self, session: Session, directory: Path) -> None:
        self.session, self.tokenizer = session, tokenizers.load(directory)

    def outputs(self, **values: Any) -> list[Output]:
        ids = tuple(self.tokenizer.encode(PROMPT).ids)
        return list(self.session.generate(Request(input_ids=ids, end_id=0, **values)))

    def tokens(self, **values: Any) -> list[int]:
        return [token for output in self.outputs(**values) for token in output.token_ids]

    def text(self, **values: Any) -> str:
        return self.tokenizer.decode(self.tokens(**values))


@pytest.fixture(scope="module")
def engine(tiny_engine: Path, tiny_hf: Path) -> Iterator[Engine]:
    with Session(tiny_engine) as session:
        yield Engine(session, tiny_hf)


@pytest.mark.parametrize(
    "sampling",
    [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 0.75, "frequency_penalty": 0.5},
        {"temperature": 0.75, "seed": 5, "repetition_penalty": 1.25, "frequency_penalty": -0.5},
    ],
)
def test_penalties_are_the_engines(server: Server, engine: Engine, sampling: dict[str, float]) -> None:
    """Numbers that FP32 has exactly."""
    text = generate(Endpoint(server.url), PROMPT, max_tokens=40, **sampling)
    assert text == engine.text(max_tokens=40, **sampling)
    plain = {name: sampling[name] for name in sampling if not name.endswith("penalty")}
    assert text != generate(Endpoint(server.url), PROMPT, max_tokens=40, **plain)


def test_bad_words_are_never_said(server: Server, engine: Engine) -> None:
    def is_word(token: int) -> bool:
        return engine.tokenizer.encode(engine.tokenizer.decode([token])).ids == [token]

    word = next(token for token in engine.tokens(max_tokens=40) if is_word(token))
    end, text = Endpoint(server.url), engine.tokenizer.decode([word])
    banned = generate(end, PROMPT, max_tokens=40, bad_words=text)
    assert banned == engine.text(max_tokens=40, bad_words=((word,),)) != engine.text(max_tokens=40)
    assert word not in engine.tokens(max_tokens=40, bad_words=((word,),))


def test_no_end_before_min_tokens(server: Server, engine: Engine) -> None:
    tokens = engine.tokens(max_tokens=9)
    asked = {"max_tokens": 30, "end_id": tokens[2], "return_log_probs": True}
    (ended,) = answers(server, "generate", **asked)
    assert len(np.atleast_1d(ended["output_log_probs"])) == tokens.index(tokens[2]) < 12
    (longer,) = answers(server, "generate", min_tokens=12, **asked)
    assert len(longer["output_log_probs"]) >= 12


def test_neutral_values_ask_for_nothing(server: Server) -> None:
    neutral = {"repetition_penalty": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0}
    neutral |= {"length_penalty": 1.0, "beam_width": 1, "return_log_probs": False, "bad_words": ""}
    end = Endpoint(server.url)
    assert generate(end, PROMPT, max_tokens=20, **neutral) == generate(end, PROMPT, max_tokens=20)


def test_log_probs_are_the_engines(server: Server, engine: Engine) -> None:
    """All so far in every answer of a stream, as TensorRT-LLM gives them; none unless asked for."""
    sampling = {"max_tokens": 12, "temperature": 0.5, "seed": 3, "return_log_probs": True}
    outputs = engine.outputs(**sampling)
    expected = [value for output in outputs for value in output.log_probs]
    assert len(expected) == 12
    assert all(value < 0 for value in expected)
    assert outputs[-1].cum_log_prob == pytest.approx(math.fsum(expected))
    (whole,) = answers(server, "generate", **sampling)
    assert whole["output_log_probs"] == pytest.approx(expected, rel=1e-6)
    assert whole["cum_log_probs"] == pytest.approx(math.fsum(expected), rel=1e-6)
    pieces = answers(server, "generate_stream", stream=True, **sampling)
    assert len(pieces) == 12
    for count, piece in enumerate(pieces, 1):
        assert np.atleast_1d(piece["output_log_probs"]).tolist() == pytest.approx(expected[:count], rel=1e-6)
        assert piece["cum_log_probs"] == pytest.approx(math.fsum(expected[:count]), rel=1e-6)
    for fields in ({}, {"return_log_probs": False}):
        assert LOG_PROBS.isdisjoint(answers(server, "generate", max_tokens=3, **fields)[0])


def test_log_probs_have_tensorrt_llms_shapes(server: Server) -> None:
    """[batch, beams, tokens] and [batch, beams]."""
    from tritonclient import grpc

    def tensor(name: str, value: np.ndarray, kind: str) -> grpc.InferInput:
        made = grpc.InferInput(name, value.shape, kind)
        made.set_data_from_numpy(value)
        return made

    inputs = [
        tensor("text_input", np.array([[PROMPT.encode()]], object), "BYTES"),
        tensor("max_tokens", np.array([[5]], np.int32), "INT32"),
        tensor("return_log_probs", np.array([[True]]), "BOOL"),
    ]
    got: queue.Queue[Any] = queue.Queue()
    with grpc.InferenceServerClient(server.grpc_address) as client:
        client.start_stream(lambda result, error: got.put(error or result))
        client.async_stream_infer("ensemble", inputs)
        result = got.get(timeout=30)
        client.stop_stream()
    assert result.as_numpy("output_log_probs").shape == (1, 1, 5)
    assert result.as_numpy("cum_log_probs").shape == (1, 1)
    assert result.as_numpy("output_log_probs").sum() == pytest.approx(result.as_numpy("cum_log_probs").item())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beam_width": 2}, "beam_width: 2 is not supported"),
        ({"length_penalty": 2.0}, "len_penalty: 2.0 is not supported"),
        ({"return_context_logits": True}, "return_context_logits: True is not supported"),
        ({"return_generation_logits": True}, "return_generation_logits: True is not supported"),
        ({"repetition_penalty": -1.0}, "repetition_penalty: -1.0 is not between 0.0001"),
        ({"min_tokens": -2}, "min_tokens: -2 is negative"),
    ],
)
def test_what_it_cannot_do_is_still_named(server: Server, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(Endpoint(server.url), PROMPT, max_tokens=4, **fields)
