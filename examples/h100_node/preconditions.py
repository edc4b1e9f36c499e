"""What would stop a run hours from now: told before it begins."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from recipe import Choice
from stages import Stage

from builder import huggingface
from builder.errors import UserError
from engines import hardware
from engines.trtllm import preflight, release
from triton_repo.launch import images
from triton_repo.launch.commands import TRITONSERVER

BENCH_TOKENS = (128, 64)  # what compare-latency asks trtllm-bench for: prompt, output


def check_choice(choice: Choice, stages: Sequence[Stage]) -> None:
    """Raise UserError where the limits contradict the model or what is measured."""
    limit = huggingface.read_architecture(choice.model).max_position_embeddings
    if choice.max_seq_len > limit:
        raise UserError(f"--max-seq-len {choice.max_seq_len}: the model's limit is {limit}; lower it")
    if not any(stage.name.startswith("bench-") for stage in stages):
        return
    if max(choice.levels) > choice.max_batch_size:
        raise UserError(
            f"--concurrency {choice.concurrency}: above --max-batch-size {choice.max_batch_size}; "
            "lower the one or raise the other"
        )
    least = max(2 * BENCH_TOKENS[0], sum(BENCH_TOKENS))  # build-engine takes half of it for prompts
    if choice.max_seq_len < least:
        raise UserError(
            f"--max-seq-len {choice.max_seq_len}: {BENCH_TOKENS[0]} tokens of prompt and {BENCH_TOKENS[1]} "
            f"of output are measured; give {least} or more"
        )


def check_machine(choice: Choice, stages: Sequence[Stage]) -> None:
    """Raise UserError for the first thing that a stage needs and this machine lacks."""
    names = {stage.name for stage in stages if stage.on_gpu}
    if not names:
        return
    version = release.installed()
    if any(name.startswith("build-") for name in names):
        release.engine_builder()
    if any(name.startswith("check-") for name in names) and not release.has_pytorch_backend(version):
        raise UserError(f"tensorrt_llm: {version} has no PyTorch backend, 1.0 has; give --path engine")
    found = preflight.hopper()
    if len(found) < choice.tp_size:
        raise UserError(f"gpu: --tp {choice.tp_size} needs as many, {len(found)} visible; lower it")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("matplotlib: missing, the reports' plots need it; see README.md")
    if any(name.startswith("deploy-engine") for name in names):
        _or_stop("deploy-engine-baseline", "bench-engine", lambda: images.image(version))
    for name in sorted(name for name in names if name.startswith("serve-")):
        _or_stop(name, f"deploy-{name.removeprefix('serve-')}-fused", _tritonserver)


def _tritonserver() -> None:
    binary = Path(os.environ.get("TRITONSERVER") or TRITONSERVER)
    if not binary.is_file():
        raise UserError(f"{binary}: missing; {release.CONTAINER}")


def _or_stop(stage: str, before: str, probe: Callable[[], object]) -> None:
    try:
        probe()
    except UserError as error:
        raise UserError(f"{stage}: {error}; or stop before it: --until {before}") from None


def memory_problems(stages: Sequence[Stage], gpu_bytes: int) -> list[str]:
    """What does not fit: one line for the GPUs, one for the host."""
    found = []
    if large := _above(stages, "gpu", gpu_bytes):
        found.append(
            f"{_names(large)}: {_most(large, 'gpu') / 1e9:.1f} GB of each GPU, it has {gpu_bytes / 1e9:.1f}; "
            "raise --tp, lower --max-batch-size or --max-seq-len, or give --path engine --quant fp8"
        )
    free = hardware.free_memory()
    if large := _above(stages, "host", free):
        found.append(
            f"{_names(large)}: {_most(large, 'host') / 1e9:.1f} GB of host memory, {free / 1e9:.1f} free; "
            "lower --workers"
        )
    return found


def _above(stages: Sequence[Stage], what: str, limit: int) -> list[Stage]:
    return [stage for stage in stages if stage.needs.get(what, 0) > limit]


def _most(stages: Sequence[Stage], what: str) -> int:
    return max(stage.needs[what] for stage in stages)


def _names(stages: Sequence[Stage]) -> str:
    return ", ".join(stage.name for stage in stages)
