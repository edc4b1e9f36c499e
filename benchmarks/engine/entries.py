"""The engines compared, ours first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """`target` is what ours should reach over this one, in tokens per second at batch 1."""

    name: str
    module: str
    target: float | None = None
    packages: tuple[str, ...] = ()  # beside the common ones
    compiled: str | None = None  # a package that is compiled here


OURS = Entry("ours", "benchmarks.engine.ours")
PEERS = (
    Entry("transformers", "benchmarks.engine.peers.transformers", 2.0),
    Entry(
        "onnxruntime",
        "benchmarks.engine.peers.onnxruntime",
        1.0,
        ("onnxruntime==1.32.0", "onnxruntime-genai==0.18.0", "onnx==1.23.2", "onnx-ir==1.1.0"),
    ),
    Entry(
        "llama.cpp",
        "benchmarks.engine.peers.llama_cpp",
        0.9,
        ("gguf==0.19.0",),
        "llama-cpp-python==0.3.36",
    ),
)
# torch comes first and alone: its pin keeps a machine without a GPU from fetching CUDA packages.
COMMON = (
    ("torch==2.13.0", "numpy==2.2.6"),
    ("transformers==5.24.0", "tokenizers==0.23.3", "safetensors==0.8.0"),
)
ENTRIES = (OURS, *PEERS)
