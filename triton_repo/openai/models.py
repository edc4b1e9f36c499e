"""The two models that may be behind Triton's tensorrt_llm: tokens to tokens, or text to text.

Names and shapes are those of TensorRT-LLM's own: inflight_batcher_llm, which the embedded engine has too, and
llmapi.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from builder.errors import UserError
from engines import manifest as manifests
from engines.embedded.step import BLOCK_SIZE
from triton_repo.dialect import LLMAPI
from triton_repo.facts import FACTS
from triton_repo.openai.continuation import Ending, FinishReason, Piece, Step, from_texts, from_tokens
from triton_repo.openai.errors import ApiError, refuse
from triton_repo.openai.prompts import Limits, Prompt, Prompts
from triton_repo.openai.requests import Options
from triton_repo.openai.upstream import Arrays, Upstream
from triton_repo.tensors import SAMPLING

MODEL = LLMAPI.model  # in either flavour


class Model(Protocol):
    """Continues prompts. `answer` raises ApiError where the request or the server is at fault."""

    def answer(self, prompt: Prompt, options: Options, max_tokens: int) -> AsyncGenerator[Piece, None]: ...


def model_of(config: Any, upstream: Upstream, prompts: Prompts) -> Model:
    """The model that a configuration of tensorrt_llm describes."""
    takes_text = any(tensor.name == "text_input" for tensor in config.input)
    return TextModel(upstream, prompts) if takes_text else TokenModel(upstream, prompts)


def limits_of(config: Any) -> Limits:
    """Of the engine, as the repository tells them, else as its directory does where it is on this machine."""
    parameters = {name: value.string_value for name, value in config.parameters.items()}
    told = json.loads(parameters.get(FACTS) or "{}")
    if "max_seq_len" in told:
        return Limits(max_input_len=told["max_input_len"], max_seq_len=told["max_seq_len"])
    try:
        manifest = manifests.read(Path(parameters.get("gpt_model_path", "")))
    except UserError:  # on another machine, or built by somebody else
        return Limits()
    longest = min(manifest.max_seq_len, manifest.kv_cache_blocks * BLOCK_SIZE or manifest.max_seq_len)
    return Limits(max_input_len=manifest.max_input_len, max_seq_len=longest)


def _sampling(options: Options) -> dict[str, Any]:
    """By our names, without what asks for nothing. Greedy is `top_k` 1, which every engine has."""
    if options.temperature == 0:
        how: dict[str, Any] = {"top_k": 1}
    else:
        how = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}
        how |= {"top_k": options.top_k} if options.top_k else {}
    neutral = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_tokens": 0}
    given = {name: getattr(options, name) for name in neutral}
    return how | {name: value for name, value in given.items() if value != neutral[name]}


_NUMPY = {"INT32": np.int32, "FP32": np.float32, "UINT64": np.uint64, "BOOL": np.bool_}


class TokenModel:
    """Tokens to tokens, in batches of one."""

    def __init__(self, upstream: Upstream, prompts: Prompts) -> None:
        self.upstream, self.prompts = upstream, prompts

    async def answer(self, prompt: Prompt, options: Options, max_tokens: int) -> AsyncGenerator[Piece, None]:
        end, stops = self._ends(options)
        inputs = self._inputs(prompt, options, max_tokens, end, stops)
        outputs = ("output_ids", "sequence_length", *(("output_log_probs",) if options.log_probs else ()))
        ending = Ending(
            max_tokens=max_tokens,
            min_tokens=options.min_tokens,
            strings=options.stop,
            token_ids=stops | {end},
        )
        async with self.upstream.answers(MODEL, inputs, outputs) as answers:
            pieces = from_tokens(_steps(answers), self.prompts.tokenizer, ending)
            async with aclosing(pieces):
                async for piece in pieces:
                    yield piece

    def _ends(self, options: Options) -> tuple[int, frozenset[int]]:
        """The end token, -1 for none, and more tokens that end the answer.

        Among them stop strings that are special tokens, which no text shows.
        """
        ends = () if options.ignore_eos else self.prompts.end_ids
        tokenizer = self.prompts.tokenizer
        words = [tokenizer.encode(word, add_special_tokens=False).ids for word in options.stop]
        special = [ids[0] for ids in words if len(ids) == 1 and not tokenizer.decode(ids)]
        return (ends[0] if ends else -1), frozenset((*ends[1:], *options.stop_token_ids, *special))

    def _inputs(
        self, prompt: Prompt, options: Options, max_tokens: int, end: int, stops: frozenset[int]
    ) -> Arrays:
        """The arrays of a request, each with a batch dimension of one."""
        streaming = options.stream or bool(options.stop)  # the text is watched for those
        sampling = {**_sampling(options), "stream": streaming, "return_log_probs": options.log_probs}
        arrays = {
            "input_ids": np.array([prompt.ids], np.int32),
            "input_lengths": np.array([[len(prompt.ids)]], np.int32),
            "request_output_len": np.array([[max_tokens]], np.int32),
            "end_id": np.array([[end]], np.int32),
            "pad_id": np.array([[max(end, 0)]], np.int32),
        }
        if stops:
            arrays["stop_words_list"] = _word_list(sorted(stops))
        for name, value in sampling.items():
            inner, kind = SAMPLING[name]
            arrays[inner] = np.array([[value]], _NUMPY[kind])
        return arrays


def _word_list(token_ids: list[int]) -> np.ndarray:
    """TensorRT-LLM's [1, 2, N] of words of one token: the tokens, and where each ends."""
    return np.array([[token_ids, list(range(1, len(token_ids) + 1))]], np.int32)


