"""The pieces of OpenAI's API that need no server: chat templates, growing text, stop strings, bodies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from builder import tokenizer as tokenizers
from builder.errors import UserError
from triton_repo.facts import FACTS
from triton_repo.openai import fields, requests
from triton_repo.openai.app import _Bounded
from triton_repo.openai.chat_template import ChatTemplate
from triton_repo.openai.continuation import Ending, Piece, Step, from_texts, from_tokens
from triton_repo.openai.errors import ApiError
from triton_repo.openai.models import limits_of
from triton_repo.openai.prompts import Limits, Prompt, Prompts
from triton_repo.openai.text import GrowingText, StopStrings
from triton_repo.openai.upstream import _code, _failure

CHATML = """{%- for m in messages %}
    {{- '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
BEGINS = """{{ bos_token }}{% set ns = namespace(last='') %}
{% for m in messages %}
  {% if m.role == 'skipped' %}{% continue %}{% endif %}
  {% set ns.last = m.content %}
[{{ m.role | upper }}{% if m.name is defined %} {{ m.name }}{% endif %}] {{ m.content | tojson }}
  {{ loop.index }}
  {% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}
{% endfor %}
{{ ns.last }} {{ strftime_now('%Y') }} {{ tools is none }} {{ mood | default('none') }}"""
MESSAGES = (
    {"role": "system", "content": "  naïve <b>café</b> & 'quotes' \n"},
    {"role": "skipped", "content": "x"},
    {"role": "user", "content": "日本語 🙂\n\ttab", "name": "Ann"},
    {"role": "assistant", "content": ""},
)


def directory_with(place: Path, template: Any, **config: Any) -> Path:
    """A tokenizer's directory; a list or None goes into tokenizer_config.json, a text into its own file."""
    place.mkdir()
    write_tokenizer(place)
    file = place / "tokenizer_config.json"
    values = {**json.loads(file.read_text()), "bos_token": "<|endoftext|>", **config}
    if isinstance(template, str):
        (place / "chat_template.jinja").write_text(template)
    elif template is not None:
        values["chat_template"] = template
    file.write_text(json.dumps(values))
    return place


@pytest.mark.parametrize("template", [CHATML, BEGINS])
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("how", ["file", "config", "named"])
def test_templates_render_as_transformers_does(tmp_path: Path, template: str, add: bool, how: str) -> None:
    from transformers import AutoTokenizer

    if how == "file":
        directory = directory_with(tmp_path / "t", template)
    elif how == "config":
        directory = directory_with(tmp_path / "t", None, chat_template=template)
    else:
        named = [{"name": "default", "template": template}, {"name": "tool_use", "template": "no"}]
        directory = directory_with(tmp_path / "t", named)
    expected = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        list(MESSAGES), tokenize=False, add_generation_prompt=add, mood="good"
    )
    ours = ChatTemplate(directory).render(MESSAGES, add_generation_prompt=add, variables={"mood": "good"})
    assert ours == expected
    assert len(ours) > 50


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "is unsafe"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages + 1 }}", "can only concatenate"),
        ("{{ raise_exception('half \\ud800') }}", "half "),
    ],
)
def test_templates_are_data(tmp_path: Path, template: str, reason: str) -> None:
    with pytest.raises(ApiError, match=reason) as refused:
        ChatTemplate(directory_with(tmp_path / "t", template)).render(MESSAGES)
    assert refused.value.status == 400
    assert json.dumps(refused.value.body(), ensure_ascii=False).encode()


def test_templates_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"chat_template.jinja: its chat template cannot be read"):
        ChatTemplate(directory_with(tmp_path / "a", "{% for %}"))
    with pytest.raises(UserError, match=r"tokenizer_config.json: its chat template cannot be read"):
        ChatTemplate(directory_with(tmp_path / "b", {"no": "text"}))
    with pytest.raises(ApiError, match="has no chat template"):
        ChatTemplate(directory_with(tmp_path / "c", None)).render(MESSAGES)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory_with(tmp_path_factory.mktemp("tokenizers") / "t", CHATML)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Any:
    return tokenizers.load(directory)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ids=st.lists(st.lists(st.integers(0, 319), max_size=4), max_size=40), text=st.text(max_size=40))
