"""Variables and rows of a linear program, collected one by one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

Term = tuple[int, float]  # variable, coefficient


class Counter:
    """Numbers the variables: each call is the next one."""

    def __init__(self) -> None:
        self.value = 0

    def __call__(self) -> int:
        self.value += 1
        return self.value - 1


class Rows:
    """lower <= sum of terms <= upper, row by row."""

    def __init__(self) -> None:
        self.terms: list[list[Term]] = []
        self.lower: list[float] = []
        self.upper: list[float] = []

    def add(self, terms: Iterable[Term], lower: float = -np.inf, upper: float = np.inf) -> None:
        self.terms.append(list(terms))
        self.lower.append(lower)
        self.upper.append(upper)

    def copy(self) -> Rows:
        other = Rows()
        other.terms, other.lower, other.upper = [*self.terms], [*self.lower], [*self.upper]
        return other

    def matrix(self, num_variables: int) -> tuple[Any, np.ndarray, np.ndarray]:
        """A sparse [rows, num_variables] with its bounds; a variable named twice in a row counts twice."""
        from scipy.sparse import csr_matrix

        entries = [(r, i, c) for r, terms in enumerate(self.terms) for i, c in terms]
        row, column, value = zip(*entries, strict=True)
        shape = (len(self.terms), num_variables)
        return csr_matrix((value, (row, column)), shape=shape), np.array(self.lower), np.array(self.upper)


def minus(terms: Iterable[Term]) -> list[Term]:
    """The terms with their signs turned: on the other side of a row."""
    return [(i, -c) for i, c in terms]
