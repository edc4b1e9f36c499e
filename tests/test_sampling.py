"""Sampling against transformers' logits processors, and against a reference written on plain lists."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from engines.embedded.request import Request
from engines.embedded.sampling import Sampler, distribution, log_prob, pick, sample

VOCAB = 50


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


def request(**values: Any) -> Request:
    return Request(**{"input_ids": (1,), "max_tokens": 100, **values})


def sampler(**values: Any) -> Sampler:
    return Sampler(request(**values))


def random_logits(seed: int, *shape: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def probabilities(row: torch.Tensor, **cuts: Any) -> torch.Tensor:
    """Of every token, by `distribution`."""
    tokens, weights = distribution(row.numpy(), **cuts)
    out = np.zeros(len(row))
    out[slice(None) if tokens is None else tokens] = weights / weights.sum(dtype=np.float64)
    return torch.from_numpy(out)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 40, 500])
@pytest.mark.parametrize("top_p", [1e-6, 0.4, 0.9, 1.0])
def test_distribution_is_the_reference(temperature: float, top_k: int, top_p: float) -> None:
    row = random_logits(top_k, VOCAB)
    got = probabilities(row, temperature=temperature, top_k=top_k, top_p=top_p)
    expected = reference(row.tolist(), temperature, top_k, top_p)
    assert set(got.nonzero()[:, 0].tolist()) == set(expected)
    for token, value in expected.items():
        assert got[token] == pytest.approx(value, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.sampled_from([30_000, 32_003, 2500]),
    scale=st.sampled_from([0.1, 1.0, 3.0, 8.0]),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 40, 511, 513, 2400]),
    top_p=st.sampled_from([0.05, 0.5, 0.95, 0.9999, 1.0]),
)
def test_large_vocabularies_are_cut_as_transformers_does(
    seed: int, vocab: int, scale: float, temperature: float, top_k: int, top_p: float
) -> None:
    """Of 2,500 to 32,003 tokens, peaked and flat: other paths than a small row takes."""
    row = random_logits(seed, vocab, scale=scale)
    got = probabilities(row, temperature=temperature, top_k=top_k, top_p=top_p)
    scores = hf.TemperatureLogitsWarper(temperature)(None, row[None].double())
    if top_k:
        scores = hf.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = hf.TopPLogitsWarper(top_p)(None, scores)
    expected = scores.softmax(-1)[0]
    different = (got > 1e-30) != (expected > 1e-30)  # float32 ends at 1e-45
    assert different.sum() <= 1 + 2e-5 * vocab  # at the very edge float32 may round to the other side
    assert expected[different].sum() + got[different].sum() < 1e-4
    torch.testing.assert_close(got[~different], expected[~different], rtol=2e-4, atol=1e-9)


def test_equal_logits_are_cut_by_token_id() -> None:
    row = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.5])
    assert probabilities(row, temperature=1.0, top_k=2).nonzero()[:, 0].tolist() == [1, 2]
    assert probabilities(torch.zeros(4), temperature=1.0, top_p=0.6).nonzero()[:, 0].tolist() == [0, 1, 2]
    row = torch.zeros(5000)
    row[1000:] = 1.0
    assert probabilities(row, temperature=1.0, top_k=300).nonzero()[:, 0].tolist() == list(range(1000, 1300))
    kept = probabilities(row, temperature=1.0, top_p=0.3).nonzero()[:, 0].tolist()
    assert kept == list(range(1000, 1000 + len(kept)))
    assert len(kept) == math.ceil(0.3 * (4000 + 1000 / math.e))


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-30, 0.5, 1.0, 3.0]), min_size=1, max_size=700),
    share=st.floats(0, 1, exclude_max=True),
)
@example(weights=[1.0] * 3 + [0.0] * 300, share=math.nextafter(1, 0))
@example(weights=[1.0] + [2e-17] * 100 + [0.0] * 20, share=math.nextafter(1, 0))  # sums differ by their order
@example(weights=[0.0, 0.0, 3.0], share=0.0)
@example(weights=[0.5] * 600, share=0.7)
@example(weights=[1.0] * 128 + [0.0, 1.0], share=128 / 129)
def test_pick_finds_the_share(weights: list[float], share: float) -> None:
    if not sum(weights):
        weights[-1] = 1.0
    index = pick(np.array(weights, np.float32), share)
    assert weights[index] > 0
    total = math.fsum(weights)
    assert math.fsum(weights[:index]) <= share * total * (1 + 1e-12) + 1e-12
    assert math.fsum(weights[: index + 1]) >= share * total * (1 - 1e-12)


@pytest.mark.parametrize("values", [{}, {"temperature": 0.0}, {"temperature": 5.0, "top_k": 1}])
def test_greedy_takes_the_likeliest(values: dict[str, float]) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    assert sample(logits, [sampler(**values), sampler(**values)]) == ([1, 0], [None, None])


def test_rows_may_be_part_of_wider_ones() -> None:
    """Padded logits cut to the vocabulary are not contiguous."""
    padded = random_logits(0, 4, 400)
    padded[:, 320:] = 99.0
    crowd = [sampler(), sampler(temperature=1.0), sampler(temperature=1.0, top_k=9), sampler(top_p=0.5)]
    tokens, _ = sample(padded[:, :320], crowd)
    assert max(tokens) < 320
    assert tokens[0] == int(padded[0, :320].argmax())


def test_a_tiny_temperature_does_not_overflow() -> None:
    assert sampler(temperature=1e-300).next(np.array([1e3, 2e3, -1e3], np.float32))[0] == 1


@pytest.mark.parametrize(
    "asked",
    [{"temperature": 2.0, "top_k": 4, "top_p": 0.9}, {"temperature": 3.0}, {"top_p": 0.97}, {"top_k": 3}],
)
def test_draws_follow_the_distribution(asked: dict[str, float]) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 5.0])
    drawing = sampler(**asked, seed=1)
    count = Counter(drawing.next(logits.numpy())[0] for _ in range(4000))
    expected = reference(
        logits.tolist(), asked.get("temperature", 1), int(asked.get("top_k", 0)), asked.get("top_p", 1)
    )
    assert set(count) == set(expected)
    for token, probability in expected.items():
        assert abs(count[token] / 4000 - probability) < 0.03  # about four standard deviations


CROWD: list[dict[str, Any]] = [
    {"temperature": 1.0, "seed": 7},
    {},
    {"temperature": 1.0, "seed": 8, "top_k": 300, "repetition_penalty": 1.5},
    {"top_p": 0.8, "seed": 9, "frequency_penalty": 0.4},
    {"repetition_penalty": 1.3, "bad_words": ((3,), (4, 5))},
    {"temperature": 0.7, "seed": 10, "return_log_probs": True},
]


def test_a_row_gets_alone_what_it_gets_in_a_crowd() -> None:
    """Bit for bit, log-probabilities too; and the process's own generator plays no part."""
    steps = [random_logits(i, len(CROWD), 3000, scale=1.0) for i in range(20)]
    crowd = [sampler(**values) for values in CROWD]
    together = [sample(logits.clone(), crowd) for logits in steps]
    random.seed(123)
    np.random.seed(5)
    for row, values in enumerate(CROWD):
        alone = sampler(**values)
        for logits, (tokens, log_probs) in zip(steps, together, strict=True):
            assert sample(logits[row : row + 1].clone(), [alone]) == ([tokens[row]], [log_probs[row]])
    drawn = [tokens[0] for tokens, _ in together]
    assert len(set(drawn)) > 15


