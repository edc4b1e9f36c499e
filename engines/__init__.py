"""From a TensorRT-LLM checkpoint to running tensor-parallel engines."""
