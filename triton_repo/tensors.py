"""The tensors of TensorRT-LLM's Triton models, engine flavour: names and types up to 1.2.

From triton_backend/all_models/inflight_batcher_llm. A client's name, and the one it becomes inside.
"""

from __future__ import annotations

from triton_repo.pbtxt import Tensor

# What a client may send beside text_input and max_tokens, and the tensorrt_llm input it becomes.
SAMPLING = {
    "top_k": ("runtime_top_k", "INT32"),
    "top_p": ("runtime_top_p", "FP32"),
    "temperature": ("temperature", "FP32"),
    "seed": ("seed", "UINT64"),
    "stream": ("streaming", "BOOL"),
    "beam_width": ("beam_width", "INT32"),
    "num_return_sequences": ("num_return_sequences", "INT32"),
    "length_penalty": ("len_penalty", "FP32"),
    "repetition_penalty": ("repetition_penalty", "FP32"),
    "presence_penalty": ("presence_penalty", "FP32"),
    "frequency_penalty": ("frequency_penalty", "FP32"),
    "min_tokens": ("min_tokens", "INT32"),
    "return_log_probs": ("return_log_probs", "BOOL"),
    "return_context_logits": ("return_context_logits", "BOOL"),
    "return_generation_logits": ("return_generation_logits", "BOOL"),
    "exclude_input_in_output": ("exclude_input_in_output", "BOOL"),
}
# The others go through preprocessing.
WORDS = {
    "bad_words": ("BAD_WORDS_DICT", "STRING", (-1,)),
    "stop_words": ("STOP_WORDS_DICT", "STRING", (-1,)),
    "end_id": ("END_ID", "INT32", (1,)),
    "pad_id": ("PAD_ID", "INT32", (1,)),
}


def client_inputs() -> tuple[Tensor, ...]:
    """What a client of the text models sends; only text_input and max_tokens must be there."""
    optional = {
        **{k: (t, (1,)) for k, (_, t) in SAMPLING.items()},
        **{k: (t, d) for k, (_, t, d) in WORDS.items()},
    }
    return (
        Tensor(name="text_input", data_type="STRING"),
        Tensor(name="max_tokens", data_type="INT32"),
        *(Tensor(name=n, data_type=t, dims=dims, optional=True) for n, (t, dims) in optional.items()),
    )
