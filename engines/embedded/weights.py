"""A rank's weights: what an engine stores of a checkpoint, and how a running rank has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from builder import rows
from builder.checkpoint import Checkpoint, tensor_shapes
from builder.errors import UserError
from builder.tensorfile import read_header
from builder.tensors import FP8, INT8, Declared, Expression
from engines.manifest import Manifest

SMALL = {"int8": INT8, "fp8": FP8}  # a quant's 8-bit dtype


def stored(rank: Checkpoint, manifest: Manifest) -> dict[str, Expression]:
    """A rank's tensors in the engine's precision."""
    tensors = rank.cast(manifest.dtype).decoder_tensors()
    return rows.quantize(tensors, SMALL[manifest.quant]) if manifest.quant else tensors


def mapped(file: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The tensors of a rank file, mapped and not read, so that sessions share their pages.

    Raises UserError where they are not the ones that the manifest asks for: programs check no shapes.
    """
    sources = read_header(file)
    found = {name: (x.dtype, x.shape) for name, x in sources.items()}
    expected = {name: (x.dtype, x.shape) for name, x in stored(_declared(manifest), manifest).items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise UserError(f"{file}: tensor {name!r} is not the engine's; build the engine again")
    data = torch.from_numpy(np.memmap(file, mode="c"))
    return {
        name: data[x.offset : x.offset + x.num_bytes].view(getattr(torch, x.dtype)).view(x.shape)
        for name, x in sources.items()
    }


def _declared(manifest: Manifest) -> Checkpoint:
    """A rank's share of the engine's checkpoint, without numbers."""
    local, dtype = manifest.architecture.shard(manifest.tp_size), manifest.dtype
    tensors = {name: Declared(name, shape, dtype) for name, shape in tensor_shapes(local).items()}
    return Checkpoint(architecture=local, tensors=tensors, dtype=dtype, digest=manifest.checkpoint_digest)
