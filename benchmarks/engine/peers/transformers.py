"""transformers' `generate` with a static cache, which it runs eagerly on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from benchmarks.engine.channel import Engine, Job, NotOffered, Trace, serve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Tokens(BaseStreamer):
    """Records each step's tokens; the first call brings the prompts."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.prompted = trace, False

    def put(self, value: torch.Tensor) -> None:
        if self.prompted:
            self.trace.add_step(value.reshape(-1).tolist())
        self.prompted = True

    def end(self) -> None:
        """All has been recorded."""


class Transformers(Engine):
    """No end token stops it."""

    packages = ("transformers", "torch")

    def prepare(self, job: Job) -> dict[str, Any]:
        if job.precision not in DTYPES:
            raise NotOffered(f"no {job.precision} without another package")
        return {}

    def load(self, job: Job) -> dict[str, Any]:
        torch.set_num_threads(job.threads)
        self.model = AutoModelForCausalLM.from_pretrained(job.model, dtype=DTYPES[job.precision]).eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        return {"settings": f"generate, static cache, eager, {self.model.config._attn_implementation}"}

    def generate(self, prompts: list[list[int]], count: int) -> Trace:
        ids = torch.tensor(prompts)
        trace = Trace.begin(len(prompts))
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            cache_implementation="static",
            streamer=Tokens(trace),
        )
        return trace


if __name__ == "__main__":
    serve(Transformers())
