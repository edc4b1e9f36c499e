"""Where and how a model is to run: what an estimate is for."""

from __future__ import annotations

from dataclasses import dataclass

from builder.errors import UserError
from builder.search.gpu import Gpu

GPUS_PER_NODE = 8
ELEMENT_BYTES = {"fp8": 1, "int8": 1, "bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """`batch` sequences, each with `context` tokens in the KV cache, on tp_size * pp_size GPUs.

    `dtype` is that of the layers' matrices; the embedding, lm_head, norms and activations are bfloat16.
    `kv_dtype` is that of the KV cache, by default the same as `dtype`. `nodes` is by default as few as have
    8 GPUs each. Raises UserError by field.
    """

    gpu: Gpu
    tp_size: int = 1
    pp_size: int = 1
    nodes: int | None = None
    batch: int = 1
    context: int = 2048
    dtype: str = "fp8"
    kv_dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("tp_size", "pp_size", "batch", "context"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not positive; give at least 1")
        for name in ("dtype", "kv_dtype"):
            value = getattr(self, name)
            if value not in ELEMENT_BYTES and not (name == "kv_dtype" and value is None):
                raise UserError(f"{name}: {value!r} is not one of {', '.join(ELEMENT_BYTES)}")
        self._check_nodes()

    def _check_nodes(self) -> None:
        nodes = self.num_nodes
        if nodes < 1 or self.world_size % nodes:
            raise UserError(
                f"nodes: {nodes} does not divide tp_size {self.tp_size} x pp_size {self.pp_size} GPUs; "
                "give a divisor with --nodes"
            )
        local = self.gpus_per_node
        if self.tp_size % local and local % self.tp_size:
            raise UserError(
                f"nodes: {nodes} of {local} GPUs cut tensor-parallel groups of {self.tp_size} unevenly; "
                "give other --nodes, --tp or --pp"
            )

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def num_nodes(self) -> int:
        return -(-self.world_size // GPUS_PER_NODE) if self.nodes is None else self.nodes

    @property
    def gpus_per_node(self) -> int:
        return self.world_size // self.num_nodes

    @property
    def tp_ranks_per_node(self) -> int:
        """Ranks of one tensor-parallel group that NVLink joins."""
        return min(self.tp_size, self.gpus_per_node)

    @property
    def tp_nodes(self) -> int:
        """Nodes that one tensor-parallel group is spread over."""
        return self.tp_size // self.tp_ranks_per_node

    @property
    def weight_bytes(self) -> int:
        """Bytes of an element of a layer's matrices."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def kv_bytes(self) -> int:
        """Bytes of an element of the KV cache."""
        return ELEMENT_BYTES[self.kv_dtype or self.dtype]

    def describe(self) -> str:
        """In words: "H100, TP 8, batch 1, context 2048, fp8"."""
        stages = f", PP {self.pp_size}" if self.pp_size > 1 else ""
        nodes = f", {self.num_nodes} nodes" if self.num_nodes > 1 else ""
        cache = f" with {self.kv_dtype} KV cache" if self.kv_dtype not in (None, self.dtype) else ""
        return (
            f"{self.gpu.name}, TP {self.tp_size}{stages}{nodes}, batch {self.batch}, context {self.context}, "
            f"{self.dtype}{cache}"
        )