def test_pieces_join_to_the_whole_text(tokenizer: Any, ids: list[list[int]], text: str) -> None:
    """Split and invalid characters too."""
    steps = [*ids, *([i] for i in tokenizer.encode(text).ids)]
    growing = GrowingText(tokenizer)
    pieces = [growing.push(step) for step in steps]
    whole = tokenizer.decode([token for step in steps for token in step])
    assert "".join(pieces) + growing.push((), final=True) == whole


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    pieces=st.lists(st.text("ab ", max_size=4), max_size=12),
    strings=st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_are_found_over_pieces(pieces: list[str], strings: list[str]) -> None:
    stops, shown, whole = StopStrings(strings), "", "".join(pieces)
    for piece in pieces:
        shown += stops.push(piece)
        assert whole.startswith(shown)
        if stops.found:
            break
    else:
        shown += stops.push("", final=True)
    assert stops.found == any(string in whole for string in strings)
    if stops.found:
        assert not any(string in shown for string in strings)
        assert any(whole[len(shown) :].startswith(string) for string in strings)
    else:
        assert shown == whole


def collect(pieces: AsyncIterator[Piece]) -> list[Piece]:
    async def gather() -> list[Piece]:
        return [piece async for piece in pieces]

    return asyncio.run(gather())


async def each(values: Any) -> AsyncIterator[Any]:
    for value in values:
        yield value


@pytest.mark.parametrize(
    ("ids", "reason", "count"),
    [
        ([[10], [11], [12]], "length", 3),
        ([[10], [11], []], "stop", 2),  # the engine keeps its end token
        ([[10], [11], [5]], "stop", 2),  # one of several end tokens, told
        ([[10, 11, 12]], "length", 3),
        ([[10, 11, 5]], "stop", 2),
        ([[]], "stop", 0),
        ([], "stop", 0),
    ],
)
def test_why_an_answer_ended(tokenizer: Any, ids: list[list[int]], reason: str, count: int) -> None:
    steps = each([Step(token_ids=tuple(step)) for step in ids])
    pieces = collect(from_tokens(steps, tokenizer, Ending(max_tokens=3, token_ids=frozenset({5}))))
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [reason]
    assert sum(piece.num_tokens for piece in pieces) == count


def test_whole_texts_become_pieces(tokenizer: Any) -> None:
    ending = Ending(max_tokens=9, strings=("stop",))
    told = [("a", None), ("a b s", None), ("a b sto", None), ("a b stopped", "length")]
    pieces = collect(from_texts(each(told), tokenizer, ending))
    assert "".join(piece.text for piece in pieces) == "a b "
    assert pieces[-1].finish_reason == "stop"
    pieces = collect(from_texts(each([*told[:3], ("a b sto", "length")]), tokenizer, ending))
    assert "".join(piece.text for piece in pieces) == "a b sto"
    assert pieces[-1].finish_reason == "length"
    with pytest.raises(ApiError, match="changed what it had said"):
        collect(from_texts(each([("a", None), ("b", "stop")]), tokenizer, ending))
    with pytest.raises(ApiError, match="without a reason"):
        collect(from_texts(each([("a", None)]), tokenizer, ending))


def test_a_text_for_a_server_that_begins_by_itself(tmp_path: Path) -> None:
    """The template's own begin token is left to the server, so that there is one."""
    from tokenizers import Tokenizer, processors

    directory = directory_with(tmp_path / "t", "{{ bos_token }}{{ messages[0].content }}")
    words = Tokenizer.from_file(str(directory / "tokenizer.json"))
    words.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    words.save(str(directory / "tokenizer.json"))
    prompts = Prompts(directory, Limits())
    asked = {"model": "t", "messages": [{"role": "user", "content": "def main"}]}
    prompt = prompts.of(requests.chat(fields.Fields(asked)))
    plain = tuple(words.encode("def main", add_special_tokens=False).ids)
    assert prompt.ids == (0, *plain)
    assert prompts.as_text(prompt) == "def main"
    assert prompts.as_text(Prompt(ids=(0, *plain), text=None)) == "def main"
    with pytest.raises(ApiError, match="no text becomes exactly these tokens"):
        prompts.as_text(Prompt(ids=plain, text=None))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = [
    *requests.Options.__dataclass_fields__,
    *("prompt", "messages", "echo", "n", "logprobs", "stream_options", "chat_template_kwargs", "suffix"),
]


