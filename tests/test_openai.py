"""OpenAI's API in front of the real tritonserver, asked by the real `openai` client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from click.testing import CliRunner
from openai_front import NAME, Front, complete, front_end, joined, write_tokenizer_dir
from test_server import PROMPT

from builder import tokenizer as tokenizers
from ffn_fusion import main
from triton_repo.client import Endpoint, generate
from triton_repo.openai import launch
from triton_repo.repository import write_repository
from triton_repo.server import Server


@pytest.fixture(scope="module")
def tokenizer_dir(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer_dir(tiny_hf, tmp_path_factory.mktemp("tokenizers") / NAME)


@pytest.fixture(scope="module")
def front(
    tiny_engine: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Front]:
    repository = tmp_path_factory.mktemp("repositories") / "embedded"
    write_repository(tiny_engine, tokenizer_dir, repository)
    with Server(repository) as server, front_end(server, tokenizer_dir) as running:
        yield running


@pytest.fixture(scope="module")
def client(front: Front) -> Iterator[openai.OpenAI]:
    with front.client() as opened:
        yield opened


@pytest.fixture(scope="module")
def greedy(front: Front) -> str:
    """What Triton's own ensemble gives."""
    return generate(Endpoint(front.server.url), PROMPT, max_tokens=60)


def test_completion_is_the_ensembles(client: openai.OpenAI, greedy: str) -> None:
    answer = complete(client, max_tokens=60)
    assert answer.choices[0].text == greedy
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion"
    assert answer.usage.completion_tokens == 60
    assert answer.usage.total_tokens == 60 + answer.usage.prompt_tokens


def test_stream_is_the_same(client: openai.OpenAI, greedy: str) -> None:
    chunks = list(complete(client, max_tokens=60, stream=True, stream_options={"include_usage": True}))
    assert len(chunks) > 20
    assert joined(chunks) == greedy
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 60


def test_token_ids_are_a_prompt(client: openai.OpenAI, tokenizer_dir: Path, greedy: str) -> None:
    ids = tokenizers.load(tokenizer_dir).encode(PROMPT).ids
    for prompt in (ids, [ids], [PROMPT]):
        answer = complete(client, prompt=prompt, max_tokens=60)
        assert answer.choices[0].text == greedy
        assert answer.usage.prompt_tokens == len(ids)


def test_echo(client: openai.OpenAI, greedy: str) -> None:
    assert complete(client, max_tokens=60, echo=True).choices[0].text == PROMPT + greedy
    assert joined(complete(client, max_tokens=60, echo=True, stream=True)) == PROMPT + greedy


