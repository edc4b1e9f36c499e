"""Sampling against a reference written on plain lists."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

from engines.embedded.request import Request
from engines.embedded.sampling import Sampler, distribution, sample


def reference(logits: list[float], temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """Token -> probability, by sorting and adding up."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = order[: top_k or len(order)]
    weights = [math.exp((logits[i] - logits[order[0]]) / temperature) for i in order]
    total, kept, reached = sum(weights), {}, 0.0
    for token, weight in zip(order, weights, strict=True):
        if top_p < 1 and reached / total >= top_p:
            break
        kept[token] = weight
        reached += weight
    return {token: weight / reached for token, weight in kept.items()}


def sampler(**values: object) -> Sampler:
    return Sampler(Request(input_ids=(1,), max_tokens=1, **values))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 40, 500])
@pytest.mark.parametrize("top_p", [1e-6, 0.4, 0.9, 1.0])
def test_distribution_is_the_reference(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(top_k)) * 3
    tokens, probabilities = distribution(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    expected = reference(logits.tolist(), temperature, top_k, top_p)
    assert tokens.tolist() == list(expected)
    torch.testing.assert_close(probabilities, torch.tensor(list(expected.values()), dtype=torch.float64))


def test_equal_logits_are_cut_by_token_id() -> None:
    tokens, _ = distribution(torch.tensor([0.0, 1.0, 1.0, 1.0, 0.5]), temperature=1.0, top_k=2)
    assert tokens.tolist() == [1, 2]


@pytest.mark.parametrize("values", [{}, {"temperature": 0.0}, {"temperature": 5.0, "top_k": 1}])
def test_greedy_takes_the_likeliest(values: dict[str, float]) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    assert sample(logits, [sampler(**values), sampler(**values)]) == [1, 0]


def test_a_tiny_temperature_does_not_overflow() -> None:
    assert sampler(temperature=1e-300).draw(torch.tensor([1e3, 2e3, -1e3])) == 1


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 5.0])
    asked = {"temperature": 2.0, "top_k": 4, "top_p": 0.9}
    drawing = sampler(**asked, seed=1)
    count = Counter(drawing.draw(logits) for _ in range(4000))
    expected = reference(logits.tolist(), 2.0, 4, 0.9)
    assert set(count) == set(expected)
    for token, probability in expected.items():
        assert abs(count[token] / 4000 - probability) < 0.03  # about four standard deviations


def test_the_seed_alone_decides() -> None:
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    crowd = [sampler(temperature=1.0, seed=7), sampler(), sampler(temperature=1.0, seed=8)]
    together = [sample(rows, crowd)[0] for _ in range(20)]
    alone = sampler(temperature=1.0, seed=7)
    random.seed(123)  # the process's own generator plays no part
    assert [sample(rows[:1], [alone])[0] for _ in range(20)] == together
    assert len(set(together)) > 5
