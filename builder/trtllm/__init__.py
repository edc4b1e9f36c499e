"""The TensorRT-LLM checkpoint format: config.json and rankN.safetensors, N = pp_rank * tp_size + tp_rank."""

from builder.trtllm.conversion import convert, prepare
from builder.trtllm.layout import config, trtllm_name
from builder.trtllm.preview import Preview, preview
from builder.trtllm.reading import TrtllmCheckpoint, read

__all__ = [
    "Preview",
    "TrtllmCheckpoint",
    "config",
    "convert",
    "prepare",
    "preview",
    "read",
    "trtllm_name",
]
