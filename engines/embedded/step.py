"""One pass through the model, as rank 0 tells it to the other ranks: a flat int64 array."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

BLOCK_SIZE = 64  # tokens of a block of the KV cache

_PREFILL, _DECODE = 0, 1


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """A whole prompt into a slot, whose positions from now on are in `blocks`, `BLOCK_SIZE` in each."""

    slot: int
    blocks: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Decode:
    """The latest token of every running request, its slot and its position."""

    slots: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: tuple[int, ...]


Step = Prefill | Decode


def num_blocks(num_tokens: int) -> int:
    """Blocks of the KV cache that so many tokens need."""
    return -(-num_tokens // BLOCK_SIZE)


def encode(step: Step | None) -> array[int]:
    """None, the end of work, is an array of one number."""
    if step is None:
        return array("q", (-1,))
    if isinstance(step, Prefill):
        return array("q", (_PREFILL, step.slot, len(step.blocks), *step.blocks, *step.tokens))
    return array("q", (_DECODE, len(step.slots), *step.slots, *step.positions, *step.tokens))


def decode(message: array[int]) -> Step | None:
    """The inverse of `encode`."""
    if message[0] < 0:
        return None
    if message[0] == _PREFILL:
        end = 3 + message[2]
        return Prefill(slot=message[1], blocks=tuple(message[3:end]), tokens=tuple(message[end:]))
    count = message[1]
    slots, positions, tokens = (tuple(message[2 + i * count : 2 + (i + 1) * count]) for i in range(3))
    return Decode(slots=slots, positions=positions, tokens=tokens)


def max_message_size(max_batch_size: int, max_input_len: int, max_seq_len: int) -> int:
    """The most numbers `encode` makes."""
    return max(2 + 3 * max_batch_size, 3 + num_blocks(max_seq_len) + max_input_len)
