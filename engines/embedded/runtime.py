"""One rank of a loaded engine: programs, weights and KV cache, and the passes through them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch._inductor import aoti_load_package

from builder.decoder import rope_frequencies
from engines.embedded import cuda, kernels, target, weights
from engines.embedded.collectives import Communicator
from engines.embedded.graphs import Decoding
from engines.embedded.model import new_cache
from engines.embedded.step import Prefill, Step, num_blocks
from engines.manifest import Manifest, read


class Runtime:
    """Rank `communicator.rank` of the engine. Raises UserError where the engine cannot run here."""

    def __init__(self, engine: Path, communicator: Communicator) -> None:
        self.manifest = read(engine)
        target.check(engine, self.manifest)
        assert communicator.size == self.manifest.tp_size, "the session starts tp_size ranks"
        self._communicator = communicator
        self._device = torch.device("cpu") if self.manifest.device == "cpu" else cuda.device()
        if self.manifest.device == "cuda" and communicator.size > 1:
            cuda.join(communicator.rank, communicator.size, self._device)
        self._weights = _weights(engine, self.manifest, communicator.rank, self._device)
        self._cache = new_cache(
            self.manifest.architecture.shard(communicator.size),
            target.pool_blocks(self.manifest),
            getattr(torch, self.manifest.dtype),
            self._device,
        )
        blocks = num_blocks(self.manifest.max_seq_len)
        self._tables = torch.zeros(self.manifest.max_batch_size, blocks, dtype=torch.int64)
        if self.manifest.device == "cpu":
            kernels.load(engine)
        self._prefill = _Program(engine / "prefill.pt2", self._weights, self._device)
        self._decode = self._decoding(engine)

    def _decoding(self, engine: Path) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Logits of a decode step by its tokens, positions and tables."""
        program = _Program(engine / "decode.pt2", self._weights, self._device)
        if self.manifest.device == "cpu":
            return lambda *inputs: program([*inputs, *self._cache])
        return Decoding(
            (_Program(engine / "decode1.pt2", self._weights, self._device), program),
            self._cache,
            spare=self.manifest.kv_cache_blocks,
            max_batch_size=self.manifest.max_batch_size,
            max_blocks=self._tables.shape[1],
            device=self._device,
            capture=True,
        )

    def run(self, step: Step) -> Tensor | None:
        """Logits [B, vocab_size] in float32 on rank 0, B = 1 for a prefill; None on other ranks."""
        if isinstance(step, Prefill):
            return self.prefill(step.slot, step.blocks, step.tokens)
        return self.decode(step.slots, step.tokens, step.positions)

    def prefill(self, slot: int, blocks: tuple[int, ...], tokens: tuple[int, ...]) -> Tensor | None:
        """Put a prompt into `blocks`, which `slot` then has; the logits that follow it, [1, vocab_size]."""
        self._tables[slot, : len(blocks)] = torch.tensor(blocks)
        inputs = (torch.tensor(tokens).to(self._device), self._tables[slot].to(self._device))
        return self._logits(self._prefill([*inputs, *self._cache]))

    def decode(
        self, slots: tuple[int, ...], tokens: tuple[int, ...], positions: tuple[int, ...]
    ) -> Tensor | None:
        """One more token for each slot; the logits that follow, [B, vocab_size]."""
        columns = torch.tensor((tokens, positions, slots))  # [3, B]
        return self._logits(self._decode(columns[0], columns[1], self._tables[columns[2]]))

    def _logits(self, local: Tensor) -> Tensor | None:
        logits = self._communicator.gather(local.cpu())
        return None if logits is None else logits[:, : self.manifest.architecture.vocab_size]


class _Program:
    """A compiled program called with its flat inputs, without the tree handling of torch's own caller."""

    def __init__(self, package: Path, tensors: dict[str, Tensor], device: torch.device) -> None:
        # Without its threads' bookkeeping, which a CUDA graph could not record.
        with _unpacked_out_of_sight():
            model = aoti_load_package(
                str(package),
                run_single_threaded=True,
                device_index=-1 if device.index is None else device.index,
            )
        constants = {name: tensors[name] for name in model.get_constant_fqns()}
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


def _weights(engine: Path, manifest: Manifest, rank: int, device: torch.device) -> dict[str, Tensor]:
    """A rank's tensors on the device; on the CPU they stay in the mapped file."""
    architecture = manifest.architecture
    tensors = weights.mapped(engine / f"rank{rank}.safetensors", manifest)
    tensors["rope_frequencies"] = rope_frequencies(architecture.rope, architecture.head_dim)
    return {name: x.to(device) for name, x in tensors.items()}
