"""Triton's Python backend: the embedded engine in the place of TensorRT-LLM's own backend."""

import itertools
import json
import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from cancellation import Watcher

from builder.errors import UserError
from engines.embedded.session import EngineError, Request, Session

# Inputs of the interface that this engine does not have, and the values that ask nothing of it.
NEUTRAL = {
    "beam_width": (0, 1),
    "num_return_sequences": (0, 1),
    "len_penalty": (0.0, 1.0),
    "return_context_logits": (False,),
    "return_generation_logits": (False,),
    "return_perf_metrics": (False,),
    "return_num_input_tokens": (False,),
    "return_num_output_tokens": (False,),
    "exclude_input_in_output": (True,),
}
HOSTS = "FFN_FUSION_HOSTS"  # a:2,b:2 puts ranks there; the server's own host comes first
MAX_QUEUE_SIZE = {"string_value": "256"}  # of a repository that does not say
REQUIRED = ("input_ids", "input_lengths", "request_output_len")  # Triton counts inputs, whichever they are
PREFIX = 16  # tokens before the new ones that postprocessing needs to decode them


def value(request, name: str):
    """The one number of an optional input; None where it was not sent."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().flat[0].item()


def words(request, name: str) -> tuple[tuple[int, ...], ...]:
    """TensorRT-LLM's [1, 2, N]: tokens, and where each word ends, then -1."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return ()
    tokens, ends = tensor.as_numpy()[0].tolist()
    bounds = [0, *(end for end in ends if end > 0)]
    return tuple(tuple(tokens[a:b]) for a, b in itertools.pairwise(bounds))


def engine_request(request) -> Request:
    """What the engine is asked. Raises UserError for what it cannot do."""
    for name in REQUIRED:
        if pb_utils.get_input_tensor_by_name(request, name) is None:
            raise UserError(f"{name}: missing; send it")
    for name, neutral in NEUTRAL.items():
        given = value(request, name)
        if given is not None and given not in neutral:
            raise UserError(f"{name}: {given} is not supported by the embedded engine; leave it out")
    length = value(request, "input_lengths")
    ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy()[0, :length].tolist()
    end = value(request, "end_id")
    return Request(
        input_ids=tuple(ids),
        max_tokens=value(request, "request_output_len"),
        end_id=None if end is None or end < 0 else end,
        stop_words=words(request, "stop_words_list"),
        bad_words=words(request, "bad_words_list"),
        temperature=value(request, "temperature"),
        top_k=value(request, "runtime_top_k") or None,
        top_p=value(request, "runtime_top_p") or None,
        seed=value(request, "seed") or 0,
        repetition_penalty=value(request, "repetition_penalty") or 1.0,
        presence_penalty=value(request, "presence_penalty") or 0.0,
        frequency_penalty=value(request, "frequency_penalty") or 0.0,
        min_tokens=value(request, "min_tokens") or 0,
        return_log_probs=bool(value(request, "return_log_probs")),
    )


def triton_error(error: Exception):
    """INVALID_ARG is of what the client asked wrongly; UNAVAILABLE of an engine that died, for another server
    may do it. Triton 2.51 gives a client of the ensemble HTTP 400 for both."""
    kind = pb_utils.TritonError
    return kind(str(error), kind.INVALID_ARG if isinstance(error, UserError) else kind.UNAVAILABLE)


