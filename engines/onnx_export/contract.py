"""decoder.json: what a runtime must know beyond the graphs themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engines.manifest import Manifest
from engines.onnx_export.graph import OPSET, Port
from engines.onnx_export.segments import CONCATENATE, Segment

VERSION = 1
INPUTS = ("input_ids", "position_ids", "attention_mask", "logits_index")


def describe(manifest: Manifest, places: Sequence[str], files: Mapping[str, Segment]) -> dict[str, Any]:
    """Values for JSON. `files` are the segments in the order in which they run, in each of `places`.

    A caller gives `inputs`, and each `cache` entry's `past`, for which he keeps the `present` of the call
    before. Logits are those of the ranks side by side, cut to `vocab_size`: lm_head's rows are padded.
    """
    ports = {name: port for x in files.values() for name, port in x.graph.inputs.items()}
    return {
        "version": VERSION,
        "opset": OPSET,
        "ranks": list(places),
        "segments": [_segment(file, segment) for file, segment in files.items()],
        "inputs": {name: ports[name].to_dict() for name in INPUTS if name in ports},
        "cache": [_cache(port) for name, port in ports.items() if name.startswith("past.")],
        "logits": {
            "output": "logits",
            "operation": CONCATENATE,
            "vocab_size": manifest.architecture.vocab_size,
        },
    }


def _segment(file: str, segment: Segment) -> dict[str, Any]:
    return {
        "file": file,
        "inputs": list(segment.graph.inputs),
        "outputs": list(segment.graph.outputs),
        "collective": segment.collective.to_dict() if segment.collective else None,
    }


def _cache(port: Port) -> dict[str, Any]:
    return {"past": port.name, "present": f"present{port.name.removeprefix('past')}", **port.to_dict()}
