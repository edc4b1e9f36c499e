"""OpenAI's API in front of GPU engines' repositories, the embedded engine in the GPU's place."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from conftest import fused, write_llama
from openai_front import NAME, SLOW, TEMPLATE, Front, complete, front_end, joined, write_tokenizer_dir
from test_gpu_repositories import HERE, fake_engine, for_this_triton, stand_in, stopped, wait_for
from test_server import PROMPT, engine_text

from builder import export
from builder import tokenizer as tokenizers
from engines.trtllm import serving
from triton_repo.client import discover, generate
from triton_repo.openai import launch
from triton_repo.options import DeployOptions
from triton_repo.repository import write_repository
from triton_repo.server import Server


@pytest.fixture(scope="module")
def tokenizer_dir(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer_dir(tiny_hf, tmp_path_factory.mktemp("tokenizers") / NAME)


@pytest.fixture(scope="module")
def greedy(tiny_engine: Path, tiny_hf: Path) -> str:
    """What the engine itself gives."""
    return engine_text(tiny_engine, tiny_hf, PROMPT, 60)


@pytest.fixture(scope="module")
def slow(tiny_engine: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A GPU engine's repository, the embedded engine in its place, which can be slowed."""
    place = tmp_path_factory.mktemp("slow")
    write_repository(
        fake_engine(place / "engine", tiny_engine), tokenizer_dir, place / "repository", DeployOptions()
    )
    stand_in(place / "repository", "tensorrt_llm", tiny_engine, max_queue_size="4")
    for_this_triton(place / "repository")
    with Server(place / "repository") as server, front_end(server, tokenizer_dir) as running:
        yield running


def log_of(front: Front) -> Path:
    return front.server.repository.parent / "tensorrt_llm.log"


def test_gpu_repositories_answer_too(slow: Front, greedy: str) -> None:
    with slow.client() as asking:
        assert complete(asking, max_tokens=60).choices[0].text == greedy
        assert joined(complete(asking, max_tokens=60, stream=True)) == greedy


def test_a_client_that_goes_stops_the_work(slow: Front) -> None:
    """Of a stream, and of an answer that is waited for; 150 tokens would take 3 s."""
    before = stopped(log_of(slow))
    asked = {"prompt": "a", "max_tokens": 150, "seed": SLOW, "temperature": 1}
    with slow.client() as asking:
        with complete(asking, stream=True, **asked) as chunks:
            next(iter(chunks))
        wait_for(log_of(slow), before + 1)
        with pytest.raises(openai.APITimeoutError):
            complete(asking.with_options(timeout=0.5), **asked)
        wait_for(log_of(slow), before + 2)


def test_a_stop_string_stops_the_work(slow: Front) -> None:
    before = stopped(log_of(slow))
    with slow.client() as asking:
        asked = {"prompt": "a", "max_tokens": 150, "seed": SLOW, "temperature": 1}
        some = complete(asking, **{**asked, "max_tokens": 15}).choices[0].text
        answer = complete(asking, stop=some[2], **asked)
        assert answer.choices[0].text == some[: some.index(some[2])]
        wait_for(log_of(slow), before + 1)


def test_a_full_queue_is_503_and_says_when_to_try_again(slow: Front) -> None:
    """Four run and four wait."""

    def ask(number: int) -> openai.APIStatusError | None:
        try:
            complete(asking, prompt="a", max_tokens=30, seed=SLOW, temperature=1, stream=number % 2 == 0)
        except openai.APIStatusError as error:
            return error
        return None

    with slow.client() as asking, ThreadPoolExecutor(16) as pool:
        refused = [error for error in pool.map(ask, range(16)) if error is not None]
    assert 1 <= len(refused) <= 8
    for error in refused:
        assert (error.status_code, error.response.headers["Retry-After"]) == (503, "1")
        assert "the queue is full" in error.message


