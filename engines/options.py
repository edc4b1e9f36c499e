"""The options of build-engine that only TensorRT-LLM has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from builder.errors import UserError
from builder.options import DIRECTORY

# A command is no module of TensorRT-LLM, and --help must not wait for one: the names are click's own.
_VALUES: dict[str, tuple[Any, str]] = {
    "max-num-tokens": (click.IntRange(1), "Tokens of all requests in one step. Default: 8192."),
    "opt-num-tokens": (click.IntRange(1), "Tokens of a step to tune for. Default: batch x beams."),
    "max-beam-width": (click.IntRange(1), "Default: 1."),
    "gemm-plugin": (str, "auto, disable, float16, bfloat16 or fp8. Default: auto; FP8: disable."),
    "kv-cache-type": (click.Choice(["paged", "continuous"]), "Default: paged."),
    "timing-cache": (str, "File to read kernel timings from and write them to."),
    "workers": (click.IntRange(1), "Ranks built at once, each on a GPU. Default: all."),
    "log-level": (str, "trtllm-build's. Default: info."),
}
_SWITCHES = {
    "multiple-profiles": "Several optimization profiles. Default: no.",
    "gemm-swiglu-plugin": "FP8: gate, up and SiLU in one kernel. Default: no.",
    "low-latency-gemm-plugin": "FP8: GEMMs for few tokens. Default: no.",
    "use-paged-context-fmha": "Chunked prompts and KV reuse. Default: yes.",
    "use-fp8-context-fmha": "Default: with an FP8 KV cache.",
    "use-fused-mlp": "Join gate and up. Default: unless TensorRT's 2^31 limit forbids it.",
    "weight-streaming": "Keep weights on the host. Default: no.",
}


def trtllm_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add them, and --config, --dry-run and --without-nvlink. Each is None or False where not given."""
    options = [
        click.option("--config", "config_file", type=DIRECTORY, help="tensorrt-llm: options as YAML."),
        *(
            click.option(f"--{name}", type=kind, help=f"tensorrt-llm: {text}")
            for name, (kind, text) in _VALUES.items()
        ),
        *(
            click.option(f"--{name}/--no-{name}", default=None, help=f"tensorrt-llm: {text}")
            for name, text in _SWITCHES.items()
        ),
        click.option("--without-nvlink", is_flag=True, help="tensorrt-llm: build though GPUs lack NVLink."),
        click.option(
            "--dry-run", is_flag=True, help="tensorrt-llm: print estimate, checks and command; runs anywhere."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def refuse_given(options: dict[str, Any]) -> None:
    """Raise UsageError where one of `trtllm_options` was given to another backend."""
    for name, value in options.items():
        if value not in (None, False):
            flag = "config" if name == "config_file" else name.replace("_", "-")
            raise click.UsageError(f"--{flag} belongs to --backend tensorrt-llm")


def check_dtype(dtype: str) -> None:
    """Raise UserError: TensorRT-LLM takes the checkpoint's."""
    if dtype != "auto":
        raise UserError(f"dtype: TensorRT-LLM builds the checkpoint's; give --dtype {dtype} to convert")
