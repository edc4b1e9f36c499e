"""ffn-fusion.json: what a written model directory holds, where it came from, and the digests of it all.

    {"version": 1, "kind": "tensorrt-llm" | "hugging-face", "source": digest of the input model,
     "plan": plan.yaml's content or null, "layers": [new layer of input layer 0, ... or null],
     "files": {"config.json": {"bytes": n, "xxh3_128": hex},
               "rank0.safetensors": {"bytes": n, "header": hex, "tensors": {name: hex}}}}

XXH3-128 finds damage; it does not keep out an attacker.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import xxhash

from builder import writer
from builder.architecture import Architecture
from builder.errors import UserError
from builder.storage import json_bytes, output_directory, read_json
from builder.team import Team
from builder.tensorfile import Layout
from builder.tensors import Expression
from builder.writer import Progress

NAME = "ffn-fusion.json"
VERSION = 1


def layer_mapping(architecture: Architecture, num_input_layers: int) -> list[int | None]:
    """For each layer of the input model the layer that holds it now, None where it is gone."""
    places: list[int | None] = [None] * num_input_layers
    for index, layer in enumerate(architecture.layers):
        for member in layer.members:
            places[member] = index
    return places


def write_directory(
    output: Path,
    weights: Mapping[str, Mapping[str, Expression]],
    texts: Mapping[str, bytes],
    facts: Mapping[str, Any],
    *,
    team: Team | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write weight files and small files with their manifest; `output` appears whole or not at all.

    The weight files are dealt over the team's processes, the largest first. Raises UserError where
    the output exists or a disk is full.
    """
    team = team or Team()
    layouts = {name: Layout.of(tensors) for name, tensors in weights.items()}
    num_bytes = sum(x.num_bytes for x in layouts.values()) + sum(map(len, texts.values()))
    dealt = sorted(weights, key=lambda name: (-layouts[name].num_bytes, name))[team.rank :: team.size]
    with ExitStack() as stack:
        directory = team.first(lambda: stack.enter_context(output_directory(output, num_bytes)))
        digests = team.together(
            lambda: writer.write(
                directory, {name: weights[name] for name in dealt}, threads=threads, progress=progress
            )
        )
        parts = team.collect(digests)
        if team.rank == 0:
            merged = {name: tensors for part in parts for name, tensors in part.items()}
            files = {name: _text_entry(content) for name, content in sorted(texts.items())}
            files |= {name: _weights_entry(layouts[name], merged[name]) for name in sorted(weights)}
            for name, content in texts.items():
                (directory / name).write_bytes(content)
            manifest = {"version": VERSION, **facts, "files": files}
            (directory / NAME).write_bytes(json_bytes(manifest))


def _text_entry(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}


def _weights_entry(layout: Layout, digests: Mapping[str, str]) -> dict[str, Any]:
    header = xxhash.xxh3_128_hexdigest(layout.header)
    return {"bytes": layout.num_bytes, "header": header, "tensors": dict(digests)}


def read(directory: Path) -> dict[str, Any] | None:
    """The manifest of a directory, None where it has none. Raises UserError on a broken one."""
    file = directory / NAME
    if not file.exists():
        return None
    values = read_json(file)
    if values.get("version") != VERSION:
        raise UserError(f"{file}: version {values.get('version')!r} is not {VERSION}; write it again")
    files = values.get("files")
    if not isinstance(files, dict) or not all(_is_entry(name, x) for name, x in files.items()):
        raise UserError(f"{file}: files is missing or broken; write the directory again")
    return values


def _is_entry(name: str, entry: Any) -> bool:
    if Path(name).name != name or not isinstance(entry, dict) or type(entry.get("bytes")) is not int:
        return False
    if "tensors" not in entry:
        return isinstance(entry.get("xxh3_128"), str)
    return isinstance(entry.get("header"), str) and isinstance(entry["tensors"], dict)
