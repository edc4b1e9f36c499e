"""What a session and rank 0 tell each other: one JSON object a line over a Unix socket.

session -> rank 0   {"submit": id, "request": {...}}, {"cancel": id}; the end of the stream ends the ranks
rank 0 -> session   {"ready": [pid, ...]} or {"refused": text}, then {"outputs": [[id, tokens, reason], ...]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
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
    return {"submit": request_id, "request": asdict(request)}


def submitted(message: Message) -> Request:
    """The request of a submit message."""
    values = message["request"]
    words = tuple(tuple(word) for word in values["stop_words"])
    return Request(**{**values, "input_ids": tuple(values["input_ids"]), "stop_words": words})


def outputs(results: list[tuple[int, Output]]) -> Message:
    return {"outputs": [[i, output.token_ids, output.finish_reason] for i, output in results]}


def output_list(message: Message) -> list[tuple[int, Output]]:
    """The results of an outputs message."""
    return [(i, Output(token_ids=tuple(t), finish_reason=reason)) for i, t, reason in message["outputs"]]
