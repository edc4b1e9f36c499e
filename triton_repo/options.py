"""How a GPU engine is served: what deploy's options say, checked on their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from builder.errors import UserError

SCHEDULER_POLICIES = ("guaranteed_no_evict", "max_utilization")


@dataclass(frozen=True, kw_only=True)
class DeployOptions:
    """None leaves a choice to the engine. Delays in microseconds; `max_queue_size` 0 is no limit.

    `gpu_ids` are the GPUs of each instance, `kv_cache_fraction` the share of the GPU memory that weights
    leave. Raises UserError naming the option that is out of range.
    """

    max_batch_size: int | None = None
    max_queue_delay_us: int = 0
    max_queue_size: int = 0
    kv_cache_fraction: float | None = None
    chunked_context: bool | None = None
    kv_cache_reuse: bool | None = None
    scheduler_policy: str = "guaranteed_no_evict"
    instances: int = 1
    gpu_ids: tuple[tuple[int, ...], ...] = ()
    draft: Path | None = None
    bls_instances: int | None = None

    def __post_init__(self) -> None:
        if self.kv_cache_fraction is not None and not 0 < self.kv_cache_fraction < 1:
            raise UserError(f"kv_cache_fraction: {self.kv_cache_fraction} is not between 0 and 1")
        if self.scheduler_policy not in SCHEDULER_POLICIES:
            raise UserError(
                f"scheduler_policy: {self.scheduler_policy!r} is not one of {', '.join(SCHEDULER_POLICIES)}"
            )
        ids = [gpu for instance in self.gpu_ids for gpu in instance]
        if len(set(ids)) != len(ids):
            twice = next(gpu for gpu in ids if ids.count(gpu) > 1)
            raise UserError(f"gpu_ids: GPU {twice} is named twice; give each rank a GPU of its own")
        if self.instances > 1 and not self.gpu_ids:
            raise UserError(f"instances: {self.instances} need --gpu-ids, a list each, e.g. 0,1;2,3 for two")
        if self.gpu_ids and len(self.gpu_ids) != self.instances:
            raise UserError(
                f"gpu_ids: {len(self.gpu_ids)} lists for {self.instances} instances; give one list an "
                "instance, e.g. 0,1;2,3 for two"
            )

    def check_world_size(self, world_size: int) -> None:
        """Raises UserError where the GPUs are not as many as an engine's ranks."""
        for number, instance in enumerate(self.gpu_ids):
            if len(instance) != world_size:
                raise UserError(
                    f"gpu_ids: {len(instance)} GPUs for instance {number}, the engine has {world_size} "
                    "ranks; give as many"
                )


def parse_gpu_ids(text: str) -> tuple[tuple[int, ...], ...]:
    """`0,1;2,3`: the GPUs of each instance, as TensorRT-LLM's backend writes them."""
    parts = [[number.strip() for number in instance.split(",")] for instance in text.split(";")]
    if not all(number.isdecimal() for instance in parts for number in instance):
        raise UserError(f"gpu_ids: {text!r} is no list of GPUs; e.g. 0,1;2,3 for two instances")
    return tuple(tuple(map(int, instance)) for instance in parts)


def gpu_ids_text(gpu_ids: tuple[tuple[int, ...], ...]) -> str:
    """The reverse of `parse_gpu_ids`."""
    return ";".join(",".join(map(str, instance)) for instance in gpu_ids)
