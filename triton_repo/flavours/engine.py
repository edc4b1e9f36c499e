"""A TensorRT engine behind TensorRT-LLM's C++ backend, releases up to 1.2.

The configuration is that of triton_backend/all_models/inflight_batcher_llm with every place filled;
parameters that would only say the backend's default are left out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from builder.errors import UserError
from engines.manifest import Manifest
from triton_repo.facts import FACTS, facts_text
from triton_repo.flavours import text
from triton_repo.options import DeployOptions, gpu_ids_text
from triton_repo.pbtxt import Batching, Model, Tensor
from triton_repo.tensors import ADAPTERS, PREPROCESSED, SAMPLING, TTFT_BUCKETS_MS, answers

# Scalars are seen by the backend as [batch], lists of unlike length share a batch.
_SCALARS = {
    "draft_acceptance_threshold": "FP32",
    "early_stopping": "BOOL",
    "beam_search_diversity_rate": "FP32",
    "runtime_top_p_min": "FP32",
    "runtime_top_p_decay": "FP32",
    "runtime_top_p_reset_ids": "INT32",
    "stop": "BOOL",
}
_LISTS = {
    "draft_input_ids": ("INT32", (-1,)),
    "draft_logits": ("FP32", (-1, -1)),
    "retention_token_range_starts": ("INT32", (-1,)),
    "retention_token_range_ends": ("INT32", (-1,)),
    "retention_token_range_priorities": ("INT32", (-1,)),
    "retention_token_range_durations_ms": ("INT32", (-1,)),
    "retention_decode_priority": ("INT32", (1,)),
    "retention_decode_duration_ms": ("INT32", (1,)),
    "lookahead_window_size": ("INT32", (1,)),
    "lookahead_ngram_size": ("INT32", (1,)),
    "lookahead_verification_set_size": ("INT32", (1,)),
}
BLS_INSTANCES = 32  # processes of about 40 MB; more requests wait in Triton's queue
EXECUTOR_WORKER = "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker"


def inputs() -> tuple[Tensor, ...]:
    """What the backend takes; lengths must be there, as must tokens, which it calls optional."""
    made = tuple(
        Tensor(
            name=name,
            data_type=kind,
            dims=dims,
            optional=name not in ("input_lengths", "request_output_len"),
            scalar=dims == (1,),
            ragged=dims != (1,),
        )
        for name, kind, dims in PREPROCESSED.values()
    )
    scalars = {**dict(SAMPLING.values()), **_SCALARS}
    lists = {name: kind for name, kind in {**_LISTS, **ADAPTERS}.items() if name != "lora_task_id"}
    return (
        *made,
        *(
            Tensor(name=n, data_type=t, optional=True, scalar=True)
            for n, t in {**scalars, "lora_task_id": "UINT64"}.items()
        ),
        *(Tensor(name=n, data_type=t, dims=d, optional=True, ragged=True) for n, (t, d) in lists.items()),
    )


def tensorrt_llm(
    engine: Path, manifest: Manifest, tokenizer: Path, options: DeployOptions, *, name: str = "tensorrt_llm"
) -> Model:
    """Tokens to tokens. Raises UserError where an option asks for what the engine was not built for."""
    return Model(
        name=name,
        backend="tensorrtllm",
        max_batch_size=max_batch_size(manifest, options),
        instances=options.instances,
        batching=batching(options),
        decoupled=True,
        inputs=inputs(),
        outputs=(
            Tensor(name="output_ids", data_type="INT32", dims=(-1, -1)),
            Tensor(name="sequence_length", data_type="INT32", dims=(-1,)),
            *answers(),
        ),
        parameters=_parameters(engine, manifest, tokenizer, options),
    )


def _parameters(engine: Path, manifest: Manifest, tokenizer: Path, options: DeployOptions) -> dict[str, str]:
    chunked, reuse = _needs_paged_context(manifest, options)
    values = {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": str(engine),
        "max_beam_width": str(manifest.compiler.get("max_beam_width", 1)),
        "batch_scheduler_policy": options.scheduler_policy,
        "kv_cache_free_gpu_mem_fraction": str(options.kv_cache_fraction or _fraction(options)),
        "enable_kv_cache_reuse": _word(reuse),
        "enable_chunked_context": _word(chunked),
        "exclude_input_in_output": "true",
        "executor_worker_path": EXECUTOR_WORKER,
        # The backend fails where one of these three keys is missing; empty ones switch guided decoding off.
        "tokenizer_dir": str(tokenizer),
        "guided_decoding_backend": "",
        "xgrammar_tokenizer_info_path": "",
    }
    values[FACTS] = facts_text(manifest)
    if options.gpu_ids:
        values["gpu_device_ids"] = gpu_ids_text(options.gpu_ids)
    return values


def _fraction(options: DeployOptions) -> float:
    """Of the memory free when the engine loads; target and draft load onto the same GPUs."""
    return 0.9 if options.draft is None else 0.45


def _needs_paged_context(manifest: Manifest, options: DeployOptions) -> tuple[bool, bool]:
    """Chunked context and KV-cache reuse: on where the engine can, refused where it cannot."""
    can = bool(manifest.compiler.get("paged_context_fmha"))
    for name in ("chunked_context", "kv_cache_reuse"):
        if getattr(options, name) and not can:
            raise UserError(
                f"{name}: the engine was built without use_paged_context_fmha; build it with, or leave it out"
            )
    chunked, reuse = options.chunked_context, options.kv_cache_reuse
    return can if chunked is None else chunked, can if reuse is None else reuse


def _word(on: bool) -> str:
    return "true" if on else "false"


def max_batch_size(manifest: Manifest, options: DeployOptions) -> int:
    """Of all models of the repository. Raises UserError where it is above the engine's."""
    size = options.max_batch_size or manifest.max_batch_size
    if size > manifest.max_batch_size:
        raise UserError(
            f"max_batch_size: {size} is above the engine's {manifest.max_batch_size}; "
            "lower it or build the engine with a larger one"
        )
    return size


