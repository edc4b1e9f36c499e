"""The options of build-engine that only one backend has."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import click

from builder.errors import UserError
from builder.options import DIRECTORY


class Size(click.ParamType):
    """Bytes: a number with an optional unit, decimal or binary."""

    name = "size"
    _units = {"": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}} | {
        f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)
    }

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value))
        if found is None or found[2] not in self._units:
            self.fail(f"{value!r} is not a size such as 512MB or 4GiB", param, ctx)
        size = float(found[1]) * self._units[found[2]]
        if size > sys.maxsize:
            self.fail(f"{str(value)[:40]!r} is more than any memory", param, ctx)
        return int(size)


_LIMITS: dict[str, tuple[Any, str]] = {  # of both
    "max-num-tokens": (click.IntRange(1), "Tokens of all requests in one step. Default: 8192."),
    "max-beam-width": (click.IntRange(1), "Default: 1."),
}
_ENGINE: dict[str, tuple[Any, str]] = {
    "opt-num-tokens": (click.IntRange(1), "Tokens of a step to tune for. Default: batch x beams."),
    "gemm-plugin": (str, "auto, disable, float16, bfloat16 or fp8. Default: auto; FP8: disable."),
    "kv-cache-type": (click.Choice(["paged", "continuous"]), "Default: paged."),
    "max-draft-len": (click.IntRange(1), "Draft tokens the engine checks at once; for deploy --draft."),
    "timing-cache": (str, "File to read kernel timings from and write them to."),
    "workers": (click.IntRange(1), "Ranks built at once, each on a GPU. Default: all."),
    "log-level": (str, "trtllm-build's. Default: info."),
    "multiple-profiles/--no-multiple-profiles": (None, "Several optimization profiles. Default: no."),
    "gemm-swiglu-plugin/--no-gemm-swiglu-plugin": (
        None,
        "FP8: gate, up and SiLU in one kernel. Default: no.",
    ),
    "low-latency-gemm-plugin/--no-low-latency-gemm-plugin": (None, "FP8: GEMMs for few tokens. Default: no."),
    "use-paged-context-fmha/--no-use-paged-context-fmha": (
        None,
        "Chunked prompts and KV reuse. Default: yes.",
    ),
    "use-fp8-context-fmha/--no-use-fp8-context-fmha": (None, "Default: with an FP8 KV cache."),
    "use-fused-mlp/--no-use-fused-mlp": (
        None,
        "Join gate and up. Default: unless TensorRT's 2^31 limit forbids it.",
    ),
    "weight-streaming/--no-weight-streaming": (None, "Keep weights on the host. Default: no."),
}
_PYTORCH: dict[str, tuple[Any, str]] = {
    "tp-size": (click.IntRange(1), "Tensor-parallel ranks. Default: 1."),
    "pp-size": (click.IntRange(1), "Pipeline stages. Default: 1."),
    "kv-cache-fraction": (float, "Of the GPU memory that weights leave. Default: 0.9."),
    "cuda-graphs/--no-cuda-graphs": (None, "Replay decode steps. Default: yes."),
    "chunked-prefill/--no-chunked-prefill": (None, "Cut long prompts. Default: yes."),
}
_EMBEDDED: dict[str, tuple[Any, str]] = {
    "device": (click.Choice(["cpu", "cuda"]), "What runs it; cuda was not run yet. Default: cpu."),
    "quant": (
        click.Choice(["int8", "fp8"]),
        "Weights in 8 bits, a scale a row: int8 on the CPU, fp8 on cuda. What that costs is printed.",
    ),
    "kv-cache-memory": (Size(), "Of each rank, such as 4GiB; requests wait for room. Default: all fit."),
    "data": (DIRECTORY, "Text file to tell the cost of --quant on. Default: text of the engine's own."),
    "tokenizer": (DIRECTORY, "The Hugging Face directory with tokenizer.json, for --data."),
    "parallel-blocks": (
        str,
        "FIRST-LAST,...: windows of CHECKPOINT's layers that run in parallel, each on the window's input.",
    ),
}
_SHORT = {"tp-size": "--tp", "pp-size": "--pp"}
_FLAGS = ("without_nvlink", "dry_run")  # False where they were not given
WHOSE = {"embedded": _EMBEDDED, "tensorrt-llm": _LIMITS, "trtllm-build": _ENGINE, "PyTorch backend": _PYTORCH}


def _name(flag: str) -> str:
    return flag.partition("/")[0].replace("-", "_")


def backend_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add them, and --config, --dry-run and --without-nvlink. Each is None or False where not given."""
    options = [
        click.option("--config", "config_file", type=DIRECTORY, help="trtllm-build: options as YAML."),
        *(
            click.option(
                _SHORT.get(flag, f"--{flag}"), _name(flag), type=kind, default=None, help=f"{whose}: {text}"
            )
            for whose, table in WHOSE.items()
            for flag, (kind, text) in table.items()
        ),
        click.option("--without-nvlink", is_flag=True, help="trtllm-build: build though GPUs lack NVLink."),
        click.option(
            "--dry-run", is_flag=True, help="tensorrt-llm: print estimate, checks and command; runs anywhere."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def embedded_options(options: dict[str, Any]) -> dict[str, Any]:
    """What was given for the embedded engine. Raises UsageError for what only another backend has."""
    return _of(options, _EMBEDDED, "belongs to --backend tensorrt-llm")


def check_sequential(options: dict[str, Any], backend: str) -> None:
    """Raise UsageError where blocks shall run in parallel on a backend that has no way to say it."""
    if options["parallel_blocks"] is not None and backend != "embedded":
        raise click.UsageError(
            f"--parallel-blocks: {backend} runs blocks one after the other; leave it out, or give "
            "--backend embedded"
        )


def refuse_given(options: dict[str, Any], backend: str) -> None:
    """Raise UsageError where one of `backend_options` was given to a backend that has none of its own."""
    _of(options, {}, f"is not for --backend {backend}")


def engine_options(options: dict[str, Any]) -> dict[str, Any]:
    """What was given for trtllm-build. Raises UsageError for what only the PyTorch backend has."""
    return _of(options, _LIMITS | _ENGINE, "has no meaning for a TensorRT-LLM checkpoint")


def pytorch_options(options: dict[str, Any]) -> dict[str, Any]:
    """What was given for the PyTorch backend. Raises UsageError for what only trtllm-build has."""
    return _of(options, _LIMITS | _PYTORCH, "has no meaning for a Hugging Face directory")


def _of(options: dict[str, Any], table: dict[str, tuple[Any, str]], otherwise: str) -> dict[str, Any]:
    given = {n: v for n, v in options.items() if v is not None and not (n in _FLAGS and v is False)}
    own = {_name(flag) for flag in table}
    _refuse({name: value for name, value in given.items() if name not in own}, otherwise)
    return given


def _refuse(given: dict[str, Any], why: str) -> None:
    for name in given:
        flag = {"config_file": "config"}.get(name, name.replace("_", "-"))
        raise click.UsageError(f"{_SHORT.get(flag, f'--{flag}')} {why}")


def check_dtype(dtype: str) -> None:
    """Raise UserError: TensorRT-LLM takes the checkpoint's."""
    if dtype != "auto":
        raise UserError(f"dtype: TensorRT-LLM builds the checkpoint's; give --dtype {dtype} to convert")