class Said:
    """The tokens of a request so far, and their log-probabilities where it asked for them."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.cum_log_prob: float | None = None

    def add(self, output) -> None:
        self.tokens += output.token_ids
        self.log_probs += output.log_probs
        self.cum_log_prob = output.cum_log_prob


def response(said: Said, new: int, final: bool, names: set[str], ticket: int):
    """The last `new` tokens, and what postprocessing needs to turn them into text.

    Log-probabilities are of all tokens so far, in streams too, as TensorRT-LLM answers them.

    Only what was asked for: the stub drops the rest without holding Python's lock, which corrupts memory
    where several threads run (python_backend, src/response_sender.cc, PruneOutputTensors).
    """
    start = len(said.tokens) - new
    before, tokens = said.tokens[max(0, start - PREFIX) : start], said.tokens[start:]
    values = {
        "output_ids": np.array(tokens, np.int32).reshape(1, 1, -1),
        "sequence_length": np.array([[len(tokens)]], np.int32),
        "prefix_ids": np.array([before or [-1]], np.int32),
        "final": np.array([[final]], bool),
        "ticket": np.array([[ticket]], np.int64),
    }
    if said.cum_log_prob is not None:
        values["output_log_probs"] = np.array(said.log_probs, np.float32).reshape(1, 1, -1)
        values["cum_log_probs"] = np.array([[said.cum_log_prob]], np.float32)
    made = [pb_utils.Tensor(name, value) for name, value in values.items() if name in names]
    return pb_utils.InferenceResponse(output_tensors=made)


class Running:
    """A request at work, until it ends or somebody stops it: by its `ticket`, which nobody can guess."""

    def __init__(self, outputs, sender, streaming: bool, names: set[str]) -> None:
        self.outputs, self.sender, self.streaming, self.names = outputs, sender, streaming, names
        self.stopped = False
        self.ticket = secrets.randbits(63)

    def stop(self) -> None:
        self.stopped = True
        self.outputs.close()

    def run(self) -> None:
        """Send what the engine makes. Raises EngineError where it dies."""
        said = Said()
        for output in self.outputs:
            said.add(output)
            if self.streaming:
                final = output.finish_reason is not None
                self.send(said, len(output.token_ids), final)
        if self.stopped:
            raise Cancelled
        if not self.streaming:
            self.send(said, len(said.tokens), True)

    def send(self, said: Said, new: int, final: bool) -> None:
        self.sender.send(response(said, new, final, self.names, self.ticket))


class Cancelled(Exception):  # noqa: N818  (nobody's error)
    """The client wants no more."""


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        self.session = self.open_session(Path(parameters["gpt_model_path"]["string_value"]))
        self.max_queue_size = int(parameters.get("max_queue_size", MAX_QUEUE_SIZE)["string_value"])
        self.places = self.session.manifest.max_batch_size + self.max_queue_size
        self.threads = ThreadPoolExecutor(self.places)
        self.running: set[Running] = set()
        self.watcher = Watcher()
        self.by_name: dict[str | int, Running] = {}  # a request's id, and its ticket

    def open_session(self, engine: Path) -> Session:
        hosts = os.environ.get(HOSTS)
        return Session(engine, hosts=tuple(hosts.split(",")) if hosts else ())

    def finalize(self) -> None:
        self.watcher.close()
        self.session.close()
        self.threads.shutdown()

    def execute(self, requests: list) -> None:
        for request in requests:
            sender = request.get_response_sender()
            if value(request, "stop"):
                self.stop(value(request, "ticket") or request.request_id())
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                continue
            if len(self.running) >= self.places:
                self.fail(sender, self.full())
                continue
            try:
                outputs = self.start(request)
            except (UserError, EngineError) as error:
                self.fail(sender, triton_error(error))
                continue
            names = set(request.requested_output_names())
            running = Running(outputs, sender, bool(value(request, "streaming")), names)
            self.running.add(running)
            self.by_name |= {running.ticket: running, request.request_id(): running}
            self.threads.submit(self.run, running, request.request_id())

    def full(self):
        """Said at once, for a client that can go elsewhere."""
        return pb_utils.TritonError(
            f"the queue is full: {self.max_queue_size} requests wait; try again later, or deploy with a "
            "larger --max-queue-size",
            pb_utils.TritonError.UNAVAILABLE,
        )

    def start(self, request):
        """The outputs of a request, step by step."""
        return self.session.generate(engine_request(request))

    def stop(self, name: str | int) -> None:
        """End the request of that id or ticket: what TensorRT-LLM's backend does for the input `stop`."""
        running = self.by_name.get(name)
        if running is not None and name:
            running.stop()

    def run(self, running: Running, request_id: str) -> None:
        key = self.watcher.watch(running.sender, running.stop)
        error = None
        try:
            running.run()
        except Cancelled:
            error = pb_utils.TritonError("the request was cancelled", pb_utils.TritonError.CANCELLED)
        except (UserError, EngineError) as raised:
            error = triton_error(raised)
        finally:
            self.running.discard(running)
            self.watcher.forget(key)
            for name in (running.ticket, request_id):
                if self.by_name.get(name) is running:
                    del self.by_name[name]
        if error is not None:
            self.fail(running.sender, error)
        else:
            running.sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def fail(self, sender, error) -> None:
        sender.send(pb_utils.InferenceResponse(error=error))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
