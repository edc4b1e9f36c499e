"""What data sheets say of the GPUs that estimates are for."""

from __future__ import annotations

from dataclasses import dataclass

from builder.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Peaks of one GPU: bytes, bytes/s and FLOP/s; links count one direction."""

    name: str
    memory_bytes: float
    memory_bandwidth: float
    bfloat16_flops: float  # dense
    fp8_flops: float  # dense
    nvlink_bandwidth: float
    network_bandwidth: float  # to GPUs of another node

    def flops(self, dtype: str) -> float:
        """The dense peak of matmuls on `dtype`."""
        return self.fp8_flops if dtype == "fp8" else self.bfloat16_flops


# NVIDIA's data sheets of the H100 and H200 Tensor Core GPU, SXM. They give FLOP/s with sparsity, which are
# twice the dense ones, and NVLink's 900 GB/s for both directions together. The network is one 400 Gb/s
# InfiniBand port a GPU, as in a DGX H100 or H200.
GPUS = {
    "h100": Gpu(
        name="H100",
        memory_bytes=80e9,
        memory_bandwidth=3.35e12,
        bfloat16_flops=989.5e12,
        fp8_flops=1979e12,
        nvlink_bandwidth=450e9,
        network_bandwidth=50e9,
    ),
    "h200": Gpu(
        name="H200",
        memory_bytes=141e9,
        memory_bandwidth=4.8e12,
        bfloat16_flops=989.5e12,
        fp8_flops=1979e12,
        nvlink_bandwidth=450e9,
        network_bandwidth=50e9,
    ),
}


def named(name: str) -> Gpu:
    """The GPU of a name such as "h100". Raises UserError that lists the names."""
    if name.lower() not in GPUS:
        raise UserError(f"gpu: {name!r} is not known; choose one of {', '.join(GPUS)}")
    return GPUS[name.lower()]
