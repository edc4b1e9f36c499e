"""Triton's Python backend: TensorRT-LLM's LLM API, text to text.

Arguments of `tensorrt_llm.LLM` are in model.yaml. Streamed text is the whole text so far, as in
TensorRT-LLM's own model of this name.
"""

import asyncio
import json
import os
import re
import threading
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
import yaml
from limits import check_fields, known_fields

SAMPLING = (
    "best_of",
    "temperature",
    "top_k",
    "top_p",
    "frequency_penalty",
    "presence_penalty",
    "max_tokens",
    "seed",
    "exclude_input_from_output",
    "return_perf_metrics",
)
# What an mpirun around the server left: the LLM API starts ranks of its own.
MPI_JOB = re.compile(r"OMPI_(COMM_WORLD|UNIVERSE|FIRST|APP|MCA_orte)_?|ORTE_|PMI_|PMIX_(?!MCA_)")
KEPT_S = 1.0


def scalar(request, name: str):
    """The one value of an optional input; None where it was not sent."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().flat[0].item()


def texts(request, name: str) -> list[str]:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return []
    try:
        return [bytes(value).decode("utf-8") for value in tensor.as_numpy().flat]
    except UnicodeDecodeError:
        raise ValueError(f"{name}: not valid UTF-8; encode the text as UTF-8") from None


def sampling_arguments(request) -> dict:
    """The arguments of SamplingParams that the request names."""
    given = {name: scalar(request, f"sampling_param_{name}") for name in SAMPLING}
    stop = [text for text in texts(request, "sampling_param_stop") if text]
    return {name: v for name, v in {**given, "stop": stop or None}.items() if v is not None}


def choose_gpus(args: dict, config: dict) -> None:
    """Show this instance its own GPUs only, before anything opens them."""
    lists = config["parameters"].get("gpu_device_ids", {}).get("string_value", "")
    if lists:
        number = int(args["model_instance_name"].rpartition("_")[2])
        own = lists.split(";")[number]
        # The second is handed on to the ranks that the LLM API starts.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["TRTLLM_VISIBLE_DEVICES"] = own


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        config = json.loads(args["model_config"])
        choose_gpus(args, config)
        self.fields = known_fields(config)
        for name in [name for name in os.environ if MPI_JOB.match(name)]:
            del os.environ[name]
        file = Path(args["model_repository"]) / args["model_version"] / "model.yaml"
        arguments = yaml.safe_load(file.read_text(encoding="utf-8"))
        triton = arguments.pop("triton_config")
        self.period_s = triton["cancellation_check_period_ms"] / 1000
        from tensorrt_llm import LLM, SamplingParams

        self.sampling_params = SamplingParams
        self.by_id: dict = {}
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.llm = LLM(**arguments)

    def finalize(self) -> None:
        self.llm.shutdown()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    def execute(self, requests: list) -> None:
        for request in requests:
            sender = request.get_response_sender()
            if scalar(request, "stop"):
                asyncio.run_coroutine_threadsafe(self.stop(request.request_id()), self.loop)
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                continue
            try:
                asked = self.asked(request)
            except Exception as error:  # noqa: BLE001  (SamplingParams may raise anything)
                text = str(error) or type(error).__name__
                self.fail(sender, pb_utils.TritonError(text, pb_utils.TritonError.INVALID_ARG))
                continue
            asyncio.run_coroutine_threadsafe(self.run(asked, sender, request.request_id()), self.loop)

    def asked(self, request) -> dict:
        """Prompt, sampling and what to answer. Raises ValueError for what cannot be."""
        check_fields(request, self.fields)
        prompts = texts(request, "text_input")
        if len(prompts) != 1 or not prompts[0]:
            raise ValueError(f"text_input: {len(prompts)} prompts or an empty one; send one a request")
        answers = ("finish_reason", "stop_reason", "cumulative_logprob")
        return {
            "prompt": prompts[0],
            "sampling": self.sampling_params(**sampling_arguments(request)),
            "streaming": bool(scalar(request, "streaming")),
            # Only what was asked for: the stub drops the rest without holding Python's lock.
            "answers": [
                name
                for name in answers
                if scalar(request, f"return_{name}") and name in request.requested_output_names()
            ],
        }

    async def run(self, asked: dict, sender, request_id: str) -> None:
        try:
            await self.generate(asked, sender, request_id)
        except Exception as error:  # noqa: BLE001  (whatever it is, the client must hear of it)
            self.fail(sender, pb_utils.TritonError(f"{type(error).__name__}: {error}"))

    async def generate(self, asked: dict, sender, request_id: str) -> None:
        streaming = asked["streaming"]
        result = self.llm.generate_async(asked["prompt"], asked["sampling"], streaming=streaming)
        watching = asyncio.ensure_future(self.watch(sender, result))
        if request_id:
            self.by_id[request_id] = result
        output = None
        try:
            async for output in result:
                if streaming:
                    sender.send(self.response(output, asked["answers"]))
        finally:
            watching.cancel()
            if self.by_id.get(request_id) is result:
                del self.by_id[request_id]
        if output is None or any(o.finish_reason == "cancelled" for o in output.outputs):
            cancelled = pb_utils.TritonError.CANCELLED
            self.fail(sender, pb_utils.TritonError("the request was cancelled", cancelled))
            return
        if not streaming:
            sender.send(self.response(output, asked["answers"]))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    async def watch(self, sender, result) -> None:
        """Abort the work once the client has cancelled the request."""
        while True:
            # A sender may not go right after is_cancelled(): the stub still signals on its memory.
            self.loop.call_later(KEPT_S, id, sender)
            if sender.is_cancelled():
                break
            await asyncio.sleep(self.period_s)
        result.abort()

    async def stop(self, request_id: str) -> None:
        """Abort the request of that id: the interface's way for clients that cannot cancel.

        It runs in the loop, after the start of every request that came before it.
        """
        result = self.by_id.get(request_id)
        if result is not None:
            result.abort()

    def response(self, output, answers: list[str]):
        made = [pb_utils.Tensor("text_output", np.array([o.text.encode() for o in output.outputs], object))]
        for name in answers:
            values = [getattr(o, name) for o in output.outputs]
            if name == "cumulative_logprob":
                made.append(pb_utils.Tensor(name, np.array(values, np.float32)))
            else:
                made.append(pb_utils.Tensor(name, np.array([str(v).encode() for v in values], object)))
        return pb_utils.InferenceResponse(output_tensors=made)

    def fail(self, sender, error) -> None:
        sender.send(pb_utils.InferenceResponse(error=error))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
