"""How long a decode step takes: the parts' seconds, estimated or measured, and their sum over a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from builder.architecture import FFN, Architecture, Attention, Linear
from builder.search.setting import Setting
from builder.surgery.sharding import stage_layers

OUTSIDE_BYTES = 2  # of an element of the embedding, lm_head and norms: bfloat16
RUNTIME_BYTES = 2 << 30  # CUDA context, cuBLAS and NCCL workspaces, activations: an assumption


class Costs(Protocol):
    """Seconds of one decode step of the whole batch on one tensor-parallel group, by part."""

    @property
    def measured(self) -> bool:
        """Whether they were measured, not estimated."""

    @property
    def source(self) -> str:
        """ "estimated for H100, TP 8, ..." or "measured: FILE"."""

    def attention(self, attention: Attention | Linear | None) -> float:
        """An attention with its norm, all-reduce and launches; 0.0 for none."""

    def ffn(self, ffn: FFN | Linear | None) -> float:
        """An FFN of any width, fused ones too, with its norm, all-reduce and launches; 0.0 for none."""

    def outside(self) -> float:
        """Embedding, last norm, lm_head, sampling and what the host does between steps."""

    def all_reduce(self) -> float:
        """One all-reduce of a part's output, of which blocks in parallel need fewer; 0.0 where not known."""


def step_seconds(architecture: Architecture, costs: Costs) -> float:
    """Seconds of one decode step: `outside` and the sum over all layers, less the all-reduces they share."""
    parts = sum(costs.attention(x.attention) + costs.ffn(x.ffn) for x in architecture.layers)
    saved = shared_all_reduces(architecture)
    return costs.outside() + parts - (saved * costs.all_reduce() if saved else 0.0)


def shared_all_reduces(architecture: Architecture) -> int:
    """All-reduces of a step that blocks in parallel save, see `Architecture.all_reduces_per_token`."""
    if not architecture.parallel:
        return 0
    apart = replace(architecture, parallel=())
    return apart.all_reduces_per_token(2) - architecture.all_reduces_per_token(2)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one GPU."""

    weights: int
    kv_cache: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache


def memory(architecture: Architecture, setting: Setting) -> Memory:
    """Weights and KV cache of the rank that holds most, all sequences at full context.

    Raises UserError where tp_size does not fit, see `Architecture.shard`.
    """
    return max(_stages(architecture, setting), key=lambda x: x.total)


def gpu_bytes(architecture: Architecture, setting: Setting) -> int:
    """The total of `memory`."""
    return memory(architecture, setting).total


def fits(architecture: Architecture, setting: Setting) -> bool:
    """Whether `gpu_bytes` and RUNTIME_BYTES fit into a GPU."""
    return gpu_bytes(architecture, setting) + RUNTIME_BYTES <= setting.gpu.memory_bytes


def _stages(architecture: Architecture, setting: Setting) -> list[Memory]:
    """A rank of each pipeline stage; the first has the embedding, the last lm_head and its norm."""
    local, last = architecture.shard(setting.tp_size), setting.pp_size - 1
    table = local.vocab_size * local.hidden_size * OUTSIDE_BYTES
    head = (local.lm_head_size + 1) * local.hidden_size * OUTSIDE_BYTES
    shared = local.tie_word_embeddings and last == 0
    stages = []
    for stage in range(setting.pp_size):
        layers = [local.layers[i] for i in stage_layers(len(local.layers), setting.pp_size, stage)]
        weights = sum(local.layer_parameters(x) for x in layers) * setting.weight_bytes
        weights += table * (stage == 0) + head * (stage == last and not shared)
        token = sum(x.num_key_value_heads for x in layers) * 2 * local.head_dim * setting.kv_bytes
        stages.append(Memory(weights=weights, kv_cache=setting.batch * setting.context * token))
    return stages
