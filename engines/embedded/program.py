"""One rank's program, exported and compiled by AOTInductor: `python -m engines.embedded.program ENGINE KIND`.

KIND is `decode` (a token each of any batch), `prefill` (one prompt of any length), or on CUDA `decode1`
(a token of one request). The weights stay outside, so all ranks share a program; the KV cache is an input
that the program changes in place.

On CUDA, products are cuBLAS's, which chooses its kernel by the batch at hand; `max_autotune` would choose one
for the two rows of the export. Only decode1 knows its batch, 1, for which Inductor tunes its own sums
(`coordinate_descent_tuning`). Weights and pool have no memory of the GPU while a program compiles.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from builder.decoder import alone, rope_frequencies
from engines.embedded import collectives, kernels  # noqa: F401  collectives defines the all-reduce
from engines.embedded.model import PROGRAMS, SMALL_BATCH, EngineDecoder, Numbers, new_cache
from engines.embedded.operators import CPUKernels, Operators
from engines.embedded.plain import Plain
from engines.embedded.step import num_blocks
from engines.embedded.target import pool_blocks
from engines.manifest import Manifest, read

Shapes = tuple[Any, ...]
_PLACE = 512  # bytes, CUDA's smallest allocation


def operators(manifest: Manifest, kind: str) -> Operators:
    """What computes in a program."""
    if manifest.device == "cuda":
        return Plain(vector=kind == "decode1")
    return CPUKernels(tiles=kind == "prefill" or manifest.max_batch_size > SMALL_BATCH)


def decoder(manifest: Manifest, kind: str) -> EngineDecoder:
    """A rank's decoder on the device of the surrounding `torch.device`."""
    local = manifest.architecture.shard(manifest.tp_size)
    all_reduce = torch.ops.ffn_fusion.all_reduce if manifest.tp_size > 1 else alone
    numbers = Numbers(
        dtype=getattr(torch, manifest.dtype), quant=manifest.quant, operators=operators(manifest, kind)
    )
    return PROGRAMS[kind](local, numbers, all_reduce)


def empty_decoder(manifest: Manifest, kind: str, device: str) -> EngineDecoder:
    """A rank's decoder to be compiled: it has all but its weights' memory."""
    with torch.device("meta"):
        empty = decoder(manifest, kind)
    for module in empty.modules():
        for name, x in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(_hollow(x, manifest, device), requires_grad=False))
    # Inductor writes constants of up to 8 numbers into the code, so these must be the real ones.
    architecture = manifest.architecture
    empty.rope_frequencies = rope_frequencies(architecture.rope, architecture.head_dim).to(device)
    return empty


def _hollow(x: Tensor, manifest: Manifest, device: str) -> Tensor:
    """A tensor like x on `device` whose memory was given back, but for a place of its own.

    Inductor takes constants at one place for one constant. Host memory that is never written costs nothing.
    """
    empty = torch.empty_like(x, device=device, requires_grad=False)
    if manifest.device == "cuda":
        empty.untyped_storage().resize_(_PLACE)
    return empty


def exported(manifest: Manifest, kind: str, device: str | None = None) -> ExportedProgram:
    """The graph of `kind` for `device`, the manifest's unless given; its output are the last logits."""
    device = device or manifest.device
    inputs, shapes = (_prefill_inputs if kind == "prefill" else _decode_inputs)(manifest, kind)
    local = manifest.architecture.shard(manifest.tp_size)
    with torch.device("meta"):
        pool = new_cache(local, pool_blocks(manifest), getattr(torch, manifest.dtype))
    return export(
        empty_decoder(manifest, kind, device),
        (*(x.to(device) for x in inputs), [_hollow(x, manifest, device) for x in pool]),
        dynamic_shapes=(*shapes, [{}] * len(pool)),
        strict=False,
    )


def _decode_inputs(manifest: Manifest, kind: str) -> tuple[tuple[Tensor, ...], Shapes]:
    """Tokens, positions and tables, and which of their dimensions are free."""
    # Dimensions of 2 and more at export; the range then includes 1.
    rows, width = 2, num_blocks(manifest.max_seq_len)
    batch: dict[int, Any] = {0: Dim("batch", min=1, max=max(2, manifest.max_batch_size))}
    table = dict(batch)
    if kind == "decode1":
        rows, batch, table = 1, {}, {}
    if manifest.device == "cuda":  # reads the columns of the table that it is given
        table[1] = Dim("width", min=1, max=max(2, width))
        width = 2
    numbers = torch.zeros(rows, dtype=torch.int64)
    tables = torch.zeros(rows, width, dtype=torch.int64)
    return (numbers, numbers.clone(), tables), (batch, batch, table)


def _prefill_inputs(manifest: Manifest, kind: str) -> tuple[tuple[Tensor, ...], Shapes]:
    """Tokens and table, and which of their dimensions are free."""
    length = Dim("length", min=1, max=max(2, manifest.max_input_len))
    table = torch.zeros(num_blocks(manifest.max_seq_len), dtype=torch.int64)
    return (torch.zeros(2, dtype=torch.int64), table), ({0: length}, {})


def options(manifest: Manifest, kind: str) -> dict[str, Any]:
    """Inductor's; see the head of this file."""
    common: dict[str, Any] = {"aot_inductor.package_constants_in_so": False}
    if manifest.device == "cuda":
        return {
            **common,
            "coordinate_descent_tuning": kind == "decode1",
            "triton.autotune_at_compile_time": True,  # on numbers of its own, not on the hollow weights
        }
    return {
        **common,
        "aot_inductor.custom_ops_to_c_shims": kernels.c_shims(),
        "cpp.dynamic_threads": True,  # a rank's threads are known when it runs
    }


def compile_program(engine: Path, kind: str) -> None:
    """Write ENGINE/KIND.pt2 from ENGINE/config.json."""
    manifest = read(engine)
    torch._inductor.aoti_compile_and_package(
        exported(manifest, kind),
        package_path=str(engine / f"{kind}.pt2"),
        inductor_configs=options(manifest, kind),
    )


if __name__ == "__main__":
    compile_program(Path(sys.argv[1]), sys.argv[2])
