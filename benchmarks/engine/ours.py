"""Our embedded engine: converted and built by `prepare`, run through Session."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.engine.channel import Engine, Job, NotOffered, Trace, serve
from builder import huggingface, trtllm
from engines.embedded import compilation
from engines.embedded.request import Request
from engines.embedded.session import Generation, Session

# What `build` is told; a new precision is a row.
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quant": "int8"},
}


class Ours(Engine):
    """Sequences are requests of their own, sent at once."""

    packages = ("torch",)
    session: Session | None = None

    def prepare(self, job: Job) -> dict[str, Any]:
        if job.precision not in PRECISIONS:
            raise NotOffered(f"no {job.precision}")
        start, work = time.perf_counter(), Path(job.work)
        trtllm.convert(huggingface.read(Path(job.model)), work / "checkpoint")
        converted = time.perf_counter()
        compilation.build(
            work / "checkpoint",
            work / "engine",
            max_batch_size=job.batch,
            max_input_len=job.prompt,
            max_seq_len=job.length,
            **PRECISIONS[job.precision],
        )
        built = time.perf_counter()
        shutil.rmtree(work / "checkpoint")
        return {"convert_s": round(converted - start, 2), "build_s": round(built - converted, 2)}

    def load(self, job: Job) -> dict[str, Any]:
        self.session = Session(Path(job.work) / "engine", start_timeout_s=600)
        return {"pids": self.session.pids, "settings": f"Session, max_batch_size {job.batch}"}

    def generate(self, prompts: list[list[int]], count: int) -> Trace:
        assert self.session is not None
        requests = [Request(input_ids=tuple(prompt), max_tokens=count) for prompt in prompts]
        trace = Trace.begin(len(requests))
        generations = [self.session.generate(request) for request in requests]
        with ThreadPoolExecutor(len(requests)) as readers:
            list(readers.map(partial(_read, trace), range(len(requests)), generations))
        return trace

    def close(self) -> None:
        if self.session is not None:
            self.session.close()


def _read(trace: Trace, sequence: int, generation: Generation) -> None:
    for output in generation:
        trace.add(sequence, output.token_ids)


if __name__ == "__main__":
    serve(Ours())
