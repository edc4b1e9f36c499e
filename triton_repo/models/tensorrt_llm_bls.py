"""Triton's Python backend: text to text through the other models, with drafts of a smaller one.

With a draft model several tokens may come of one pass of the target. What does not draft and streams belongs
to the ensemble: the stub makes the arrays of a called model's answers in a thread that does not hold Python's
lock (python_backend, src/pb_stub.cc, ProcessBLSResponseDecoupled, to this day), so an answer that comes while
this file runs corrupts memory. Here every call has one answer, waited for, and an instance has one thread.
"""

import collections
import itertools
import json
import uuid

import numpy as np
import triton_python_backend_utils as pb_utils
from limits import check_fields, known_fields

PREFIX = 16  # tokens before the new ones that postprocessing needs to decode them

PREPROCESSING = {
    "text_input": "QUERY",
    "max_tokens": "REQUEST_OUTPUT_LEN",
    "bad_words": "BAD_WORDS_DICT",
    "stop_words": "STOP_WORDS_DICT",
    "end_id": "END_ID",
    "pad_id": "PAD_ID",
}
PREPROCESSED = {
    "INPUT_ID": "input_ids",
    "REQUEST_INPUT_LEN": "input_lengths",
    "REQUEST_OUTPUT_LEN": "request_output_len",
    "BAD_WORDS_IDS": "bad_words_list",
    "STOP_WORDS_IDS": "stop_words_list",
    "OUT_END_ID": "end_id",
    "OUT_PAD_ID": "pad_id",
}
RENAMED = {"top_k": "runtime_top_k", "top_p": "runtime_top_p", "length_penalty": "len_penalty"}
RENAMED |= {"stream": "streaming"}
DRAFT = ("num_draft_tokens", "use_draft_logits")


class Refused(Exception):  # noqa: N818  (the client's error)
    """A model refused the request, or it asks for what cannot be (INVALID_ARG)."""

    def __init__(self, text: str, code: int | None = None) -> None:
        super().__init__(text)
        self.code = pb_utils.TritonError.INVALID_ARG if code is None else code


def array(tensor) -> np.ndarray:
    """A tensor's numbers, from the GPU as well."""
    if tensor.is_cpu():
        return tensor.as_numpy()
    from torch.utils.dlpack import from_dlpack

    return from_dlpack(tensor.to_dlpack()).cpu().numpy()


def tensors(values: dict) -> list:
    """Triton's tensors of named arrays."""
    return [pb_utils.Tensor(name, value) for name, value in values.items()]


def flag(values: dict, name: str) -> bool:
    return name in values and bool(values[name].flat[0])


def words(list_of_words: np.ndarray) -> list[list[int]]:
    """TensorRT-LLM's [1, 2, N]: tokens, and where each word ends, then -1."""
    ids, ends = list_of_words[0].tolist()
    bounds = [0, *(end for end in ends if end > 0)]
    return [ids[a:b] for a, b in itertools.pairwise(bounds)]


def first_beam(answer: dict) -> list[int]:
    """The tokens of an answer; [batch, beams, length] may be longer than they are."""
    return answer["output_ids"][0, 0, : answer["sequence_length"].flat[0]].tolist()


def call(model: str, inputs: dict, outputs: list[str]) -> dict:
    """The answer of a text model as named arrays. Raises Refused with its error."""
    request = pb_utils.InferenceRequest(
        model_name=model, inputs=tensors(inputs), requested_output_names=outputs
    )
    response = request.exec()
    if response.has_error():
        raise Refused(response.error().message(), response.error().code())
    return {tensor.name(): array(tensor) for tensor in response.output_tensors()}


def generate(model: str, inputs: dict, outputs: list[str], request_id: str) -> dict | None:
    """The one answer of a tensorrt_llm model; None where it has no token. Raises Refused with its error."""
    request = pb_utils.InferenceRequest(
        model_name=model,
        inputs=tensors(inputs),
        requested_output_names=["output_ids", "sequence_length", *outputs],
        request_id=request_id,
    )
    found = None
    for response in request.exec(decoupled=True):  # to its end: an iterator left alone keeps its request
        if response.has_error():
            error = response.error()
            raise Refused(error.message(), error.code())  # nothing follows, not even the end
        found = {tensor.name(): array(tensor) for tensor in response.output_tensors()} or found
    return found


