"""What trtllm-bench is asked, and its command line for each release.

Read in tensorrt_llm/commands/bench.py and tensorrt_llm/bench/benchmark/{low_latency,throughput}.py: 0.20
has no name for the engines' backend and no PyTorch backend in `latency`, 1.0 has both, 1.1 gives `latency`
the file for the LLM's arguments that `throughput` has had since.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from builder.errors import UserError
from engines.manifest import Manifest
from engines.trtllm import build, serving

ENGINE, PYTORCH = build.BACKEND, serving.BACKEND
# What options or the mode say; in the file they would win over those.
_SAID_BY_OPTIONS = (
    "model",
    "backend",
    "trust_remote_code",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "max_batch_size",
    "max_seq_len",
    "max_num_tokens",
)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of an engine: lengths in tokens, counts in requests."""

    concurrency: int
    requests: int
    input_tokens: int
    output_tokens: int

    @property
    def mode(self) -> str:
        return "latency" if self.concurrency == 1 else "throughput"

    @property
    def warm_up(self) -> int:
        """Requests before those that count, enough to fill every place once."""
        return max(2, self.concurrency)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An engine directory and the Hugging Face directory of its model."""

    directory: Path
    model: Path
    manifest: Manifest

    @property
    def is_engine(self) -> bool:
        return self.manifest.backend == ENGINE


def arguments(
    measured: Subject, load: Load, *, version: str, dataset: Path, report: Path, config: Path
) -> list[str]:
    """trtllm-bench's arguments. `config` is the file for the PyTorch backend's options."""
    values: list[tuple[str, object]]
    if measured.is_engine:
        # Before 1.0 there was one backend for engines and no name for it.
        values = [
            ("engine_dir", measured.directory),
            *[("backend", "tensorrt")] * (_numbers(version) >= (1, 0)),
        ]
    else:
        values = _pytorch_values(measured, load, version, config)
    values += [
        ("dataset", dataset),
        ("num_requests", load.requests),
        ("warmup", load.warm_up),
        ("concurrency", load.concurrency),
        ("report_json", report),
    ]
    words = [word for name, value in values for word in (f"--{name}", str(value))]
    general = ["--model", str(measured.model), "--model_path", str(measured.model)]
    general += ["--workspace", str(report.parent)]
    return [*general, load.mode, *words, *["--streaming"] * (load.mode == "throughput")]


def _pytorch_values(measured: Subject, load: Load, version: str, config: Path) -> list[tuple[str, object]]:
    contract, llm = measured.manifest, llm_arguments(measured)
    values: list[tuple[str, object]] = [
        ("backend", "pytorch"),
        ("tp", contract.tp_size),
        ("pp", contract.pp_size),
        ("max_seq_len", contract.max_seq_len),
        ("kv_cache_free_gpu_mem_fraction", llm["kv_cache_config"]["free_gpu_memory_fraction"]),
    ]
    if load.mode == "throughput":
        values += [("max_batch_size", contract.max_batch_size), ("max_num_tokens", llm["max_num_tokens"])]
    if takes_yaml(version, load.mode):
        values.append(("extra_llm_api_options", config))
    return values


def llm_options(measured: Subject, load: Load) -> dict[str, Any]:
    """What of llm.yaml no option of trtllm-bench says.

    KV blocks are not reused, or the prompts of the warm-up would be answered from the cache.
    """
    values = {k: v for k, v in llm_arguments(measured).items() if k not in _SAID_BY_OPTIONS}
    values["kv_cache_config"] = {**values["kv_cache_config"], "enable_block_reuse": False}
    if values["cuda_graph_config"] is not None and load.mode == "latency":
        values["cuda_graph_config"] = {**values["cuda_graph_config"], "max_batch_size": 1}
    return values


def llm_arguments(measured: Subject) -> dict[str, Any]:
    file = measured.directory / serving.CONFIG
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read ({type(error).__name__}); build the engine again") from None
    for name in ("kv_cache_config", "cuda_graph_config", "max_num_tokens"):
        if not isinstance(values, dict) or name not in values:
            raise UserError(f"{file}: {name} is missing; build the engine again")
    assert isinstance(values, dict), "checked above"
    return values


def takes_yaml(version: str, mode: str) -> bool:
    """Whether the mode has --extra_llm_api_options: throughput ever since, latency from 1.1."""
    return mode == "throughput" or _numbers(version) >= (1, 1)


def _numbers(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    assert found is not None, "installed() has refused it"
    return int(found[1]), int(found[2])
