"""Triton's Python backend: the embedded engine in the place of TensorRT-LLM's own backend."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from builder.errors import UserError
from engines.embedded.session import EngineError, Request, Session

# Inputs of the interface that this engine does not have, and the values that ask nothing of it.
NEUTRAL = {
    "beam_width": (0, 1),
    "num_return_sequences": (0, 1),
    "len_penalty": (0.0, 1.0),
    "repetition_penalty": (0.0, 1.0),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "min_tokens": (0, 1),
    "return_log_probs": (False,),
    "return_context_logits": (False,),
    "return_generation_logits": (False,),
    "exclude_input_in_output": (True,),
}
PREFIX = 16  # tokens before the new ones that postprocessing needs to decode them
THREADS = 256  # requests in flight; the engine itself runs max_batch_size of them at once


def value(request, name: str):
    """The one number of an optional input; None where it was not sent."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().flat[0].item()


def stop_words(request) -> tuple[tuple[int, ...], ...]:
    """TensorRT-LLM's [1, 2, N]: tokens, and where each word ends, then -1."""
    tensor = pb_utils.get_input_tensor_by_name(request, "stop_words_list")
    if tensor is None:
        return ()
    tokens, ends = tensor.as_numpy()[0].tolist()
    bounds = [0, *(end for end in ends if end > 0)]
    return tuple(tuple(tokens[a:b]) for a, b in itertools.pairwise(bounds))


def engine_request(request) -> Request:
    """What the engine is asked. Raises UserError for what it cannot do."""
    for name, neutral in NEUTRAL.items():
        given = value(request, name)
        if given is not None and given not in neutral:
            raise UserError(f"{name}: {given} is not supported by the embedded engine; leave it out")
    length = value(request, "input_lengths")
    ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy()[0, :length].tolist()
    end = value(request, "end_id")
    temperature = value(request, "temperature")
    return Request(
        input_ids=tuple(ids),
        max_tokens=value(request, "request_output_len"),
        end_id=None if end is None or end < 0 else end,
        stop_words=stop_words(request),
        temperature=temperature,
        top_k=value(request, "runtime_top_k") or None,
        top_p=value(request, "runtime_top_p") or None,
        seed=value(request, "seed") or 0,
    )


def response(prefix: list[int], tokens: list[int], final: bool):
    """The new tokens of one step, and what postprocessing needs to turn them into text."""
    shown = prefix[-PREFIX:]
    return pb_utils.InferenceResponse(
        output_tensors=[
            pb_utils.Tensor("output_ids", np.array(tokens, np.int32).reshape(1, 1, -1)),
            pb_utils.Tensor("sequence_length", np.array([[len(tokens)]], np.int32)),
            pb_utils.Tensor("prefix_ids", np.array([shown or [-1]], np.int32)),
            pb_utils.Tensor("final", np.array([[final]], bool)),
        ]
    )


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        self.session = Session(Path(parameters["gpt_model_path"]["string_value"]))
        self.threads = ThreadPoolExecutor(THREADS)

    def finalize(self) -> None:
        self.session.close()
        self.threads.shutdown()

    def execute(self, requests: list) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                streaming = bool(value(request, "streaming"))
                outputs = self.session.generate(engine_request(request))
            except (UserError, EngineError) as error:
                self.fail(sender, error)
                continue
            self.threads.submit(self.run, sender, outputs, streaming)

    def run(self, sender, outputs, streaming: bool) -> None:
        generated: list[int] = []
        try:
            for output in outputs:
                if streaming:
                    sender.send(response(generated, list(output.token_ids), output.finish_reason is not None))
                generated += output.token_ids
            if not streaming:
                sender.send(response([], generated, True))
        except (UserError, EngineError) as error:
            self.fail(sender, error)
            return
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def fail(self, sender, error: Exception) -> None:
        sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