class Text:
    """The text of one growing sequence, through postprocessing, in pieces that join to the whole."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def push(self, new: list[int], final: bool) -> str:
        inputs = {
            "TOKENS_BATCH": np.array(new, np.int32).reshape(1, 1, -1),
            "SEQUENCE_LENGTH": np.array([[len(new)]], np.int32),
            "PREFIX_IDS": np.array([self.ids[-PREFIX:] or [-1]], np.int32),
            "FINAL": np.array([[final]], bool),
        }
        self.ids += new
        return call("postprocessing", inputs, ["OUTPUT"])["OUTPUT"].flat[0].decode()


class Request:
    """One request on its way through the models."""

    def __init__(self, model: "TritonPythonModel", values: dict, names: list[str], sender) -> None:
        self.model, self.values, self.sender = model, values, sender
        self.answers = [name for name in names if name != "text_output"]
        self.id = uuid.uuid4().hex
        self.cancelled = False

    def run(self) -> None:
        """Send every answer. Raises Refused."""
        given = {inner: self.values[name] for name, inner in PREPROCESSING.items() if name in self.values}
        made = call("preprocessing", given, list(PREPROCESSED))
        inputs = {inner: made[name] for name, inner in PREPROCESSED.items()}
        for name, value in self.values.items():
            if name not in PREPROCESSING and name not in DRAFT:
                inputs[RENAMED.get(name, name)] = value
        if flag(self.values, "num_return_sequences") and self.values["num_return_sequences"].flat[0] > 1:
            raise Refused("num_return_sequences: more than 1 only through the ensemble")
        if self.num_draft_tokens:
            self.send_pieces(self.speculate(inputs))
        elif flag(self.values, "stream"):
            raise Refused("stream: without a draft model only through the ensemble")
        else:
            self.send_whole(inputs)

    @property
    def num_draft_tokens(self) -> int:
        """How many tokens to draft: the request's word, else as many as the target was built for."""
        asked = self.values.get("num_draft_tokens")
        number = self.model.num_draft_tokens if asked is None else int(asked.flat[0])
        if asked is not None and number and not self.model.draft:
            raise Refused("num_draft_tokens: this repository has no draft model; leave it out")
        if number > self.model.num_draft_tokens or number < 0:
            raise Refused(f"num_draft_tokens: {number} is not between 0 and {self.model.num_draft_tokens}")
        return number

    def ask(self, inputs: dict, model: str, answers: list[str]) -> dict | None:
        """The answer of a tensorrt_llm model; None where it has none or the client has gone."""
        answer = generate(model, inputs, answers, self.id)
        self.cancelled = self.cancelled or self.sender.is_cancelled()
        return None if self.cancelled else answer

    def send_whole(self, inputs: dict) -> None:
        inputs.pop("streaming", None)
        answer = self.ask(inputs, self.model.target, self.answers)
        if answer is None:
            return
        given = {"TOKENS_BATCH": answer["output_ids"], "SEQUENCE_LENGTH": answer["sequence_length"]}
        text = call("postprocessing", given, ["OUTPUT"])["OUTPUT"]
        more = {name: value for name, value in answer.items() if name in self.answers}
        self.send(text, tensors(more))

    def send_pieces(self, pieces) -> None:
        """Send text as it comes; whole at the end where the client does not stream."""
        text, held = Text(), ""
        for tokens in pieces:
            held += text.push(tokens, False)
            if flag(self.values, "stream"):
                self.send_text(held)
                held = ""
        held += text.push([], True)  # characters that wait for bytes that never came
        if not self.cancelled and (held or not flag(self.values, "stream")):
            self.send_text(held)

    def send_text(self, text: str) -> None:
        self.send(np.array([[text.encode()]], object), [])

    def speculate(self, inputs: dict):
        """Lists of new tokens: what the target keeps of each draft, and one of its own.

        The target never answers the end token: an answer that equals the draft, or is empty, ends the text.
        """
        for name in inputs:
            if name.startswith("return_") and flag(inputs, name):
                raise Refused(f"{name}: not with a draft model; send num_draft_tokens 0")
        if "exclude_input_in_output" in inputs and not flag(inputs, "exclude_input_in_output"):
            raise Refused("exclude_input_in_output: true with a draft model; send num_draft_tokens 0")
        if "beam_width" in inputs and inputs["beam_width"].flat[0] > 1:
            raise Refused("beam_width: a draft model needs 1")
        wanted = int(inputs["request_output_len"].flat[0])
        if wanted < 1:
            raise Refused(f"max_tokens: {wanted} is not positive; ask for at least 1")
        ids = inputs["input_ids"][0].tolist()
        end, left = len(ids) + wanted, self.num_draft_tokens
        stops = words(inputs["stop_words_list"])
        while len(ids) < end and not self.cancelled:
            drafted, logits = self.draft(inputs, ids, min(left, end - len(ids) - 1))
            tokens = self.target(inputs, ids, drafted, logits)
            ids += tokens
            if tokens:
                yield tokens
            if not tokens or tokens == drafted or any(ids[-len(word) :] == word for word in stops):
                return

    def draft(self, inputs: dict, ids: list[int], length: int) -> tuple[list[int], dict]:
        """Up to `length` tokens of the draft model, and its logits where the request wants them used."""
        if length < 1:
            return [], {}
        logits = flag(self.values, "use_draft_logits")
        more = {"return_generation_logits": np.array([[logits]], bool)}
        asked = self.continuation(inputs, ids, length) | more
        names = ["generation_logits"] if logits else []
        answer = self.ask(asked, self.model.draft, names)
        if answer is None:
            return [], {}
        tokens = first_beam(answer)
        if not logits or not tokens:
            return tokens, {}
        return tokens, {"draft_logits": answer["generation_logits"][:1, 0, : len(tokens)]}

    def target(self, inputs: dict, ids: list[int], drafted: list[int], logits: dict) -> list[int]:
        asked = self.continuation(inputs, ids, len(drafted) + 1) | logits
        if drafted:
            asked["draft_input_ids"] = np.array([drafted], np.int32)
        answer = self.ask(asked, self.model.target, [])
        return [] if answer is None else first_beam(answer)

    def continuation(self, inputs: dict, ids: list[int], length: int) -> dict:
        """The request for `length` tokens after `ids`, the same in all else."""
        return {
            **{name: value for name, value in inputs.items() if name != "streaming"},
            "input_ids": np.array([ids], np.int32),
            "input_lengths": np.array([[len(ids)]], np.int32),
            "request_output_len": np.array([[length]], np.int32),
        }

    def send(self, text: np.ndarray, answers: list) -> None:
        output = pb_utils.Tensor("text_output", text)
        self.sender.send(pb_utils.InferenceResponse(output_tensors=[output, *answers]))


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        config = json.loads(args["model_config"])
        parameters = {name: p["string_value"] for name, p in config["parameters"].items()}
        self.fields = known_fields(config)
        self.target = parameters["tensorrt_llm_model_name"]
        self.draft = parameters["tensorrt_llm_draft_model_name"]
        self.num_draft_tokens = int(parameters["num_draft_tokens"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        # A sender may not go right after is_cancelled(): the stub still signals on its memory.
        self.senders: collections.deque = collections.deque(maxlen=64)

    def execute(self, requests: list) -> None:
        for request in requests:
            given = {name: pb_utils.get_input_tensor_by_name(request, name) for name in self.inputs}
            values = {name: tensor.as_numpy() for name, tensor in given.items() if tensor is not None}
            sender = request.get_response_sender()
            self.senders.append(sender)
            asked = Request(self, values, request.requested_output_names(), sender)
            try:
                check_fields(request, self.fields)
            except ValueError as error:
                self.fail(asked, pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
            else:
                self.run(asked)

    def run(self, request: Request) -> None:
        error = None
        try:
            request.run()
        except Refused as raised:
            error = pb_utils.TritonError(str(raised), raised.code)
        except pb_utils.TritonModelException as raised:
            error = pb_utils.TritonError(str(raised))
        if request.cancelled:
            error = pb_utils.TritonError("the request was cancelled", pb_utils.TritonError.CANCELLED)
        if error is not None:
            self.fail(request, error)
        else:
            request.sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def fail(self, request: Request, error) -> None:
        request.sender.send(pb_utils.InferenceResponse(error=error))
        request.sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
