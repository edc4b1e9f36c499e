"""The MODEL of a command, with its own weights or random ones."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from builder.checkpoint import Checkpoint


def read_model(model: Path, seed: int | None, dtype: str | None = None) -> tuple[Path, Checkpoint]:
    """MODEL, random where there is a seed, and the directory that has its tokenizer."""
    if seed is None:
        from builder import huggingface

        return model, huggingface.read(model)
    from builder import random_weights

    if random_weights.has_weights(model):
        raise click.UsageError(f"{model} has weights; leave out --random-weights or give its config.json")
    scratch = click.get_current_context().with_resource(TemporaryDirectory())
    return random_weights.read(model, seed, Path(scratch), dtype)


def random_facts(model: Path, seed: int | None) -> dict[str, Any]:
    """What ffn-fusion.json and the result say of random weights, those MODEL was written with as well."""
    if seed is not None:
        return {"random_weights": {"seed": seed}}
    from builder import manifest

    name = "random_weights"
    record = manifest.read(model) or {}
    return {name: record[name]} if name in record else {}


def random_text(facts: dict[str, Any]) -> str:
    return f"; the weights are random, seed {facts['random_weights']['seed']}" if facts else ""
