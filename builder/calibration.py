"""Largest magnitudes of activations over calibration text, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from builder.checkpoint import Checkpoint
from builder.decoder import (
    Block,
    Context,
    FeedForward,
    SelfAttention,
    load_block,
    rope_frequencies,
    to_tensor,
)
from builder.errors import UserError
from builder.evaluation import token_windows
from builder.quantization import INPUTS, KV
from builder.text import read_ids
from builder.writer import Progress


def read_windows(model: Path, files: list[Path], samples: int, length: int) -> Tensor:
    """`samples` windows of `length` tokens from text files, [samples, length].

    Raises UserError where a file cannot be read or the text is too short for them all.
    """
    ids = read_ids(model, files)
    windows = token_windows(ids, length - 1, samples)
    if len(windows) < samples:
        raise UserError(
            f"calib: {len(ids):,} tokens make {len(windows)} samples of {length}, {samples} were asked for; "
            f"give more text or --calib-samples {len(windows)}"
        )
    return windows


@torch.no_grad()
def calibrate(
    checkpoint: Checkpoint, windows: Tensor, batch: int = 8, progress: Progress | None = None
) -> dict[str, float]:
    """The largest magnitude of each module's input and of K and V, by "layers.N.MODULE".

    The reference decoder runs `windows` [count, length] in the checkpoint's dtype. Memory is one layer
    and the hidden states of all windows. Raises UserError for tokens outside the vocabulary and for
    activations that are not finite.
    """
    architecture = checkpoint.architecture
    if int(windows.max()) >= architecture.vocab_size:
        raise UserError(f"calib: token {int(windows.max())} is outside vocab_size {architecture.vocab_size}")
    dtype = getattr(torch, checkpoint.dtype)
    hidden = to_tensor(checkpoint.tensors["embedding.weight"])[windows]
    positions = torch.arange(windows.shape[1])[None]
    frequencies = rope_frequencies(architecture.rope, architecture.head_dim)
    context = _RecordingContext(positions, frequencies, dtype, architecture.rope.magnitude)
    largest: dict[str, float] = {}
    tensors = checkpoint.decoder_tensors()
    for index in range(len(architecture.layers)):
        block = load_block(architecture, index, tensors)
        record = context.record = _Recorder(block, f"layers.{index}")
        for part in hidden.split(batch):
            part.copy_(block(part, context))
        largest |= record.largest
        if progress:
            progress(sum(x.num_bytes for x in checkpoint.layer(index).values()))
    for name, value in largest.items():
        if value != value or value == float("inf"):
            raise UserError(f"calib: the input of {name} reaches {value}; the model is not sound")
    return largest


class _Recorder:
    """Keeps the largest magnitudes that pass through a block's modules."""

    def __init__(self, block: Block, prefix: str) -> None:
        self.largest: dict[str, float] = {}
        self.prefix = prefix
        for name in dict.fromkeys(INPUTS.values()):
            half, _, module = name.partition(".")
            owner = getattr(block, half)
            if isinstance(owner, SelfAttention | FeedForward):
                owner.get_submodule(module).register_forward_pre_hook(self._input(name))

    def see(self, name: str, x: Tensor) -> None:
        key = f"{self.prefix}.{name}"
        self.largest[key] = max(float(x.abs().max()), self.largest.get(key, 0.0))

    def _input(self, name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda module, inputs: self.see(name, inputs[0])


class _RecordingContext(Context):
    """Sees K and V as a cache would get them, K after its rotation."""

    record: _Recorder

    def see(self, k: Tensor, v: Tensor) -> None:
        self.record.see(KV, k)
        self.record.see(KV, v)