def test_told_to_end_it_finishes_what_runs(slow: Front, tokenizer_dir: Path) -> None:
    with front_end(slow.server, tokenizer_dir) as ending, ending.client() as asking:
        asked = {"prompt": "a", "max_tokens": 50, "seed": SLOW, "temperature": 1, "stream": True}
        chunks = iter(complete(asking, **asked, extra_body={"ignore_eos": True}))
        next(chunks)
        ending.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(ConnectionRefusedError):
            ending.request("GET", "/health")
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
        assert ending.process.wait(10) == 128 + signal.SIGTERM


def test_a_server_that_dies_is_an_error_event_and_503(slow: Front) -> None:
    """The last test of this server."""
    with slow.client() as asking:
        chunks = iter(complete(asking, max_tokens=150, seed=SLOW, temperature=1, stream=True))
        next(chunks)
        assert slow.server._process is not None
        os.kill(slow.server._process.pid, signal.SIGKILL)
        with pytest.raises(openai.APIError) as died:
            list(chunks)
        assert died.value.body is not None
        with pytest.raises(openai.InternalServerError) as refused:
            complete(asking, max_tokens=3)
        assert refused.value.status_code == 503
        assert refused.value.response.headers["Retry-After"] == "1"
    assert slow.request("GET", "/health")[0] == 503
    assert not launch.ready(slow.url.removesuffix("/v1"))


@pytest.fixture(scope="module")
def llm_api(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """The LLM API's repository, a stand-in over the embedded engine behind it."""
    place = tmp_path_factory.mktemp("llmapi")
    parent = write_llama(place / "parent", dtype="bfloat16")
    export.write(fused(parent), parent, place / "model")
    serving.write(serving.prepare(place / "model", serving.ServingOptions()), place / "engine")
    write_repository(place / "engine", None, place / "repository", DeployOptions(kv_cache_fraction=0.5))
    for_this_triton(place / "repository")
    code = place / "repository" / "tensorrt_llm" / "1"
    shutil.copytree(HERE / "standin_llm" / "tensorrt_llm", code / "tensorrt_llm")
    (place / "model" / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STANDIN_ENGINE", str(tiny_engine))
        patch.setenv("STANDIN_LOG", str(place / "llm.log"))
        with (
            Server(place / "repository") as server,
            front_end(server, place / "model", "--max-seq-len", "160") as running,
        ):
            yield running


def test_the_llm_api_answers_too(llm_api: Front, tokenizer_dir: Path) -> None:
    expected = generate(discover(llm_api.server.url), PROMPT, max_tokens=30)
    ids = tokenizers.load(tokenizer_dir).encode(PROMPT).ids
    with llm_api.client() as asking:
        answer = complete(asking, max_tokens=30)
        assert answer.choices[0].text == expected
        assert answer.choices[0].finish_reason == "length"
        assert 0 < answer.usage.completion_tokens <= 30
        assert joined(complete(asking, max_tokens=30, stream=True)) == expected
        assert complete(asking, prompt=ids, max_tokens=30).choices[0].text == expected
        stop = expected[20:23]
        ended = complete(asking, max_tokens=30, stop=stop).choices[0]
        assert (ended.text, ended.finish_reason) == (expected.partition(stop)[0], "stop")
        messages = [{"role": "user", "content": "def"}]
        chat = client_chat(asking, messages)
        assert chat == generate(discover(llm_api.server.url), "<user>def\n<assistant>", max_tokens=20)
        with pytest.raises(openai.BadRequestError, match="min_tokens: not known to the LLM API"):
            complete(asking, max_tokens=3, extra_body={"min_tokens": 2})


def client_chat(client: openai.OpenAI, messages: list[dict[str, str]]) -> str:
    answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=20, temperature=0)
    return answer.choices[0].message.content


def test_a_client_that_goes_stops_the_llm_api(llm_api: Front) -> None:
    log = llm_api.server.repository.parent / "llm.log"
    before = stopped(log)
    with llm_api.client() as asking:
        with complete(asking, prompt="a", max_tokens=150, seed=SLOW, temperature=1, stream=True) as chunks:
            next(iter(chunks))
        wait_for(log, before + 1)
