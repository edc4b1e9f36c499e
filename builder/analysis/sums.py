"""Sums over tokens, which add up over batches and processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Key = tuple[str | int, ...]


class Sums:
    """Named arrays in float64. Over all tokens of all batches they make means."""

    def __init__(self) -> None:
        self.arrays: dict[Key, np.ndarray] = {}

    def add(self, key: Key, value: Tensor | np.ndarray | float) -> None:
        """Add an array of the key's one shape."""
        array = value.double().numpy() if isinstance(value, Tensor) else np.asarray(value, np.float64)
        self.arrays[key] = self.arrays[key] + array if key in self.arrays else array

    def mean(self, key: Key, count: float) -> float:
        """A scalar sum over `count`; 0 for a key that was never added."""
        return float(self.arrays.get(key, np.zeros(()))) / count

    def count(self, key: Key) -> int:
        """A sum of whole numbers."""
        return round(self.mean(key, 1))

    @classmethod
    def of(cls, parts: Iterable[Sums]) -> Sums:
        """All parts added up."""
        total = cls()
        for part in parts:
            for key, array in part.arrays.items():
                total.add(key, array)
        return total


class Direction(NamedTuple):
    """Vectors of the last dimension at length 1, in float32; zero vectors stay zero."""

    unit: Tensor
    zero: Tensor  # which are zero, without the last dimension

    @classmethod
    def of(cls, x: Tensor) -> Direction:
        """The directions of x."""
        wide = x.float()
        norm = wide.norm(dim=-1, keepdim=True)
        return cls(wide / norm.clamp_min(torch.finfo(torch.float32).tiny), norm[..., 0] == 0)

    def distance(self, other: Direction) -> Tensor:
        """1 - cos: 0 for two zero vectors, 1 for one.

        |a - b|^2 / 2 has the digits of small distances, which 1 - a.b has not. It is 1/2 where one of them
        is zero, so there it is doubled.
        """
        distance = (self.unit - other.unit).square_().sum(-1) / 2
        return torch.where(self.zero ^ other.zero, 2 * distance, distance)


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """`Direction.distance` of the last dimension's vectors."""
    return Direction.of(a).distance(Direction.of(b))
