"""ONNX Runtime: a graph of onnxruntime-genai's model builder, run by its generator."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.engine.channel import Engine, Job, NotOffered, Trace, serve

OPTIONS = {"fp32": ["-p", "fp32"], "int8": ["-p", "int8", "--extra_options", "accuracy_level=4"]}


class OnnxRuntime(Engine):
    """The graph has GroupQueryAttention and a cache that past and present share."""

    packages = ("onnxruntime", "onnxruntime-genai")

    def prepare(self, job: Job) -> dict[str, Any]:
        if job.precision not in OPTIONS:
            raise NotOffered(f"the model builder has no {job.precision} for CPUs")
        work = Path(job.work)
        places = ["-i", job.model, "-o", str(work / "onnx"), "-c", str(work / "cache"), "-e", "cpu"]
        module = "onnxruntime_genai.models.builder"
        command = [sys.executable, "-m", module, *places, *OPTIONS[job.precision]]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        file = work / "onnx" / "genai_config.json"
        values = json.loads(file.read_text(encoding="utf-8"))
        values["model"]["decoder"]["session_options"]["intra_op_num_threads"] = job.threads
        file.write_text(json.dumps(values), encoding="utf-8")
        return {}

    def load(self, job: Job) -> dict[str, Any]:
        import onnxruntime_genai

        self.genai = onnxruntime_genai
        self.model = onnxruntime_genai.Model(str(Path(job.work) / "onnx"))
        return {"settings": f"onnxruntime-genai, builder {' '.join(OPTIONS[job.precision])} -e cpu"}

    def generate(self, prompts: list[list[int]], count: int) -> Trace:
        import numpy as np

        length = len(prompts[0]) + count
        params = self.genai.GeneratorParams(self.model)
        limits = {"min_length": length, "max_length": length}
        params.set_search_options(batch_size=len(prompts), do_sample=False, **limits)
        trace = Trace.begin(len(prompts))
        generator = self.genai.Generator(self.model, params)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        for _ in range(count):
            generator.generate_next_token()
            trace.add_step(generator.get_next_tokens().tolist())
        return trace


if __name__ == "__main__":
    serve(OnnxRuntime())
