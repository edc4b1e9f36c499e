"""What a session and rank 0 tell each other: one JSON object a line over a Unix socket.

session -> rank 0   {"submit": id, "request": {...}}, {"cancel": id}; the end of the stream ends the ranks
rank 0 -> session   {"ready": [pid, ...]} or {"refused": text}, then
                    {"outputs": [[id, tokens, reason], [id, tokens, reason, log_probs, cum_log_prob], ...]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from engines.embedded.request import Output, Request

Message = dict[str, Any]


def encode(message: Mapping[str, Any]) -> bytes:
    """One line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message:
    """The message of one line."""
    message: Message = json.loads(line)
    return message


def submit(request_id: int, request: Request) -> Message:
    return {"submit": request_id, "request": vars(request)}


def submitted(message: Message) -> Request:
    """The request of a submit message."""
    values = message["request"]
    words = {name: tuple(tuple(word) for word in values[name]) for name in ("stop_words", "bad_words")}
    return Request(**{**values, **words, "input_ids": tuple(values["input_ids"])})


def outputs(results: list[tuple[int, Output]]) -> Message:
    return {"outputs": [_row(request_id, output) for request_id, output in results]}


def _row(request_id: int, output: Output) -> list[Any]:
    row = [request_id, output.token_ids, output.finish_reason]
    return row if output.cum_log_prob is None else [*row, output.log_probs, output.cum_log_prob]


def output_list(message: Message) -> list[tuple[int, Output]]:
    """The results of an outputs message."""
    return [(request_id, _output(*rest)) for request_id, *rest in message["outputs"]]


def _output(
    tokens: list[int],
    reason: Any,
    log_probs: list[float] | tuple[()] = (),
    cum_log_prob: float | None = None,
) -> Output:
    return Output(
        token_ids=tuple(tokens),
        finish_reason=reason,
        log_probs=tuple(log_probs),
        cum_log_prob=cum_log_prob,
    )
