"""A streamed request over gRPC: what HTTP cannot do is to take it back."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np

from builder.errors import UserError
from triton_repo.client import pieces
from triton_repo.dialect import ENGINE, Dialect, stream_id

_NUMPY = {"INT32": np.int32, "FP32": np.float32, "UINT64": np.uint64, "BOOL": np.bool_}
_TRITON = {kind: name for name, kind in _NUMPY.items()}


class GrpcStream(Iterator[str]):
    """The pieces of one continuation; `cancel`, or leaving the `with` block, ends the work on the server.

    `address` is host:port. Raises UserError naming it where the server fails or refuses.
    """

    def __init__(
        self,
        address: str,
        prompt: str,
        *,
        max_tokens: int,
        dialect: Dialect = ENGINE,
        model: str | None = None,
        timeout_s: float = 120.0,
        **sampling: Any,
    ) -> None:
        try:
            from tritonclient import grpc
            from tritonclient.utils import InferenceServerException
        except ModuleNotFoundError:
            raise UserError("tritonclient is missing; pip install 'ffn-fusion[triton]'") from None
        self._address, self._timeout_s = address, timeout_s
        self._model, self._dialect = model or dialect.model, dialect
        self._id = stream_id()
        self._answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self._grpc, self._client = grpc, grpc.InferenceServerClient(address)
        self._open, self._refused = True, False
        body = dialect.body(prompt, max_tokens, True, sampling)
        arrays = {name: self._array(name, value) for name, value in body.items()}
        self._client.start_stream(callback=lambda result, error: self._answers.put((result, error)))
        try:
            self._send(self._client, self._model, arrays, ("text_output",))
        except InferenceServerException:  # its cause comes through the callback
            self._close()
            _, error = self._answers.get(timeout=timeout_s)
            raise UserError(f"{address}: {error.message()}") from None
        self._pieces = pieces(self._texts(), dialect, address)

    def _array(self, name: str, value: Any) -> np.ndarray:
        """A field of the dialect's body as Triton takes it; the engine flavour has a batch dimension."""
        kind = self._dialect.kind(name)
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        try:
            if kind == "STRING":
                array = np.array([str(text).encode() for text in values], object)
            else:
                array = np.array(values, _NUMPY[kind])
        except (ValueError, TypeError, OverflowError):
            raise UserError(f"{name}: {value!r} is no {kind}") from None
        return array[None] if self._dialect is ENGINE else array

    def _send(self, client: Any, model: str, arrays: dict[str, np.ndarray], outputs: tuple[str, ...]) -> None:
        inputs = []
        for name, array in arrays.items():
            kind = "BYTES" if array.dtype == object else _TRITON[array.dtype.type]
            inputs.append(self._grpc.InferInput(name, list(array.shape), kind))
            inputs[-1].set_data_from_numpy(array)
        client.async_stream_infer(
            model,
            inputs,
            outputs=[self._grpc.InferRequestedOutput(name) for name in outputs],
            request_id=self._id,
            enable_empty_final_response=True,
        )

    def _texts(self) -> Iterator[str]:
        while True:
            try:
                result, error = self._answers.get(timeout=self._timeout_s)
            except queue.Empty:
                raise UserError(f"{self._address}: no answer within {self._timeout_s:.0f} s") from None
            if error is not None:
                self._refused = True
                raise UserError(f"{self._address}: {error.message()}")
            text = result.as_numpy("text_output")
            if text is not None:
                yield text.flat[0].decode()
            if result.get_response().parameters["triton_final_response"].bool_param:
                return

    def __next__(self) -> str:
        if not self._open:
            raise StopIteration
        try:
            return next(self._pieces)
        except BaseException:
            self._close()
            raise

    def cancel(self) -> None:
        """Take the request back.

        Triton cancels no running step of an ensemble, so tensorrt_llm is told itself.
        """
        if self._open and self._model == ENGINE.model:
            self._stop()
        self._close()

    def _stop(self) -> None:
        """TensorRT-LLM's own way: a request of the same id with the input `stop`, answered by its end."""
        zero = np.zeros((1, 1), np.int32)
        inputs = dict.fromkeys(("input_ids", "input_lengths", "request_output_len"), zero)
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with self._grpc.InferenceServerClient(self._address) as client:
            client.start_stream(callback=lambda result, error: done.put(error))
            stop = {**inputs, "stop": np.ones((1, 1), np.bool_)}
            self._send(client, "tensorrt_llm", stop, ("output_ids", "sequence_length"))
            with contextlib.suppress(queue.Empty):  # the stream itself is cancelled in any case
                done.get(timeout=5)
            client.stop_stream(cancel_requests=True)

    def _close(self) -> None:
        if self._open:
            self._open = False
            # A server that may not answer is not waited for. One that has refused ends the stream itself, and
            # Triton 24.10 dies where a cancel comes between a model's error and its end.
            self._client.stop_stream(cancel_requests=not self._refused)
            self._client.close()

    def __enter__(self) -> GrpcStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()