def test_all_that_fits_unless_asked(client: openai.OpenAI) -> None:
    answer = complete(client, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 160
    assert answer.choices[0].finish_reason == "length"


def test_seeds_repeat_and_none_does_not(client: openai.OpenAI, front: Front) -> None:
    sampling = {"temperature": 0.9, "top_p": 0.95}
    texts = [complete(client, max_tokens=30, seed=seed, **sampling).choices[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0] == generate(Endpoint(front.server.url), PROMPT, max_tokens=30, seed=1, **sampling)
    unseeded = {complete(client, max_tokens=30, temperature=1).choices[0].text for _ in range(3)}
    assert len(unseeded) == 3


@pytest.mark.parametrize(
    ("asked", "sampling"),
    [
        ({"presence_penalty": 1.5, "frequency_penalty": 0.5}, {}),
        ({"extra_body": {"repetition_penalty": 1.5}}, {"repetition_penalty": 1.5}),
        (
            {"extra_body": {"top_k": 5}, "temperature": 1, "seed": 3},
            {"temperature": 1.0, "top_k": 5, "seed": 3, "top_p": 1.0},
        ),
    ],
)
def test_sampling_reaches_the_engine(
    client: openai.OpenAI, front: Front, greedy: str, asked: dict, sampling: dict
) -> None:
    plain = {name: value for name, value in asked.items() if name.endswith("_penalty")}
    expected = generate(Endpoint(front.server.url), PROMPT, max_tokens=60, **{**plain, **sampling})
    assert complete(client, max_tokens=60, **asked).choices[0].text == expected != greedy


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text_before_them(client: openai.OpenAI, greedy: str, stream: bool) -> None:
    """One that is no token of its own, so that the engine cannot know of it."""
    stop = greedy[20:23]
    assert greedy.index(stop) > 0
    answer = complete(client, max_tokens=60, stop=["nowhere", stop], stream=stream)
    chunks = list(answer) if stream else [answer]
    text = joined(chunks)
    assert text == greedy.partition(stop)[0]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_an_end_token_ends_with_stop(client: openai.OpenAI, front: Front, tokenizer_dir: Path) -> None:
    """At the last token that was asked for as well."""
    tokenizer = tokenizers.load(tokenizer_dir)
    known = complete(client, max_tokens=12, logprobs=0)
    assert len(known.choices[0].logprobs.tokens) == 12
    vocabulary = {tokenizer.decode([i], skip_special_tokens=False): i for i in range(320)}
    place, token = next(
        (i, t) for i, t in enumerate(known.choices[0].logprobs.tokens) if i > 2 and t.isascii()
    )
    first = known.choices[0].logprobs.tokens.index(token)
    for limit in (first + 1, place + 5):
        more = {"stop_token_ids": [vocabulary[token]]}
        ended = complete(client, max_tokens=limit, extra_body=more)
        assert ended.choices[0].finish_reason == "stop"
        assert ended.usage.completion_tokens == first
    longer = complete(client, max_tokens=40, extra_body={**more, "min_tokens": 20})
    assert longer.usage.completion_tokens >= 20


def test_log_probs_are_the_chosen_tokens(client: openai.OpenAI, front: Front) -> None:
    answer = complete(client, max_tokens=12, logprobs=0).choices[0].logprobs
    assert all(value < 0 for value in answer.token_logprobs)
    streamed = list(complete(client, max_tokens=12, logprobs=0, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in streamed]
    assert [value for part in parts for value in part.token_logprobs] == answer.token_logprobs
    assert [token for part in parts for token in part.tokens] == answer.tokens
    messages = [{"role": "user", "content": "hi"}]
    told = client.chat.completions.create(
        model=NAME, messages=messages, max_completion_tokens=5, logprobs=True
    )
    assert len(told.choices[0].logprobs.content) == 5
    assert told.choices[0].logprobs.content[0].top_logprobs == []


def test_chat_is_the_template_completed(client: openai.OpenAI, tokenizer_dir: Path) -> None:
    messages = [
        {"role": "system", "content": "naïve café"},
        {"role": "user", "content": [{"type": "text", "text": "def"}, {"type": "text", "text": "main"}]},
    ]
    prompt = "<system>naïve café\n<user>def\nmain\n<assistant>"
    expected = complete(client, prompt=prompt, max_tokens=40)
    asked = {"model": NAME, "messages": messages, "max_completion_tokens": 40, "temperature": 0}
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == expected.choices[0].text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(tokenizers.load(tokenizer_dir).encode(prompt).ids)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.choices[0].text
    assert chunks[-1].choices[0].finish_reason == expected.choices[0].finish_reason


def test_an_answer_can_be_sent_back_as_it_is(client: openai.OpenAI) -> None:
    asked = {"model": NAME, "max_completion_tokens": 4, "temperature": 0}
    messages: list[Any] = [{"role": "user", "content": "a"}]
    answer = client.chat.completions.create(messages=messages, **asked).choices[0].message
    again = [*messages, answer.model_dump(), {"role": "user", "content": "b"}]
    told = client.chat.completions.create(messages=again, **asked)
    prompt = f"<user>a\n<assistant>{answer.content}\n<user>b\n<assistant>"
    assert told.choices[0].message.content == complete(client, prompt=prompt, max_tokens=4).choices[0].text


def test_models_and_health(client: openai.OpenAI, front: Front) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).object == "model"
    with pytest.raises(openai.NotFoundError, match="no other here"):
        client.models.retrieve("other")
    assert front.request("GET", "/health")[0] == 200
    assert launch.ready(front.url.removesuffix("/v1"))


def test_many_streams_do_not_mix(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "def main(", "a", "lazy dog " * 5, "café", "x = ", "日本", "return 0"]
    alone = [complete(client, prompt=prompt, max_tokens=25).choices[0].text for prompt in prompts]

    def streamed(prompt: str) -> str:
        return joined(complete(client, prompt=prompt, max_tokens=25, stream=True))

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(streamed, prompts * 4)) == alone * 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [320]}, "prompt"),
        ({"prompt": "x" * 500}, "prompt"),
        ({"prompt": "x" * 1_000_000}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"max_tokens": 160}, "max_tokens"),
        ({"max_tokens": "4"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"logprobs": 5}, "logprobs"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": 5}, "stop"),
        ({"suffix": "x"}, "suffix"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": "yes"}, "stream"),
        ({"seed": 2**70}, "seed"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
    ],
)
def test_what_cannot_be_is_named(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, **fields)
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"
    assert f"{param}: " in refused.value.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": ["a"]}, "messages[0]"),
        ({"messages": [{"content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a", "mood": "b"}]}, "messages[0].mood"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_what_chat_cannot_be_is_named(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    asked = {"model": NAME, "messages": [{"role": "user", "content": "a"}], **fields}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked)
    assert refused.value.param == param


def test_a_model_of_another_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        complete(client, model="other")
    assert refused.value.code == "model_not_found"


GOOD = json.dumps({"model": NAME, "prompt": "a", "max_tokens": 1}).encode()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'"text"', 400),
        (b"\xff\xfe{}", 400),
        (b"[" * 200_000, 400),
        (b'{"model": "tiny", "prompt": ' + b"[" * 200_000, 400),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400),
        (b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', 400),
        (b'{"model": "tiny", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", 400),
        (b'{"model": "tiny", "prompt": "a\\ud800"}', 400),
        (b'{"model": "tiny", "prompt": "a", "stop": "\\udfff"}', 400),
        (b'{"model": "tiny", "prompt": "a", "\\ud800": 1}', 400),
        (b'{"model": "\\ud800", "prompt": "a"}', 400),
        (b'{"prompt": "a"}', 400),
        (b'{"model": "tiny"}', 400),
        (b" " * (5 * 2**20), 413),
    ],
)
def test_malformed_bodies(front: Front, body: bytes, status: int) -> None:
    answered, _, told = front.request("POST", "/v1/completions", body)
    assert answered == status
    assert set(told["error"]) == {"message", "type", "param", "code"}
    assert front.request("POST", "/v1/completions", GOOD)[0] == 200