@settings(max_examples=500, deadline=None, derandomize=True)
@given(body=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4), valid=st.booleans())
def test_any_body_is_a_request_or_refused(body: dict[str, Any], valid: bool) -> None:
    base: dict[str, Any] = {"model": "m", "prompt": "a"} if valid else {}
    chat = {"model": "m", "messages": [{"role": "user", "content": "a"}]} if valid else {}
    for parse, values in ((requests.completion, {**base, **body}), (requests.chat, {**chat, **body})):
        try:
            parse(fields.parse(json.dumps(values).encode()))
        except ApiError as error:
            assert error.status == 400  # noqa: PT017  (most bodies are good or bad by chance)
            json.dumps(error.body()).encode()


def test_no_more_requests_than_bounded() -> None:
    async def ask() -> list[dict[str, Any]]:
        go = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await go.wait()

        bounded, sent = _Bounded(app, 1), []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            raise AssertionError("a refused request is not read")

        scope = {"type": "http", "method": "POST", "headers": []}
        first = asyncio.create_task(bounded(scope, receive, send))
        await asyncio.sleep(0)
        await bounded(scope, receive, send)
        go.set()
        await first
        refused = list(sent)
        await bounded(scope, receive, send)
        assert sent == refused
        return refused

    start, body = asyncio.run(ask())
    assert start["status"] == 429
    assert (b"retry-after", b"1") in start["headers"]
    assert json.loads(body["body"])["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize(
    ("code", "status", "retry"),
    [
        ("INVALID_ARGUMENT", 400, None),
        ("RESOURCE_EXHAUSTED", 429, 1),
        ("UNAVAILABLE", 503, 1),
        ("DEADLINE_EXCEEDED", 504, None),
        ("INTERNAL", 500, None),
    ],
)
def test_tritons_errors_keep_their_meaning(code: str, status: int, retry: int | None) -> None:
    error = _failure(code, "the queue\n is full")
    assert (error.status, error.retry_after_s, error.message) == (status, retry, "the queue is full")


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (
            "max_tokens: 9 after 5 input tokens, the engine's max_seq_len is 9",
            "INVALID_ARGUMENT",
        ),
        ("temperature: -1.0 is not between 0 and 10000; 0 is greedy", "INVALID_ARGUMENT"),
        ("the queue is full: 4 requests wait; try again later", "UNAVAILABLE"),
        ("the engine died: rank 0 ended by SIGKILL", "UNAVAILABLE"),
        ("[request id: 5] Exceeds maximum queue size", "UNAVAILABLE"),
        ("Stub process 'tensorrt_llm_0_0' is not healthy.", "UNAVAILABLE"),
        ("Request for unknown model: 'tensorrt_llm' is not found", "UNAVAILABLE"),
        ("RuntimeError: CUDA out of memory", "INTERNAL"),
    ],
)
def test_errors_of_models_are_told_apart(said: str, code: str) -> None:
    assert _code(said) == code


def test_limits_are_what_the_server_tells(tiny_engine: Path) -> None:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    config = ModelConfig()
    assert limits_of(config) == Limits()
    config.parameters["gpt_model_path"].string_value = str(tiny_engine)
    assert limits_of(config) == Limits(max_input_len=96, max_seq_len=160)
    config.parameters[FACTS].string_value = json.dumps({"max_input_len": 5, "max_seq_len": 9})
    assert limits_of(config) == Limits(max_input_len=5, max_seq_len=9)
