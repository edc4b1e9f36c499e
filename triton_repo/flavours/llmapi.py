"""TensorRT-LLM's LLM API in Triton's Python backend: one model, text to text.

Names and tensors are those of triton_backend/all_models/llmapi (1.0 on). Triton batches nothing here,
the LLM API does; that a stream has many responses is said in config.pbtxt, since launchers start
Triton with --disable-auto-complete-config, and in model.yaml for those that do not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from builder.errors import UserError
from engines.manifest import Manifest
from engines.trtllm.serving import CONFIG
from triton_repo.facts import FACTS, facts_text
from triton_repo.options import DeployOptions, gpu_ids_text
from triton_repo.pbtxt import Model, Tensor
from triton_repo.tensors import TTFT_BUCKETS_MS, fields, optional_tensors

MODEL_YAML = "model.yaml"
SAMPLING = {
    "best_of": "INT32",
    "temperature": "FP32",
    "top_k": "INT32",
    "top_p": "FP32",
    "frequency_penalty": "FP32",
    "presence_penalty": "FP32",
    "max_tokens": "INT32",
    "seed": "UINT64",
    "exclude_input_from_output": "BOOL",
    "return_perf_metrics": "BOOL",
}
SWITCHES = ("streaming", "return_finish_reason", "return_stop_reason", "return_cumulative_logprob", "stop")
OUTPUTS = {"text_output": "STRING", "finish_reason": "STRING", "stop_reason": "STRING"}
TRITON = "triton_config"
DRAFT_LEN = 5  # tokens drafted at a time


def tensorrt_llm(manifest: Manifest, options: DeployOptions) -> Model:
    """The one model. Text is a list of one prompt: there is no batch dimension."""
    sampling = {f"sampling_param_{name}": (kind, (1,)) for name, kind in SAMPLING.items()}
    inputs = (
        Tensor(name="text_input", data_type="STRING", dims=(-1,)),
        *optional_tensors(sampling),
        *optional_tensors({"sampling_param_stop": ("STRING", (-1,))}),
        *optional_tensors(dict.fromkeys(SWITCHES, ("BOOL", (1,)))),
    )
    return Model(
        name="tensorrt_llm",
        max_batch_size=0,
        instances=options.instances,
        decoupled=True,
        inputs=inputs,
        outputs=(
            *(Tensor(name=name, data_type=kind, dims=(-1,)) for name, kind in OUTPUTS.items()),
            Tensor(name="cumulative_logprob", data_type="FP32", dims=(-1,)),
        ),
        parameters={
            **({"gpu_device_ids": gpu_ids_text(options.gpu_ids)} if options.gpu_ids else {}),
            FACTS: facts_text(manifest),
            **fields(inputs),
        },
        code=("llmapi.py", "limits.py"),
        ttft_buckets_ms=TTFT_BUCKETS_MS,
    )


def model_yaml(engine: Path, manifest: Manifest, options: DeployOptions) -> str:
    """The arguments of `tensorrt_llm.LLM`, and what the model file reads about Triton.

    A draft model is a Hugging Face directory here. Raises UserError for what has no meaning here.
    """
    arguments = _arguments(engine)
    _set_limits(arguments, manifest, options)
    if options.scheduler_policy != DeployOptions.scheduler_policy:
        arguments["scheduler_config"] = {"capacity_scheduler_policy": options.scheduler_policy.upper()}
    if options.draft is not None:
        arguments.update(_speculation(options.draft, manifest))
    if options.gpu_ids:
        arguments["gpus_per_node"] = manifest.world_size
    arguments[TRITON] = {"max_batch_size": 0, "decoupled": True, "cancellation_check_period_ms": 100}
    return yaml.safe_dump(arguments, sort_keys=False)


def _speculation(draft: Path, manifest: Manifest) -> dict[str, Any]:
    """Draft-target decoding. Its keys were renamed between 1.1 and 1.3 (tensorrt_llm/llmapi/llm_args.py)."""
    version = manifest.compiler.get("tensorrt_llm")
    if version is None:
        raise UserError(
            "draft: the release is not known and its names differ; run build-engine where TensorRT-LLM is "
            "installed"
        )
    if not (draft / "config.json").is_file():
        raise UserError(f"draft: {draft} has no config.json; give a Hugging Face directory")
    old = version.startswith(("1.0", "1.1"))
    return {
        "speculative_config": {
            "decoding_type": "DraftTarget" if old else "Draft_Target",
            "max_draft_len": DRAFT_LEN,
            "speculative_model_dir" if old else "speculative_model": str(draft.resolve()),
        },
        "disable_overlap_scheduler": True,
    }


def _arguments(engine: Path) -> dict[str, Any]:
    file = engine / CONFIG
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: missing; build the engine directory again") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{file}: not valid YAML; build the engine directory again") from None
    if not isinstance(values, dict) or "model" not in values:
        raise UserError(f"{file}: names no model; build the engine directory again")
    return values


def _set_limits(arguments: dict[str, Any], manifest: Manifest, options: DeployOptions) -> None:
    if options.bls_instances is not None:
        raise UserError("bls_instances: the LLM API's repository has no tensorrt_llm_bls; leave it out")
    if options.max_queue_delay_us or options.max_queue_size:
        name = "max_queue_delay_us" if options.max_queue_delay_us else "max_queue_size"
        raise UserError(f"{name}: the LLM API has its own queue, Triton's holds nothing; leave it out")
    if options.max_batch_size is not None:
        if options.max_batch_size > manifest.max_batch_size:
            raise UserError(
                f"max_batch_size: {options.max_batch_size} is above the {manifest.max_batch_size} that was "
                "checked; lower it or give build-engine a larger one"
            )
        arguments["max_batch_size"] = options.max_batch_size
        if arguments.get("cuda_graph_config"):
            arguments["cuda_graph_config"]["max_batch_size"] = options.max_batch_size
    if options.kv_cache_fraction is not None:
        arguments["kv_cache_config"]["free_gpu_memory_fraction"] = options.kv_cache_fraction
    if options.kv_cache_reuse is not None:
        arguments["kv_cache_config"]["enable_block_reuse"] = options.kv_cache_reuse
    if options.chunked_context is not None:
        arguments["enable_chunked_prefill"] = options.chunked_context