def test_seeds_differ() -> None:
    rows = random_logits(0, 2, 640, scale=1.0)
    pair = [sampler(temperature=1.0, seed=7), sampler(temperature=1.0, seed=8)]
    drawn = [sample(rows[:1].expand(2, -1), pair)[0] for _ in range(20)]
    assert [a for a, _ in drawn] != [b for _, b in drawn]


def occurrences_reference(
    row: torch.Tensor, prompt: list[int], output: list[int], asked: Request, temperature: float
) -> torch.Tensor:
    """TensorRT-LLM's kernel read line by line: temperature, then what occurred, token by token."""
    out = row.double() / temperature
    for token in range(len(row)):
        if token not in prompt + output:
            continue
        logit = float(out[token])
        logit = logit * asked.repetition_penalty if logit < 0 else logit / asked.repetition_penalty
        count = (prompt[asked.prompt_ignore_length :] + output).count(token)
        logit -= asked.presence_penalty * (count > 0) + asked.frequency_penalty * count
        out[token] = logit
    return out


tokens_below = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)


@settings(max_examples=80, deadline=None)
@given(
    prompt=tokens_below,
    seed=st.integers(0, 10**6),
    repetition=st.sampled_from([0.7, 1.0, 1.3, 4.0]),
    presence=st.sampled_from([-1.0, 0.0, 0.8]),
    frequency=st.sampled_from([-0.5, 0.0, 0.3]),
    ignored=st.sampled_from([0, 2, 99]),
    temperature=st.sampled_from([None, 0.5, 2.0]),
    greedy=st.booleans(),
)
def test_penalties_are_tensorrt_llms(
    prompt: list[int],
    seed: int,
    repetition: float,
    presence: float,
    frequency: float,
    ignored: int,
    temperature: float | None,
    greedy: bool,
) -> None:
    asked = request(
        input_ids=tuple(prompt),
        temperature=temperature,
        top_k=1 if greedy else 0,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        prompt_ignore_length=ignored,
        return_log_probs=True,
        seed=seed,
    )
    drawing, said = Sampler(asked), []
    for step in range(8):
        row = random_logits(seed + step, VOCAB)
        expected = occurrences_reference(row, prompt, said, asked, temperature or 1.0).log_softmax(-1)
        token, got = drawing.next(row.numpy())
        torch.testing.assert_close(
            row.double().div(temperature or 1.0).log_softmax(-1), expected, rtol=1e-4, atol=1e-4
        )
        assert got == pytest.approx(float(expected[token]), rel=1e-4, abs=1e-4)
        if greedy:
            assert expected[token] >= expected.max() - 1e-5
        said.append(token)
    assert len(said) == 8


