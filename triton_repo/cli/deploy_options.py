"""The options of deploy that GPU engines have, and one that all have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from builder.options import DIRECTORY

if TYPE_CHECKING:
    from triton_repo.options import DeployOptions

_OPTIONS: dict[str, tuple[Any, str]] = {
    "max-batch-size": (click.IntRange(1), "Requests at once. Default: the engine's."),
    "max-queue-delay-us": (
        click.IntRange(0),
        "Microseconds that Triton waits for a fuller batch. Default: 0.",
    ),
    "max-queue-size": (
        click.IntRange(0),
        "Requests that may wait; more are refused. Default: no limit; of an embedded engine 256.",
    ),
    "kv-cache-fraction": (float, "Of the GPU memory that weights leave. Default: 0.9; with a draft 0.45."),
    "chunked-context/--no-chunked-context": (None, "Cut long prompts. Default: where the engine can."),
    "kv-cache-reuse/--no-kv-cache-reuse": (
        None,
        "Between prompts that begin alike. Default: where the engine can.",
    ),
    "scheduler-policy": (
        click.Choice(["guaranteed_no_evict", "max_utilization"]),
        "Which requests start. Default: guaranteed_no_evict.",
    ),
    "instances": (click.IntRange(1), "Copies of the engine, each on its own GPUs. Default: 1."),
    "gpu-ids": (str, "GPUs of each instance: 0,1;2,3 for two of TP 2."),
    "draft": (DIRECTORY, "Draft model: an engine directory, or a Hugging Face one for the PyTorch backend."),
    "bls-instances": (
        click.IntRange(1),
        "Requests at once through tensorrt_llm_bls. Default: 32 at most; without a draft 4.",
    ),
}
_ANY = ("max-queue-size",)  # embedded engines have it too
_START: dict[str, tuple[Any, str]] = {
    "manifests": (DIRECTORY, "Directory to write that starts it: scripts, compose, Kubernetes, monitoring."),
    "gpus-per-node": (click.IntRange(1), "Default: 8."),
    "claim": (str, "Kubernetes: the PersistentVolumeClaim with the models. Default: models."),
}


def _name(flag: str) -> str:
    return flag.partition("/")[0].replace("-", "_")


def gpu_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add them; each is None where not given."""
    for flag, (kind, text) in reversed([*_OPTIONS.items(), *_START.items()]):
        told = text if flag in _ANY else f"GPU engine: {text}"
        option = click.option(f"--{flag}", _name(flag), type=kind, default=None, help=told)
        command = option(command)
    return command


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was given of how to serve, and of how to start."""
    given = {name: value for name, value in options.items() if value is not None}
    start = {_name(flag) for flag in _START}
    return (
        {name: value for name, value in given.items() if name not in start},
        {name: value for name, value in given.items() if name in start},
    )


def flag_of(name: str) -> str:
    """`--max-batch-size` of `max_batch_size`."""
    return "--" + name.replace("_", "-")


def deploy_options(given: dict[str, Any]) -> DeployOptions:
    """DeployOptions of what was given. Raises UserError for a value out of range."""
    from triton_repo.options import DeployOptions, parse_gpu_ids

    values = {**given}
    if "gpu_ids" in values:
        values["gpu_ids"] = parse_gpu_ids(values["gpu_ids"])
    if "draft" in values:
        values["draft"] = Path(values["draft"])
    return DeployOptions(**values)
