"""A stand-in for TensorRT-LLM's LLM API over the embedded engine named by STANDIN_ENGINE.

It has what the repository's model file uses, refuses arguments the real one does not know (names of
tensorrt_llm/llmapi/llm_args.py, 1.0 on, as build-engine and deploy write them), and serves no GPU.
"""

import asyncio
import os
from pathlib import Path

from builder import tokenizer as tokenizers
from engines.embedded.session import Request, Session

ARGUMENTS = {
    "model", "backend", "trust_remote_code", "dtype", "tensor_parallel_size", "pipeline_parallel_size",
    "gpus_per_node", "max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens", "max_beam_width",
    "enable_chunked_prefill", "kv_cache_config", "cuda_graph_config", "scheduler_config",
    "speculative_config", "disable_overlap_scheduler",
}  # fmt: skip


class SamplingParams:
    def __init__(
        self, *, max_tokens=32, temperature=None, top_k=None, top_p=None, seed=0, stop=None, best_of=None,
        frequency_penalty=None, presence_penalty=None, exclude_input_from_output=True,
        return_perf_metrics=False,
    ):  # fmt: skip
        if best_of is not None and best_of > 1:
            raise ValueError(
                f"Greedy decoding in the LLM API does not allow multiple returns, best_of={best_of}"
            )
        self.sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        self.max_tokens, self.stop = max_tokens, stop or []


class Completion:
    def __init__(self):
        self.text, self.finish_reason, self.stop_reason, self.cumulative_logprob = "", None, None, -1.5


class Result:
    """Awaits outputs as the real one: the same object, grown, at every step."""

    def __init__(self, llm, prompt, params, streaming):
        tokenizer, self.streaming = llm.tokenizer, streaming
        self.slow = params.sampling["seed"] == 99
        stops = tuple(tuple(tokenizer.encode(s, add_special_tokens=False).ids) for s in params.stop)
        ends = llm.end_ids
        self.generation = llm.session.generate(
            Request(
                input_ids=tuple(tokenizer.encode(prompt).ids),
                max_tokens=params.max_tokens,
                end_id=ends[0] if ends else None,
                stop_words=stops,
                **params.sampling,
            )
        )
        self.stream = tokenizers.TextStream(tokenizer=tokenizer)
        self.outputs, self.finished, self.aborted = [Completion()], False, False

    def abort(self):
        if not self.finished:
            with open(os.environ["STANDIN_LOG"], "a") as file:
                file.write("stopped\n")
        self.aborted = True
        self.generation.close()

    def __aiter__(self):
        return self

    async def __anext__(self):
        loop, out = asyncio.get_running_loop(), self.outputs[0]
        while not self.finished:
            await asyncio.sleep(0.02 if self.slow else 0)  # time to stop it
            step = await loop.run_in_executor(None, lambda: next(self.generation, None))
            self.finished = step is None or step.finish_reason is not None
            out.text += self.stream.push(step.token_ids if step else (), self.finished)
            if self.finished:
                reason = "cancelled" if step is None else step.finish_reason
                out.finish_reason = {"end_id": "stop", "stop_words": "stop"}.get(reason, reason)
            if self.streaming or self.finished:
                return self
        raise StopAsyncIteration


class LLM:
    def __init__(self, **arguments):
        unknown = set(arguments) - ARGUMENTS
        if unknown:
            raise ValueError(f"{sorted(unknown)[0]}: Extra inputs are not permitted")
        model = Path(arguments["model"])
        self.tokenizer, self.end_ids = tokenizers.load(model), tokenizers.end_ids(model)
        self.session = Session(Path(os.environ["STANDIN_ENGINE"]))

    def generate_async(self, prompt, sampling_params, *, streaming=False):
        return Result(self, prompt, sampling_params, streaming)

    def shutdown(self):
        self.session.close()
