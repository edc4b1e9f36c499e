"""Decode steps in buckets, each replayed as one CUDA graph.

A step of B requests, the longest of which has W blocks, runs as the smallest bucket that holds it: so many
rows, so many columns of the block table. A bucket's graph is captured when it is first needed. The rows
that fill it up have their only token in the pool's spare block, where nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engines.embedded.step import num_blocks

Program = Callable[[list[Tensor]], Tensor]  # inputs of a decode step to logits [B, rows of lm_head]
_EVEN = 2  # int64 numbers of 16 bytes, to which Triton's kernels want every input aligned


def bucket(count: int, most: int) -> int:
    """The smallest power of two that is not below `count`; at most `most`."""
    assert 1 <= count <= most, "the limits are checked before a step"
    return min(1 << (count - 1).bit_length(), most)


class Decoding:
    """Decode steps over a pool whose last block is the spare one.

    `programs` are those for one row and for any number of rows; each is called with tokens and positions [B],
    tables [B, W] and the pool. `capture` is for CUDA alone: elsewhere each step calls the program.
    """

    def __init__(
        self,
        programs: tuple[Program, Program],
        pool: Sequence[Tensor],
        *,
        spare: int,
        max_batch_size: int,
        max_blocks: int,
        device: torch.device,
        capture: bool,
    ) -> None:
        self._programs, self._pool, self._spare = programs, pool, spare
        self._most, self._device, self._capture = (max_batch_size, max_blocks), device, capture
        self._buckets: dict[tuple[int, int], _Bucket] = {}
        self._memory = torch.cuda.graph_pool_handle() if capture else None

    def __call__(self, tokens: Tensor, positions: Tensor, tables: Tensor) -> Tensor:
        """Logits [B, rows of lm_head] on the device, valid until the next call. Inputs are the host's."""
        wanted = (tokens.shape[0], num_blocks(int(positions.max()) + 1))
        rows, width = (bucket(count, most) for count, most in zip(wanted, self._most, strict=True))
        if (rows, width) not in self._buckets:
            self._buckets[rows, width] = self._new(rows, width)
        return self._buckets[rows, width](tokens, positions, tables)

    def _new(self, rows: int, width: int) -> _Bucket:
        new = _Bucket(rows, width, self._spare, self._device, self._programs[rows > 1], self._pool)
        if self._capture:
            new.capture(self._memory)
        return new


class _Bucket:
    """Inputs that stay in one place, and what runs on them."""

    def __init__(
        self,
        rows: int,
        width: int,
        spare: int,
        device: torch.device,
        program: Program,
        pool: Sequence[Tensor],
    ) -> None:
        self._program, self._pool, self._spare = program, pool, spare
        even = -(-rows // _EVEN) * _EVEN
        numbers = torch.zeros(2 * even + rows * width, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._host, self._there = numbers, numbers.to(device, copy=True)
        self._tokens, self._positions, self._tables = _parts(self._host, rows, even)
        self._inputs = _parts(self._there, rows, even)
        self._tables.fill_(spare)
        self._there.copy_(self._host)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def __call__(self, tokens: Tensor, positions: Tensor, tables: Tensor) -> Tensor:
        count, width = tokens.shape[0], self._tables.shape[1]
        self._tokens[:count], self._positions[:count] = tokens, positions
        self._positions[count:] = 0
        self._tables[:count], self._tables[count:] = tables[:, :width], self._spare
        self._there.copy_(self._host, non_blocking=True)
        return self._run()[:count]

    def capture(self, memory: Any) -> None:
        """Record the program, whose inputs are now such as harm nothing."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what the first calls allocate and load must not be recorded
            for _ in range(2):
                self._call()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # NCCL's own thread may call CUDA meanwhile, which the default mode forbids to all threads.
        with torch.cuda.graph(self._graph, pool=memory, capture_error_mode="thread_local"):
            self._logits = self._call()

    def _run(self) -> Tensor:
        if self._graph is None:
            return self._call()
        self._graph.replay()
        assert self._logits is not None, "captured with the graph"
        return self._logits

    def _call(self) -> Tensor:
        return self._program([*self._inputs, *self._pool])


def _parts(numbers: Tensor, rows: int, even: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and positions [rows], tables [rows, W]; each begins at a multiple of 16 bytes."""
    tables = numbers[2 * even :].view(rows, -1)
    return numbers[:rows], numbers[even : even + rows], tables
