"""What the two endpoints are asked: which fields they know, their ranges and what they mean when left out."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from triton_repo.openai import fields
from triton_repo.openai.errors import refuse
from triton_repo.openai.fields import Fields

MAX_STOPS = 4
LARGEST = 1e4  # of repetition penalties, as the embedded engine has it
_CHOSEN_ONLY = "only the log-probabilities of the chosen tokens are known"
_UNSUPPORTED = "unsupported_parameter"
_ONE = "one answer a request"
Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to continue a prompt. `max_tokens` None is as many as fit, `temperature` 0 is greedy.

    From `top_k` to `stop_token_ids` they are vLLM's additions to OpenAI's fields.
    """

    model: str
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]
    presence_penalty: float
    frequency_penalty: float
    stream: bool
    include_usage: bool
    log_probs: bool
    top_k: int
    min_tokens: int
    repetition_penalty: float
    ignore_eos: bool
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """/v1/completions: a text, or its tokens; `echo` has it repeated before the answer."""

    prompt: str | tuple[int, ...]
    echo: bool
    options: Options


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """/v1/chat/completions; `variables` are more names for the chat template."""

    messages: tuple[Message, ...]
    add_generation_prompt: bool
    variables: dict[str, Any]
    options: Options


def completion(given: Fields) -> CompletionRequest:
    """Raises ApiError naming the field that is wrong, unknown, or asks for what is not there."""
    log_probs = given.take("logprobs", fields.integer(0), None)
    if log_probs:
        raise refuse("logprobs", f"{_CHOSEN_ONLY}; give 0", _UNSUPPORTED)
    echo = given.take("echo", fields.boolean, False)
    if echo and log_probs is not None:
        raise refuse("echo", "the prompt has no log-probabilities; leave out logprobs", _UNSUPPORTED)
    given.only("best_of", 1, why=_ONE)
    given.only("suffix", "", why="text is only made at the end")
    prompt = given.require("prompt", _prompt)
    limit = given.take("max_tokens", fields.integer(1), None)
    options = _options(given, limit, log_probs is not None)
    return CompletionRequest(prompt=prompt, echo=echo, options=options)


def chat(given: Fields) -> ChatRequest:
    """Raises ApiError naming the field that is wrong, unknown, or asks for what is not there."""
    log_probs = given.take("logprobs", fields.boolean, False)
    given.only("top_logprobs", 0, why=_CHOSEN_ONLY)
    given.only("tools", [], why="tool calls are not supported")
    given.only("tool_choice", "none", why="tool calls are not supported")
    given.only("functions", [], why="tool calls are not supported")
    given.only("function_call", "none", why="tool calls are not supported")
    given.only("response_format", {"type": "text"}, why="only text is made")
    given.only("modalities", ["text"], why="only text is made")
    messages = given.require("messages", _messages)
    old, new = (given.take(name, fields.integer(1), None) for name in ("max_tokens", "max_completion_tokens"))
    return ChatRequest(
        messages=messages,
        add_generation_prompt=given.take("add_generation_prompt", fields.boolean, True),
        variables=given.take("chat_template_kwargs", fields.mapping, {}),
        options=_options(given, old if new is None else new, log_probs),
    )


def _options(given: Fields, max_tokens: int | None, log_probs: bool) -> Options:
    """What both endpoints know."""
    given.only("n", 1, why=_ONE)
    given.only("logit_bias", {}, why="the engine has no such bias")
    given.ignore("user", "metadata", "store", "service_tier", "safety_identifier")
    stream = given.take("stream", fields.boolean, False)
    options = Options(
        model=given.require("model", fields.text),
        max_tokens=max_tokens,
        temperature=given.take("temperature", fields.number(0, 2), 1.0),
        top_p=given.take("top_p", fields.number(0, 1, above=True), 1.0),
        seed=given.take("seed", _seed, secrets.randbits(63)),
        stop=given.take("stop", fields.texts(MAX_STOPS), ()),
        presence_penalty=given.take("presence_penalty", fields.number(-2, 2), 0.0),
        frequency_penalty=given.take("frequency_penalty", fields.number(-2, 2), 0.0),
        stream=stream,
        include_usage=_include_usage(given, stream),
        log_probs=log_probs,
        top_k=max(0, given.take("top_k", fields.integer(-1), 0)),
        min_tokens=given.take("min_tokens", fields.integer(0), 0),
        repetition_penalty=given.take("repetition_penalty", fields.number(1 / LARGEST, LARGEST), 1.0),
        ignore_eos=given.take("ignore_eos", fields.boolean, False),
        stop_token_ids=given.take("stop_token_ids", fields.token_ids, ()),
    )
    given.none_left()
    return options


def _include_usage(given: Fields, stream: bool) -> bool:
    asked = given.take("stream_options", fields.mapping, None)
    if asked is None:
        return False
    if not stream:
        raise refuse("stream_options", "only with stream: true", "invalid_value")
    inner = _inside("stream_options", asked)
    wanted = inner.take("stream_options.include_usage", fields.boolean, False)
    inner.ignore("stream_options.include_obfuscation")
    inner.none_left()
    return wanted


def _seed(name: str, value: Any) -> int:
    """OpenAI's are signed, Triton's are not."""
    return fields.integer(-(2**63), 2**63 - 1)(name, value) % 2**64


def _prompt(name: str, value: Any) -> str | tuple[int, ...]:
    """A string, token ids, or a list of one such prompt."""
    if isinstance(value, list) and value and isinstance(value[0], (str, list)):
        if len(value) > 1:
            raise refuse(name, f"{len(value)} prompts; send one a request", _UNSUPPORTED)
        value = value[0]
    prompt = fields.token_ids(name, value) if isinstance(value, list) else fields.text(name, value)
    if not prompt:
        raise refuse(name, "empty; give at least one token", "invalid_value")
    return prompt


def _messages(name: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise refuse(name, "no list of messages", "invalid_type")
    return tuple(_message(f"{name}[{i}]", fields.mapping(f"{name}[{i}]", one)) for i, one in enumerate(value))


def _message(place: str, value: dict[str, Any]) -> Message:
    """Role, content and name; what is null is left out, as clients send back what they were answered."""
    given = _inside(place, value)
    message = {"role": given.require(f"{place}.role", fields.text)}
    found = {
        "content": given.take(f"{place}.content", _content, None),
        "name": given.take(f"{place}.name", fields.text, None),
    }
    given.none_left()
    return message | {name: part for name, part in found.items() if part is not None}


def _content(place: str, value: Any) -> str:
    """A string, or text parts, which are joined by line breaks."""
    if not isinstance(value, list):
        return fields.text(place, value)
    return "\n".join(_part(f"{place}[{i}]", part) for i, part in enumerate(value))


def _part(place: str, value: Any) -> str:
    given = _inside(place, fields.mapping(place, value))
    if given.require(f"{place}.type", fields.text) != "text":
        raise refuse(f"{place}.type", "only text is understood", _UNSUPPORTED)
    said = given.require(f"{place}.text", fields.text)
    given.none_left()
    return said


def _inside(place: str, value: dict[str, Any]) -> Fields:
    """The fields of an object within the body, by their full names."""
    return Fields({f"{place}.{name}": part for name, part in value.items()})
