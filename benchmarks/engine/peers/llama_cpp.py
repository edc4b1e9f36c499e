"""llama.cpp through llama-cpp-python's low-level functions, compiled for this processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.engine.channel import Engine, Job, Trace, serve
from benchmarks.engine.peers import gguf_file

# Its tile configuration faults as GCC compiles it: ggml-org/llama.cpp pull request 26954.
NO_AMX = "without its AMX kernels, which crash"
Item = tuple[int, int, int, bool]  # token, position, sequence, whether its logits are wanted


class LlamaCpp(Engine):
    """One llama_batch a step holds a token of every sequence. A context is made for a batch size."""

    packages = ("llama-cpp-python", "gguf")
    context: Any = None
    sequences = 0

    def prepare(self, job: Job) -> dict[str, Any]:
        gguf_file.write(Path(job.model), Path(job.work) / "model.gguf", job.precision)
        return {}

    def load(self, job: Job) -> dict[str, Any]:
        self.job = job
        llama_cpp.llama_backend_init()
        instructions = llama_cpp.llama_print_system_info().decode().strip()
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = not (job.precision == "int8" and "AMX_INT8 = 1" in instructions)
        file = str(Path(job.work) / "model.gguf").encode()
        self.model = llama_cpp.llama_model_load_from_file(file, params)
        if not self.model:
            raise RuntimeError("llama.cpp cannot load the GGUF")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(job.batch * job.prompt, 0, 1)
        cache = "F32, no flash attention" if job.precision == "fp32" else "F16"
        amx = "" if params.use_extra_bufts else f"; {NO_AMX}"
        return {
            "settings": f"GGUF {gguf_file.TYPES[job.precision].name}, KV cache {cache}{amx}; {instructions}"
        }

    def _new_context(self, sequences: int) -> None:
        if self.context is not None:
            llama_cpp.llama_free(self.context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = sequences * self.job.length
        params.n_batch = sequences * self.job.prompt
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self.job.threads
        if self.job.precision == "fp32":  # else it computes attention in float16, and other tokens follow
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context")
        self.sequences = sequences

    def _run(self, items: list[Item]) -> list[int]:
        """The likeliest next tokens where they are wanted."""
        batch = self.batch
        batch.n_tokens = len(items)
        for n, (token, position, sequence, wanted) in enumerate(items):
            batch.token[n], batch.pos[n] = token, position
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
            batch.logits[n] = wanted
        status = llama_cpp.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        return [self._best(n) for n, item in enumerate(items) if item[3]]

    def _best(self, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax())

    def generate(self, prompts: list[list[int]], count: int) -> Trace:
        if self.sequences != len(prompts):
            self._new_context(len(prompts))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        trace = Trace.begin(len(prompts))
        items = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        tokens = self._run(items)
        trace.add_step(tokens)
        for position in range(len(prompts[0]), len(prompts[0]) + count - 1):
            tokens = self._run([(token, position, n, True) for n, token in enumerate(tokens)])
            trace.add_step(tokens)
        return trace


if __name__ == "__main__":
    serve(LlamaCpp())
