"""TensorRT-LLM as an engine backend: through its own command line, never through its modules."""
