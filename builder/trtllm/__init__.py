"""The TensorRT-LLM checkpoint format: config.json and rankN.safetensors, N = pp_rank * tp_size + tp_rank."""

from builder.trtllm.conversion import convert, prepare
from builder.trtllm.layout import DECILM, LLAMA, QWEN, config, kind_of, trtllm_name
from builder.trtllm.preview import Preview, preview
from builder.trtllm.reading import TrtllmCheckpoint, read

__all__ = [
    "DECILM",
    "LLAMA",
    "QWEN",
    "Preview",
    "TrtllmCheckpoint",
    "config",
    "convert",
    "kind_of",
    "prepare",
    "preview",
    "read",
    "trtllm_name",
]
