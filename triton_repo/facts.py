"""What a report says of an engine: from its directory, or from the server that serves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from builder.surgery.parallel import format_windows
from engines import manifest as manifests
from engines.embedded.step import BLOCK_SIZE
from engines.manifest import Manifest

FACTS = "ffn_fusion_facts"  # a parameter of tensorrt_llm that its backends do not read


def facts(manifest: Manifest) -> dict[str, Any]:
    """Counts, backend, ranks, limits, the release and GPU that built it, and blocks in parallel if any."""
    blocks = manifest.kv_cache_blocks
    parallel = format_windows(manifest.architecture.parallel)
    gpus = manifest.hardware.get("gpus") or [{"name": manifest.hardware.get("cpu")}]
    return {
        **manifest.counts(),
        "backend": manifest.backend,
        "pp_size": manifest.pp_size,
        "tensorrt_llm": manifest.compiler.get("tensorrt_llm"),
        "built_on": gpus[0]["name"],
        "max_input_len": manifest.max_input_len,
        "max_seq_len": min(manifest.max_seq_len, blocks * BLOCK_SIZE if blocks else manifest.max_seq_len),
        **({"parallel_blocks": parallel} if parallel else {}),
    }


def facts_text(manifest: Manifest) -> str:
    """`facts` as a parameter of a config.pbtxt."""
    return json.dumps(facts(manifest))


def of_engine(directory: Path) -> dict[str, Any]:
    """The facts of an engine directory."""
    return {"engine": str(directory), **facts(manifests.read(directory))}
