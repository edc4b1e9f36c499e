"""One request to Triton over gRPC: arrays in, a stream of arrays out. Leaving the stream ends the work."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from builder.errors import UserError
from triton_repo.openai.errors import ApiError
from triton_repo.tensors import SAMPLING

Arrays = dict[str, np.ndarray]
RETRY_AFTER_S = 1
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 1000),  # after a restart of the server
]
_STATUS = {
    "INVALID_ARGUMENT": 400,
    "RESOURCE_EXHAUSTED": 429,
    "UNAVAILABLE": 503,
    "CANCELLED": 503,
    "DEADLINE_EXCEEDED": 504,
}
# A stream's error has a text and no code. Triton 24.10 gives the code too where a request has the header
# triton_grpc_error, but dies of cancels then, and of models that end after their error: so the texts say it.
_UNAVAILABLE = re.compile(
    "the engine died: |the queue is full: |exceeds maximum queue size|is not healthy|unknown model"
    "|is not ready|no available versions|request was cancelled",
    re.IGNORECASE,
)
_FIELD = re.compile(r"(\w+): ")  # what the models say of a request begins with its field
_FIELDS = {"input_ids", "input_lengths", "text_input", "max_tokens", "stop_words", "bad_words", *SAMPLING}


class Upstream:
    """A Triton server at `address`, host:port of its gRPC. `timeout_s` bounds a whole request."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self.address, self.timeout_s = address, timeout_s
        self._client = InferenceServerClient(address, channel_args=_CHANNEL)

    async def close(self) -> None:
        await self._client.close()

    async def ready(self, model: str) -> bool:
        """Whether the server says that it can serve the model."""
        try:
            return bool(await self._client.is_model_ready(model, client_timeout=5))
        except InferenceServerException:
            return False

    async def config(self, model: str) -> Any:
        """The model's configuration, Triton's protobuf. Raises UserError where the server has none."""
        try:
            return (await self._client.get_model_config(model, client_timeout=10)).config
        except InferenceServerException as error:
            raise UserError(
                f"{self.address}: no model {model}: {error.message()}; give the gRPC address of a Triton "
                "server that serves one"
            ) from None

    @asynccontextmanager
    async def answers(
        self, model: str, inputs: Mapping[str, np.ndarray], outputs: tuple[str, ...]
    ) -> AsyncIterator[AsyncIterator[Arrays]]:
        """The answers to one request, cancelled at the end of the block where it still runs.

        They raise ApiError where the server refuses, fails or is not there.
        """

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {
                "model_name": model,
                "inputs": [_input(name, array) for name, array in inputs.items()],
                "outputs": [InferRequestedOutput(name) for name in outputs],
            }

        call = self._client.stream_infer(requests(), stream_timeout=self.timeout_s)
        try:
            yield _arrays(call)
        finally:
            call.cancel()


def _input(name: str, array: np.ndarray) -> InferInput:
    made = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array)
    return made


async def _arrays(call: Any) -> AsyncIterator[Arrays]:
    """To the end, also after an error: a stream cancelled between that and its end kills Triton 24.10."""
    failure = None
    try:
        async for result, error in call:
            if error is not None:
                failure = failure or _failure(_code(error.message()), error.message())
            elif names := [output.name for output in result.get_response().outputs]:
                yield {name: result.as_numpy(name) for name in names}
    except grpc.aio.AioRpcError as error:
        raise _failure(error.code().name, error.details() or "no reason given") from None
    if failure is not None:
        raise failure


def _code(reason: str) -> str:
    """gRPC's name for an error of a model."""
    if _UNAVAILABLE.search(reason):
        return "UNAVAILABLE"
    field = _FIELD.match(reason)
    return "INVALID_ARGUMENT" if field and field[1] in _FIELDS else "INTERNAL"


def _failure(code: str, reason: str) -> ApiError:
    status = _STATUS.get(code, 500)
    retry = RETRY_AFTER_S if status in (429, 503) else None
    return ApiError(status, " ".join(reason.split()), code=code.lower(), retry_after_s=retry)
