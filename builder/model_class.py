"""The class that a written model belongs to, by the same names in Hugging Face and TensorRT-LLM."""

from __future__ import annotations

from builder.architecture import Architecture
from builder.errors import UserError

DECILM, LLAMA, QWEN = "DeciLMForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM"


def model_class(architecture: Architecture) -> str:
    """Llama or Qwen2 where all layers are alike and whole, else DeciLM.

    Raises UserError for q/k/v biases in unlike layers: DeciLM (model_type nemotron-nas) has none.
    """
    if architecture.uniform:
        return QWEN if architecture.attention_bias else LLAMA
    if architecture.attention_bias:
        raise UserError(
            f"attention_bias: a model with unlike layers is written as {DECILM} (nemotron-nas), which has "
            "no q/k/v biases (qwen2 has them); leave the model as it is, or change all its layers alike"
        )
    return DECILM