async def _steps(answers: AsyncIterator[Arrays]) -> AsyncIterator[Step]:
    """[batch, beams, n] tokens of each answer; log-probabilities are of all so far."""
    count = 0
    async for arrays in answers:
        length = int(arrays["sequence_length"].flat[0])
        ids = arrays["output_ids"][0, 0, :length].tolist()
        known = arrays["output_log_probs"][0, 0, count:].tolist() if "output_log_probs" in arrays else ()
        count += len(ids)
        yield Step(token_ids=tuple(ids), log_probs=tuple(known))


class TextModel:
    """Text to text: TensorRT-LLM's LLM API, which makes tokens of the text itself."""

    def __init__(self, upstream: Upstream, prompts: Prompts) -> None:
        self.upstream, self.prompts = upstream, prompts

    async def answer(self, prompt: Prompt, options: Options, max_tokens: int) -> AsyncGenerator[Piece, None]:
        inputs = self._inputs(prompt, options, max_tokens)
        ending = Ending(max_tokens=max_tokens, strings=options.stop)
        async with self.upstream.answers(MODEL, inputs, ("text_output", "finish_reason")) as answers:
            pieces = from_texts(_texts(answers), self.prompts.tokenizer, ending)
            async with aclosing(pieces):
                async for piece in pieces:
                    yield piece

    def _inputs(self, prompt: Prompt, options: Options, max_tokens: int) -> Arrays:
        """The arrays of a request. Raises ApiError naming a field that the LLM API's model does not take."""
        sampling = _sampling(options)
        for name, asked in {
            "logprobs": options.log_probs,
            "ignore_eos": options.ignore_eos,
            "stop_token_ids": bool(options.stop_token_ids),
            **{name: True for name in sampling if name not in LLMAPI.sampling},
        }.items():
            if asked:
                raise refuse(
                    name, "not known to the LLM API of this server; leave it out", "unsupported_parameter"
                )
        if options.stop:
            sampling["stop_words"] = list(options.stop)
        streaming = options.stream or bool(options.stop)
        body = LLMAPI.body(self.prompts.as_text(prompt), max_tokens, streaming, sampling)
        arrays = {name: _array(value, LLMAPI.kind(name)) for name, value in body.items()}
        return {**arrays, "return_finish_reason": np.array([True])}


def _array(value: Any, kind: str) -> np.ndarray:
    """One dimension: there is no batch."""
    values = value if isinstance(value, list) else [value]
    if kind == "STRING":
        return np.array([text.encode() for text in values], object)
    return np.array(values, _NUMPY[kind])


async def _texts(answers: AsyncIterator[Arrays]) -> AsyncIterator[tuple[str, FinishReason | None]]:
    """The text so far, and why it ended, "None" until it has."""
    async for arrays in answers:
        reason = arrays["finish_reason"].flat[0].decode() if "finish_reason" in arrays else "None"
        if reason not in ("stop", "length", "None"):
            raise ApiError(502, f"the server ended its answer with {reason}")
        text = arrays["text_output"].flat[0].decode()
        yield text, ("stop" if reason == "stop" else "length" if reason == "length" else None)
