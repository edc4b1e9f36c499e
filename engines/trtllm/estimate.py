"""What a build and the engine after it need: bytes on the GPU, on the host and on the disk.

Weights and KV cache are counted, the rest is estimated and said to be.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from builder.architecture import Architecture
from builder.surgery.sharding import stage_layers
from builder.trtllm import TrtllmCheckpoint
from engines.trtllm.options import Build

RUNTIME_BYTES = 2 << 30  # CUDA context, cuBLAS and NCCL workspaces: an assumption
# The log of a build in TensorRT-LLM's qwen example: 47.3 GB of host memory for a 7.7 B float16 model.
HOST_COPIES = 3
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes; those of a GPU are of the rank that needs most."""

    rank_weight_bytes: int
    rank_kv_bytes: int
    rank_activation_bytes: int
    worker_host_bytes: int
    workers: int
    disk_bytes: int

    @property
    def gpu_bytes(self) -> int:
        """Weights, KV cache at the full batch and length, activations, and the runtime's own."""
        return self.rank_weight_bytes + self.rank_kv_bytes + self.rank_activation_bytes + RUNTIME_BYTES

    @property
    def host_bytes(self) -> int:
        return self.worker_host_bytes * self.workers

    def to_dict(self) -> dict[str, Any]:
        """The figures with their sums."""
        return {**asdict(self), "gpu_bytes": self.gpu_bytes, "host_bytes": self.host_bytes}

    def describe(self) -> str:
        """A table, largest rank first."""
        rows = (
            ("GPU memory of a rank", self.gpu_bytes, "sum of the four below"),
            ("  weights", self.rank_weight_bytes, "counted"),
            ("  KV cache", self.rank_kv_bytes, "counted, all sequences at full length"),
            ("  activations", self.rank_activation_bytes, "estimated, the widest layer at max_num_tokens"),
            ("  runtime", RUNTIME_BYTES, "assumed"),
            ("host memory", self.host_bytes, f"estimated, {self.workers} at once, {HOST_COPIES} x a rank"),
            ("disk", self.disk_bytes, "estimated, the engines' weights"),
        )
        return "\n".join(f"{name:22} {size / 1e9:9.2f} GB  {how}" for name, size, how in rows)


def estimate(checkpoint: TrtllmCheckpoint, build: Build, workers: int) -> Estimate:
    """What `build` of `checkpoint` needs with `workers` ranks building at once."""
    files = [checkpoint.directory / f"rank{r}.safetensors" for r in range(checkpoint.world_size)]
    sizes = [file.stat().st_size for file in files]
    local = checkpoint.architecture.shard(checkpoint.tp_size)
    size, o = ELEMENT_BYTES[checkpoint.dtype], build.options
    sequences = o.max_batch_size * o.max_beam_width
    kv_size = 1 if checkpoint.kv_cache_quant_algo else size
    return Estimate(
        rank_weight_bytes=max(sizes),
        rank_kv_bytes=sequences * build.max_seq_len * _kv_elements(local, checkpoint.pp_size) * kv_size,
        rank_activation_bytes=_activations(local, o.max_num_tokens, sequences, size),
        worker_host_bytes=HOST_COPIES * max(sizes),
        workers=workers,
        disk_bytes=sum(sizes),
    )


def _kv_elements(local: Architecture, pp_size: int) -> int:
    """Numbers a token adds to the cache of the stage with most KV heads."""
    heads = [layer.num_key_value_heads for layer in local.layers]
    stages = [stage_layers(len(heads), pp_size, s) for s in range(pp_size)]
    return max(2 * local.head_dim * sum(heads[i] for i in stage) for stage in stages)


def _activations(local: Architecture, tokens: int, sequences: int, size: int) -> int:
    """Hidden states, residual and one layer's inner tensors, and float32 logits of every sequence."""
    inner = 0
    for layer in local.layers:
        qkv = (
            local.q_size + 2 * layer.num_key_value_heads * local.head_dim if layer.num_key_value_heads else 0
        )
        inner = max(inner, qkv + local.q_size, 3 * layer.intermediate_size)  # gate, up and their product
    return tokens * (3 * local.hidden_size + inner) * size + sequences * local.vocab_size * 4
