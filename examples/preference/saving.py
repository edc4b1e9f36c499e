"""A trained model as a directory of this toolkit: what `fuse` recorded of its layers is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from builder import export, huggingface, manifest
from builder.architecture import Architecture
from builder.arithmetic import cast


def write(model: Path, trained: Path, output: Path, facts: dict[str, Any]) -> None:
    """MODEL with the weights of the directory `trained`, in the dtype it had, and its record with `facts`."""
    source, record = huggingface.read(model), manifest.read(model) or {}
    weights = huggingface.read(trained).tensors
    architecture = with_members(source.architecture, record.get("layers"))
    kept = {k: x for k, x in record.items() if k not in ("version", "kind", "files")}
    export.write(
        replace(
            source,
            architecture=architecture,
            tensors={name: cast(weights[name], source.dtype) for name in source.tensors},
        ),
        model,
        output,
        facts={**kept, "preference": {"from": source.digest, **facts}},
    )


def with_members(architecture: Architecture, places: list[int | None] | None) -> Architecture:
    """The layers with the numbers of the parent's layers that they hold, as the record's `layers` says."""
    if places is None:
        return architecture
    members = [tuple(i for i, x in enumerate(places) if x == n) for n in range(len(architecture.layers))]
    layers = [replace(layer, members=m) for layer, m in zip(architecture.layers, members, strict=True)]
    return replace(architecture, layers=tuple(layers))
