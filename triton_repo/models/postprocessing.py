"""Triton's Python backend: tokens to text, so that streamed pieces join to the whole text.

What came before a piece is said by the caller (PREFIX_IDS, FINAL: the embedded engine and the BLS model do),
or remembered by a request id that says it is a stream's, which an ensemble hands on. Without either each
piece is decoded alone.

A client that goes in the middle of a stream is seen here first: tensorrt_llm is told to stop its request, by
the ticket it gave, or the request's id.
"""

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from cancellation import Streams
from tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def stable(text: str) -> str:
    """`text` without a character that may not be whole yet: an unfinished one decodes to up to three
    replacement characters at the end."""
    kept = len(text)
    while kept > max(0, len(text) - 3) and text[kept - 1] == REPLACEMENT:
        kept -= 1
    return text[:kept]


def new_text(decode, prefix: list[int], tokens: list[int], final: bool) -> str:
    """What `tokens` add to the text that `prefix` has shown already.

    Both are decoded from the same start, so spaces and characters split over tokens come out as they
    do in the whole text.
    """
    whole = decode(prefix + tokens)
    shown = stable(decode(prefix)) if prefix else ""
    return (whole if final else stable(whole))[len(shown) :]


class Memory:
    """The last tokens of each stream and how many characters of theirs wait for more bytes.

    A stream is a request whose id begins with `STREAM`; who sends such an id uses it once.
    """

    STREAM = "stream-"
    STREAMS = 4096  # the least recently used is forgotten
    TOKENS = 16  # needed to decode the next ones as in the whole text

    def __init__(self, decode) -> None:
        self.decode = decode
        self.streams: OrderedDict[str, tuple[list[int], int]] = OrderedDict()

    def piece(self, request_id: str, tokens: list[int]) -> str:
        """What `tokens` add to the stream's text; TensorRT-LLM's last answer of a stream may have none."""
        before, held = self.streams.pop(request_id, ([], 0))
        whole = self.decode(before + tokens)
        visible = stable(whole) if tokens else whole
        if tokens:
            self.streams[request_id] = ((before + tokens)[-self.TOKENS :], len(whole) - len(visible))
            if len(self.streams) > self.STREAMS:
                self.streams.popitem(last=False)
        shown = len(self.decode(before)) - held if before else 0
        return visible[shown:]


def required(request, name: str) -> np.ndarray:
    """An input's array; Triton only counts inputs, so another one may have come in its place."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        raise ValueError(f"{name}: missing; send it")
    return tensor.as_numpy()


def stop(name: int | str) -> None:
    """End a request of tensorrt_llm: a request with the input `stop`, answered by its end.

    What comes of it is logged: the client it would be told to has gone.
    """
    zero = np.zeros((1, 1), np.int32)
    values = dict.fromkeys(("input_ids", "input_lengths", "request_output_len"), zero)
    values["stop"] = np.ones((1, 1), np.bool_)
    if isinstance(name, int):
        values["ticket"] = np.array([[name]], np.int64)
    request = pb_utils.InferenceRequest(
        model_name="tensorrt_llm",
        inputs=[pb_utils.Tensor(key, value) for key, value in values.items()],
        requested_output_names=["output_ids", "sequence_length"],
        request_id=name if isinstance(name, str) else "",
    )
    try:  # all of the answers: an iterator left alone keeps its request
        errors = [x.error().message() for x in request.exec(decoupled=True) if x.has_error()]
    except pb_utils.TritonModelException as raised:
        errors = [str(raised)]
    for error in errors:
        pb_utils.Logger.log_warn(f"a request whose client has gone goes on: {error}")


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        directory = Path(parameters["tokenizer_dir"]["string_value"])
        self.skip = parameters["skip_special_tokens"]["string_value"] == "true"
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.memory = Memory(self.decode)
        self.streams = Streams()

    def decode(self, ids: list[int]) -> str:
        try:
            return self.tokenizer.decode(ids, skip_special_tokens=self.skip)
        except OverflowError:
            raise ValueError("TOKENS_BATCH: a token is negative; send those of the engine") from None

    def execute(self, requests: list) -> list:
        for request in requests:
            ticket = pb_utils.get_input_tensor_by_name(request, "TICKET")
            name = request.request_id() if ticket is None else ticket.as_numpy().flat[0].item()
            if name and self.streams.gone(name, request):
                stop(name)
        return [self.respond(request) for request in requests]

    def respond(self, request):
        try:
            return self.answer(self.texts(request))
        except ValueError as error:
            refused = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=refused)

    def texts(self, request) -> list[str]:
        """Of each beam. Raises ValueError for what a client sends that no engine would."""
        batch, lengths = (required(request, name) for name in ("TOKENS_BATCH", "SEQUENCE_LENGTH"))
        prefix = pb_utils.get_input_tensor_by_name(request, "PREFIX_IDS")
        final = pb_utils.get_input_tensor_by_name(request, "FINAL")
        request_id = request.request_id()
        one = batch.shape[1] == lengths.shape[1] == 1
        if prefix is None and request_id.startswith(Memory.STREAM) and one:
            return [self.memory.piece(request_id, batch[0, 0, : lengths[0, 0]].tolist())]
        prefix_ids = [] if prefix is None else [i for i in prefix.as_numpy().flatten().tolist() if i >= 0]
        is_final = True if final is None else bool(final.as_numpy().flat[0])
        return [
            new_text(self.decode, prefix_ids, beam[:length].tolist(), is_final)
            for beam, length in zip(batch[0], lengths[0], strict=True)
        ]

    def answer(self, texts: list[str]):
        out = np.array([[text.encode() for text in texts]], dtype=object)
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("OUTPUT", out)])