@settings(max_examples=80, deadline=None)
@given(
    prompt=tokens_below,
    seed=st.integers(0, 10**6),
    repetition=st.sampled_from([1.0, 1.4]),
    bad_words=st.lists(
        st.lists(st.integers(0, 3) | st.integers(0, VOCAB - 1), min_size=1, max_size=3).map(tuple), max_size=4
    ),
    min_tokens=st.integers(0, 6),
    end_id=st.integers(0, VOCAB - 1),
    stop=st.integers(0, VOCAB - 1),
)
def test_bad_words_and_min_tokens_are_transformers(
    prompt: list[int],
    seed: int,
    repetition: float,
    bad_words: list[tuple[int, ...]],
    min_tokens: int,
    end_id: int,
    stop: int,
) -> None:
    """Over small tokens, so that words of several come about."""
    asked = request(
        input_ids=tuple(prompt),
        repetition_penalty=repetition,
        bad_words=tuple(bad_words),
        min_tokens=min_tokens,
        end_id=end_id,
        stop_words=((stop,), (1, 2)),
        temperature=1.0,
        seed=seed,
    )
    processors = hf.LogitsProcessorList([hf.RepetitionPenaltyLogitsProcessor(repetition)])
    if bad_words:
        # eos_token_id: a banned [[eos]] alone would be dropped there.
        processors.append(hf.NoBadWordsLogitsProcessor([list(w) for w in bad_words], eos_token_id=None))
    if min_tokens:
        processors.append(hf.MinNewTokensLengthLogitsProcessor(len(prompt), min_tokens, [end_id, stop]))
    drawing, ids = Sampler(asked), list(prompt)
    for step in range(10):
        row = random_logits(seed + step, VOCAB)
        row[:4] += 6  # of which bad words are made
        expected = processors(torch.tensor([ids]), row[None].clone())[0]
        token, _ = drawing.next(row.numpy())
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)
        assert expected[token] > -math.inf
        ids.append(token)


def test_all_tokens_banned_is_no_crash() -> None:
    banned = tuple((token,) for token in range(5))
    for values in ({}, {"temperature": 1.0}, {"top_k": 3}, {"top_p": 0.4}):
        drawing = sampler(bad_words=banned, return_log_probs=True, **values)
        token, value = drawing.next(np.zeros(5, np.float32))
        assert (0 <= token < 5, value) == (True, -math.inf)


def test_log_probs_are_of_the_whole_vocabulary() -> None:
    row = random_logits(4, 1000)
    for values, temperature in (
        ({}, 1.0),
        ({"temperature": 0.0}, 1.0),
        ({"temperature": 0.5, "top_k": 3}, 0.5),
        ({"temperature": 2.0, "top_p": 0.3}, 2.0),
    ):
        (token,), (value,) = sample(row[None].clone(), [sampler(return_log_probs=True, **values)])
        expected = row.double().div(temperature).log_softmax(-1)[token]
        assert value == pytest.approx(float(expected), abs=1e-5)
    assert log_prob(np.array([0.0, 0.0], np.float32), 1, 1.0) == pytest.approx(-math.log(2))


def test_an_end_token_the_model_does_not_have_is_never_masked() -> None:
    row = random_logits(0, VOCAB)
    before = row.clone()
    sampler(min_tokens=3, end_id=VOCAB + 7, stop_words=((-1,), (VOCAB,))).next(row.numpy())
    assert torch.equal(row, before)
