"""Whether an engine's weights and KV cache fit in the memory that is there. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from builder.errors import UserError
from engines import hardware
from engines.embedded.step import BLOCK_SIZE
from engines.manifest import Manifest

_ELEMENT = {"float32": 4, "bfloat16": 2}


def kv_cache_bytes(manifest: Manifest) -> int:
    """Of one rank's pool, all of which a full engine touches."""
    local = manifest.architecture.shard(manifest.tp_size)
    return manifest.kv_cache_blocks * BLOCK_SIZE * local.kv_cache_bytes_per_token(_ELEMENT[manifest.dtype])


def check(engine: Path, manifest: Manifest, ranks: int) -> None:
    """Raises UserError where `ranks` of the engine's ranks do not fit on this host together."""
    weights = (engine / "rank0.safetensors").stat().st_size
    needed, free = ranks * (weights + kv_cache_bytes(manifest)), hardware.free_memory()
    if needed > free:
        raise UserError(
            f"{engine}: {ranks} rank{'s' * (ranks > 1)} need {_gb(needed)} of memory, {_gb(free)} are free "
            f"(KV cache {_gb(ranks * kv_cache_bytes(manifest))}); build with a smaller --kv-cache-memory, "
            "--max-batch-size or --max-seq-len"
        )


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
