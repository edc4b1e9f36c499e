"""One rank of a loaded engine: programs, weights and KV cache, and the passes through them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch._inductor import aoti_load_package

from builder.decoder import rope_frequencies
from builder.tensorfile import read_header
from engines.embedded import target
from engines.embedded.collectives import Communicator
from engines.embedded.step import Prefill, Step
from engines.manifest import Manifest, read

_SPAN = 64  # attention looks at a multiple of this many cache positions


class Runtime:
    """Rank `communicator.rank` of the engine. Raises UserError where the engine cannot run here."""

    def __init__(self, engine: Path, communicator: Communicator) -> None:
        self.manifest = read(engine)
        target.check(engine, self.manifest)
        assert communicator.size == self.manifest.tp_size, "the session starts tp_size ranks"
        self._communicator = communicator
        self._weights = _map_weights(engine / f"rank{communicator.rank}.safetensors")
        architecture = self.manifest.architecture
        self._weights["rope_frequencies"] = rope_frequencies(architecture.rope, architecture.head_dim)
        self._cache = _new_cache(self.manifest)
        self._prefill = _Program(engine / "prefill.pt2", self._weights)
        self._decode = _Program(engine / "decode.pt2", self._weights)

    def run(self, step: Step) -> Tensor | None:
        """Logits [B, vocab_size] in float32 on rank 0, B = 1 for a prefill; None on other ranks."""
        if isinstance(step, Prefill):
            return self.prefill(step.slot, step.tokens)
        return self.decode(step.slots, step.tokens, step.positions)

    def prefill(self, slot: int, tokens: tuple[int, ...]) -> Tensor | None:
        """Put a prompt into an empty slot; the logits that follow it, [1, vocab_size]."""
        positions = torch.arange(len(tokens))[None]
        slots = torch.tensor((slot,))
        return self._logits(self._prefill, torch.tensor((tokens,)), positions, slots, len(tokens))

    def decode(
        self, slots: tuple[int, ...], tokens: tuple[int, ...], positions: tuple[int, ...]
    ) -> Tensor | None:
        """One more token for each slot; the logits that follow, [B, vocab_size]."""
        columns = torch.tensor((tokens, positions, slots))  # [3, B]
        token, position = columns[0][:, None], columns[1][:, None]
        return self._logits(self._decode, token, position, columns[2], max(positions) + 1)

    def _logits(
        self, program: _Program, tokens: Tensor, positions: Tensor, slots: Tensor, length: int
    ) -> Tensor | None:
        span = torch.arange(min(-(-length // _SPAN) * _SPAN, self.manifest.max_seq_len))
        local = program([tokens, positions, *self._cache, slots, span]).float()
        logits = self._communicator.gather(local)
        return None if logits is None else logits[:, : self.manifest.architecture.vocab_size]


class _Program:
    """A compiled program called with its flat inputs, without the tree handling of torch's own caller."""

    def __init__(self, package: Path, weights: dict[str, Tensor]) -> None:
        with _unpacked_out_of_sight():
            model = aoti_load_package(str(package), run_single_threaded=True)
        constants = {name: weights[name] for name in model.get_constant_fqns()}
        model.load_constants(constants, check_full_update=True, user_managed=True)  # no copy: kept by Runtime
        self._loader = model.loader

    def __call__(self, inputs: list[Tensor]) -> Tensor:
        return self._loader.boxed_run(inputs)[0]


@contextmanager
def _unpacked_out_of_sight() -> Iterator[None]:
    """torch unpacks a program into $TMPDIR; once it is mapped the files go, so a killed rank leaves none."""
    before = os.environ.get("TMPDIR")
    scratch = tempfile.mkdtemp(prefix="ffn-fusion-")
    os.environ["TMPDIR"] = scratch
    try:
        yield
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before
        shutil.rmtree(scratch)


def _map_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a rank file, mapped and not read, so that sessions share their pages."""
    sources = read_header(file)
    data = torch.from_numpy(np.memmap(file, mode="c"))
    return {
        name: data[x.offset : x.offset + x.num_bytes].view(getattr(torch, x.dtype)).view(x.shape)
        for name, x in sources.items()
    }


def _new_cache(manifest: Manifest) -> list[Tensor]:
    """What builder.decoder.Decoder.new_cache makes, for this rank's heads."""
    local = manifest.architecture.shard(manifest.tp_size)
    return [
        torch.zeros(
            manifest.max_batch_size,
            manifest.max_seq_len + 1,
            layer.num_key_value_heads,
            local.head_dim,
            dtype=getattr(torch, manifest.dtype),
        )
        for layer in local.layers
        if layer.num_key_value_heads
        for _ in "kv"
    ]
