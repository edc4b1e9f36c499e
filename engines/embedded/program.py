"""One rank's decoder, exported and compiled by AOTInductor: `python -m engines.embedded.program ENGINE KIND`.

KIND is `decode` (any batch, one token each) or `prefill` (one prompt of any length). The weights stay
outside, so all ranks share a program; the KV cache is an input that the program changes in place.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram, export

from builder.decoder import Decoder, alone, rope_frequencies
from engines.embedded import collectives  # noqa: F401  defines the all-reduce
from engines.manifest import Manifest, read

_OPTIONS = {"aot_inductor.package_constants_in_so": False}


def empty_decoder(manifest: Manifest) -> Decoder:
    """A rank's decoder in the engine's dtype; its weights take no memory until they are written."""
    local = manifest.architecture.shard(manifest.tp_size)
    all_reduce = torch.ops.ffn_fusion.all_reduce if manifest.tp_size > 1 else alone
    with torch.device("meta"):
        decoder = Decoder(local, all_reduce=all_reduce)
    dtype = getattr(torch, manifest.dtype)
    weights = {name: torch.empty(x.shape, dtype=dtype) for name, x in decoder.state_dict().items()}
    decoder.load_state_dict(weights, assign=True)
    # Inductor writes constants of up to 8 numbers into the code, so these must be the real ones.
    decoder.rope_frequencies = rope_frequencies(local.rope, local.head_dim)
    return decoder.eval().requires_grad_(False)


def exported(manifest: Manifest, kind: str) -> ExportedProgram:
    """The graph of `kind`; inputs (tokens, positions, cache, slots, span), output the last logits."""
    decoder = empty_decoder(manifest)
    cache = decoder.new_cache(manifest.max_batch_size, manifest.max_seq_len)
    # Dimensions of 2 and more at export; the range then includes 1.
    batch: Any = Dim("batch", min=1, max=max(2, manifest.max_batch_size)) if kind == "decode" else None
    length: Any = Dim("length", min=1, max=max(2, manifest.max_input_len)) if kind == "prefill" else None
    b, t = (2, 1) if kind == "decode" else (1, 2)
    tokens = torch.zeros(b, t, dtype=torch.int64)
    slots, span = torch.zeros(b, dtype=torch.int64), torch.arange(3)
    dims = {0: batch} if kind == "decode" else {1: length}
    shapes: tuple[Any, ...] = (
        dims,
        dims,
        [{}] * len(cache),
        {0: batch} if kind == "decode" else {},
        {0: Dim("span", min=2, max=manifest.max_seq_len)},
        None,
    )
    arguments = (tokens, tokens.clone(), cache, slots, span, True)
    return export(decoder, arguments, dynamic_shapes=shapes, strict=False)


def compile_program(engine: Path, kind: str) -> None:
    """Write ENGINE/KIND.pt2 from ENGINE/config.json."""
    program = exported(read(engine), kind)
    path = str(engine / f"{kind}.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=_OPTIONS)


if __name__ == "__main__":
    compile_program(Path(sys.argv[1]), sys.argv[2])
