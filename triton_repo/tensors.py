"""The tensors of TensorRT-LLM's Triton models, engine flavour: names and types up to 1.2.

From triton_backend/all_models/inflight_batcher_llm. Left out is what a text-only decoder has no use for:
encoders, images, cross attention, prompt tables, and embedding biases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from triton_repo.pbtxt import Tensor

Row = tuple[str, str, tuple[int, ...]]  # name inside, type, dims

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
    "return_perf_metrics": ("return_perf_metrics", "BOOL"),
    "return_num_input_tokens": ("return_num_input_tokens", "BOOL"),
    "return_num_output_tokens": ("return_num_output_tokens", "BOOL"),
    "exclude_input_in_output": ("exclude_input_in_output", "BOOL"),
}
# These go through preprocessing.
WORDS: dict[str, Row] = {
    "bad_words": ("BAD_WORDS_DICT", "STRING", (-1,)),
    "stop_words": ("STOP_WORDS_DICT", "STRING", (-1,)),
    "end_id": ("END_ID", "INT32", (1,)),
    "pad_id": ("PAD_ID", "INT32", (1,)),
}
# What preprocessing makes, and the tensorrt_llm input it becomes.
PREPROCESSED: dict[str, Row] = {
    "INPUT_ID": ("input_ids", "INT32", (-1,)),
    "REQUEST_INPUT_LEN": ("input_lengths", "INT32", (1,)),
    "REQUEST_OUTPUT_LEN": ("request_output_len", "INT32", (1,)),
    "BAD_WORDS_IDS": ("bad_words_list", "INT32", (2, -1)),
    "STOP_WORDS_IDS": ("stop_words_list", "INT32", (2, -1)),
    "OUT_END_ID": ("end_id", "INT32", (1,)),
    "OUT_PAD_ID": ("pad_id", "INT32", (1,)),
}
# These have one name everywhere, and only TensorRT-LLM's own backend knows them.
ADAPTERS: dict[str, tuple[str, tuple[int, ...]]] = {
    "lora_task_id": ("UINT64", (1,)),
    "lora_weights": ("FP16", (-1, -1)),
    "lora_config": ("INT32", (-1, 3)),
    "guided_decoding_guide_type": ("STRING", (1,)),
    "guided_decoding_guide": ("STRING", (1,)),
}
# Of the client of tensorrt_llm_bls alone: drafts of another model.
DRAFT = {"num_draft_tokens": ("INT32", (1,)), "use_draft_logits": ("BOOL", (1,))}
# What tensorrt_llm answers beside output_ids and sequence_length; the client gets it under the same name.
ANSWERS = {
    "cum_log_probs": ("FP32", (-1,)),
    "output_log_probs": ("FP32", (-1, -1)),
    "context_logits": ("FP32", (-1, -1)),
    "generation_logits": ("FP32", (-1, -1, -1)),
    "batch_index": ("INT32", (1,)),
    "sequence_index": ("INT32", (1,)),
    "kv_cache_alloc_new_blocks": ("INT32", (1,)),
    "kv_cache_reused_blocks": ("INT32", (1,)),
    "kv_cache_alloc_total_blocks": ("INT32", (1,)),
    "arrival_time_ns": ("INT64", (1,)),
    "first_scheduled_time_ns": ("INT64", (1,)),
    "first_token_time_ns": ("INT64", (1,)),
    "last_token_time_ns": ("INT64", (1,)),
    "acceptance_rate": ("FP32", (1,)),
    "total_accepted_draft_tokens": ("INT32", (1,)),
    "total_draft_tokens": ("INT32", (1,)),
    "num_input_tokens": ("INT32", (1,)),
    "num_output_tokens": ("INT32", (1,)),
}
# Upper edges of the histogram of first responses; Triton's own are 100, 500, 2000 and 5000 ms.
TTFT_BUCKETS_MS = (10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 1000, 2000, 5000, 10000)


def client_inputs() -> tuple[Tensor, ...]:
    """What a client of the text models sends; only text_input and max_tokens must be there."""
    optional = {
        **{k: (t, (1,)) for k, (_, t) in SAMPLING.items()},
        **{k: (t, d) for k, (_, t, d) in WORDS.items()},
    }
    return (
        Tensor(name="text_input", data_type="STRING"),
        Tensor(name="max_tokens", data_type="INT32"),
        *optional_tensors(optional),
    )


def fields(inputs: Sequence[Tensor]) -> dict[str, str]:
    """The parameter by which a model knows what a client may send; Triton itself drops the rest."""
    return {"fields": ",".join(tensor.name for tensor in inputs)}


def optional_tensors(table: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[Tensor, ...]:
    """Inputs that may be left out."""
    return tuple(Tensor(name=n, data_type=t, dims=d, optional=True) for n, (t, d) in table.items())


def answers() -> tuple[Tensor, ...]:
    """The outputs of `ANSWERS`."""
    return tuple(Tensor(name=n, data_type=t, dims=d) for n, (t, d) in ANSWERS.items())