def batching(options: DeployOptions) -> Batching:
    """The queue, which the backend reads as well."""
    return Batching(max_queue_delay_us=options.max_queue_delay_us, max_queue_size=options.max_queue_size)


def models(
    engine: Path,
    manifest: Manifest,
    tokenizer: Path,
    options: DeployOptions,
    draft: Manifest | None = None,
) -> tuple[Model, ...]:
    """The models of a repository: five, and the draft's where options name one."""
    tokens = tensorrt_llm(engine, manifest, tokenizer, options)
    size = tokens.max_batch_size
    made = [
        text.preprocessing(
            tokenizer, max_input_len=manifest.max_input_len, max_batch_size=size, batching=batching(options)
        ),
        tokens,
        text.postprocessing(tokenizer, max_batch_size=size),
        text.ensemble(tokens),
        text.tensorrt_llm_bls(
            tokens,
            instances=options.bls_instances or min(size, BLS_INSTANCES if draft else 4),
            num_draft_tokens=_draft_tokens(manifest, draft),
        ),
    ]
    if draft is not None:
        assert options.draft is not None, "the draft is read from there"
        made.insert(2, _draft_model(options.draft, draft, manifest, tokenizer, options, size))
    streaming = ("tensorrt_llm", "ensemble", "tensorrt_llm_bls")
    return tuple(replace(m, ttft_buckets_ms=TTFT_BUCKETS_MS if m.name in streaming else ()) for m in made)


def _draft_tokens(target: Manifest, draft: Manifest | None) -> int:
    if draft is None:
        return 0
    length = int(target.compiler.get("max_draft_len") or 0)
    if length < 1:
        raise UserError("draft: the engine was built without --max-draft-len; build it with, e.g., 5")
    for name, engine in (("engine", target), ("draft", draft)):
        if engine.max_input_len < engine.max_seq_len - 1:
            raise UserError(
                f"draft: the {name}'s max_input_len is {engine.max_input_len}, and all said so far is the "
                f"prompt of the next pass; build it with --max-input-len {engine.max_seq_len - 1}"
            )
    return length


def _draft_model(
    engine: Path, draft: Manifest, target: Manifest, tokenizer: Path, options: DeployOptions, size: int
) -> Model:
    """tensorrt_llm_draft. Raises UserError where the draft does not go with the target."""
    if draft.backend != target.backend:
        raise UserError(f"draft: {engine} has backend {draft.backend}, the engine {target.backend}")
    if draft.architecture.vocab_size != target.architecture.vocab_size:
        raise UserError(
            f"draft: {engine} has vocab_size {draft.architecture.vocab_size}, the engine "
            f"{target.architecture.vocab_size}; take a draft of the same tokenizer"
        )
    if draft.max_seq_len < target.max_seq_len or draft.max_batch_size < size:
        raise UserError(
            f"draft: {engine} takes {draft.max_batch_size} requests of {draft.max_seq_len} tokens, "
            f"the engine {size} of {target.max_seq_len}; build the draft with the engine's limits"
        )
    own = DeployOptions(
        max_batch_size=size,
        max_queue_delay_us=options.max_queue_delay_us,
        max_queue_size=options.max_queue_size,
        kv_cache_fraction=options.kv_cache_fraction or _fraction(options),
        scheduler_policy=options.scheduler_policy,
    )
    return tensorrt_llm(engine, draft, tokenizer, own, name="tensorrt_llm_draft")