def test_other_paths_and_methods(front: Front) -> None:
    for method, path, status in (("GET", "/v1/completions", 405), ("POST", "/v1/embeddings", 404)):
        answered, _, told = front.request(method, path)
        assert answered == status
        assert path in told["error"]["message"]


def test_a_template_is_needed_for_chat(front: Front, tiny_hf: Path) -> None:
    with front_end(front.server, tiny_hf) as bare, bare.client() as asking:
        with pytest.raises(openai.BadRequestError, match="the tokenizer has no chat template"):
            asking.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "a"}])
        assert complete(asking, max_tokens=3).usage.completion_tokens == 3


def test_wrong_starts(front: Front, tokenizer_dir: Path) -> None:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["serve-openai", *arguments])

    nobody = run("127.0.0.1:1", "--tokenizer", str(tokenizer_dir))
    assert nobody.exit_code == 1
    assert "127.0.0.1:1: no model tensorrt_llm" in nobody.stderr
    port = str(urlsplit(front.url).port)
    taken = run(front.server.grpc_address, "--tokenizer", str(tokenizer_dir), "--port", port)
    assert taken.exit_code == 1
    assert f"127.0.0.1:{port}: cannot listen: Address already in use" in taken.stderr
    open_to_all = run("127.0.0.1:1", "--tokenizer", str(tokenizer_dir), "--host", "0.0.0.0")
    assert "warning: whoever reaches 0.0.0.0 can use the models" in open_to_all.stderr
    assert "warning" not in nobody.stderr
    missing = run(front.server.grpc_address, "--tokenizer", str(tokenizer_dir / "no"))
    assert missing.exit_code == 1
    assert "tokenizer.json: missing" in missing.stderr
