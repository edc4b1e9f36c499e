"""One rank's program, exported and compiled by AOTInductor: `python -m engines.embedded.program ENGINE KIND`.

KIND is `decode` (a token each of any batch) or `prefill` (one prompt of any length). The weights stay
outside, so all ranks share a program; the KV cache is an input that the program changes in place.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram, export

from builder.decoder import alone, rope_frequencies
from engines.embedded import collectives, kernels  # noqa: F401  collectives defines the all-reduce
from engines.embedded.model import PROGRAMS, SMALL_BATCH, EngineDecoder, Numbers, new_cache
from engines.embedded.step import num_blocks
from engines.manifest import Manifest, read

Shapes = tuple[Any, ...]


def empty_decoder(manifest: Manifest, kind: str) -> EngineDecoder:
    """A rank's decoder; its weights take no memory until they are written."""
    local = manifest.architecture.shard(manifest.tp_size)
    all_reduce = torch.ops.ffn_fusion.all_reduce if manifest.tp_size > 1 else alone
    numbers = Numbers(
        dtype=getattr(torch, manifest.dtype),
        quant=manifest.quant,
        tiles=kind == "prefill" or manifest.max_batch_size > SMALL_BATCH,
    )
    with torch.device("meta"):
        decoder = PROGRAMS[kind](local, numbers, all_reduce)
    decoder.to_empty(device="cpu")
    # Inductor writes constants of up to 8 numbers into the code, so these must be the real ones.
    decoder.rope_frequencies = rope_frequencies(local.rope, local.head_dim)
    return decoder


def exported(manifest: Manifest, kind: str) -> ExportedProgram:
    """The graph of `kind`; its output are the last logits."""
    decoder = empty_decoder(manifest, kind)
    arguments, shapes = (_decode_inputs if kind == "decode" else _prefill_inputs)(manifest)
    return export(decoder, arguments, dynamic_shapes=shapes, strict=False)


def _decode_inputs(manifest: Manifest) -> tuple[Shapes, Shapes]:
    # Dimensions of 2 and more at export; the range then includes 1.
    batch = Dim("batch", min=1, max=max(2, manifest.max_batch_size))
    cache = _cache(manifest)
    numbers = torch.zeros(2, dtype=torch.int64)
    tables = torch.zeros(2, num_blocks(manifest.max_seq_len), dtype=torch.int64)
    return (numbers, numbers.clone(), tables, cache), ({0: batch}, {0: batch}, {0: batch}, [{}] * len(cache))


def _prefill_inputs(manifest: Manifest) -> tuple[Shapes, Shapes]:
    length = Dim("length", min=1, max=max(2, manifest.max_input_len))
    cache = _cache(manifest)
    table = torch.zeros(num_blocks(manifest.max_seq_len), dtype=torch.int64)
    return (torch.zeros(2, dtype=torch.int64), table, cache), ({0: length}, {}, [{}] * len(cache))


def _cache(manifest: Manifest) -> list[torch.Tensor]:
    local = manifest.architecture.shard(manifest.tp_size)
    return new_cache(local, manifest.kv_cache_blocks, getattr(torch, manifest.dtype))


def compile_program(engine: Path, kind: str) -> None:
    """Write ENGINE/KIND.pt2 from ENGINE/config.json."""
    program = exported(read(engine), kind)
    options = {
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.custom_ops_to_c_shims": kernels.c_shims(),
        "cpp.dynamic_threads": True,  # a rank's threads are known when it runs
    }
    path = str(engine / f"{kind}.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)


if __name__ == "__main__":
    compile_program(Path(sys.argv[1]), sys.argv[2])
