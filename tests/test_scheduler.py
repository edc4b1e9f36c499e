"""Continuous batching without a model: who runs when, and why a request ends."""

from __future__ import annotations

import pytest

from builder.errors import UserError
from engines.embedded import protocol, step
from engines.embedded.request import Output, Request
from engines.embedded.scheduler import Scheduler
from engines.embedded.step import Decode, Prefill


def request(length: int = 3, **values: object) -> Request:
    return Request(**{"input_ids": tuple(range(1, length + 1)), "max_tokens": 3, **values})


def advance(scheduler: Scheduler, *tokens: int) -> tuple[step.Step, list[tuple[int, Output]]]:
    work = scheduler.next_step()
    assert work is not None
    return work[0], scheduler.advance(work[1], tokens)


def test_prefill_goes_first_and_all_running_requests_decode_together() -> None:
    scheduler = Scheduler(max_batch_size=4)
    scheduler.submit(10, request(2))
    assert advance(scheduler, 7)[0] == Prefill(slot=0, tokens=(1, 2))
    assert advance(scheduler, 8)[0] == Decode(slots=(0,), positions=(2,), tokens=(7,))
    scheduler.submit(11, request(5))
    assert advance(scheduler, 9)[0] == Prefill(slot=1, tokens=(1, 2, 3, 4, 5))
    this, outputs = advance(scheduler, 5, 6)
    assert this == Decode(slots=(0, 1), positions=(3, 5), tokens=(8, 9))
    assert outputs == [
        (10, Output(token_ids=(5,), finish_reason="length")),
        (11, Output(token_ids=(6,), finish_reason=None)),
    ]
    assert advance(scheduler, 1)[1] == [(11, Output(token_ids=(1,), finish_reason="length"))]
    assert scheduler.idle
    assert scheduler.next_step() is None


def test_waits_for_a_free_slot_in_order_of_arrival() -> None:
    scheduler = Scheduler(max_batch_size=2)
    for i in range(4):
        scheduler.submit(i, request(max_tokens=1 + (i == 1)))
    order = []
    while not scheduler.idle:
        _, rows = scheduler.next_step() or pytest.fail("work is left")
        order.append([row.request_id for row in rows])
        assert len({row.slot for row in rows}) == len(rows) <= 2
        scheduler.advance(rows, [9] * len(rows))
    assert order == [[0], [1], [2], [3], [1]]  # request 0 ends in its prefill and makes room


@pytest.mark.parametrize(
    ("values", "tokens", "expected"),
    [
        ({"end_id": 5}, [4, 5], [((4,), None), ((), "end_id")]),
        ({"end_id": 5, "max_tokens": 1}, [5], [((), "end_id")]),
        ({"stop_words": ((9,), (4, 6))}, [4, 6], [((4,), None), ((6,), "stop_words")]),
        ({"stop_words": ((4, 4, 4, 4),)}, [4, 4, 4], [((4,), None), ((4,), None), ((4,), "length")]),
    ],
)
def test_finish_reasons(
    values: dict[str, object], tokens: list[int], expected: list[tuple[tuple[int, ...], str | None]]
) -> None:
    scheduler = Scheduler(max_batch_size=1)
    scheduler.submit(0, request(**values))
    outputs = [advance(scheduler, token)[1][0][1] for token in tokens]
    assert [(x.token_ids, x.finish_reason) for x in outputs] == expected
    assert scheduler.idle


def test_cancel_frees_the_slot_at_once() -> None:
    scheduler = Scheduler(max_batch_size=1)
    for i in range(3):
        scheduler.submit(i, request())
    advance(scheduler, 7)
    scheduler.cancel(1)  # waiting
    scheduler.cancel(0)  # running
    scheduler.cancel(0)  # gone already
    assert advance(scheduler, 7)[1][0][0] == 2
    scheduler.cancel(2)
    assert scheduler.idle


@pytest.mark.parametrize(
    "this",
    [
        None,
        Prefill(slot=3, tokens=(1, 2, 3)),
        Decode(slots=(2, 0), positions=(7, 9), tokens=(5, 2**40)),
    ],
)
def test_steps_cross_as_numbers(this: step.Step | None) -> None:
    message = step.encode(this)
    assert step.decode(message) == this
    assert len(message) <= step.max_message_size(max_batch_size=2, max_input_len=3)


def test_requests_and_outputs_cross_as_lines() -> None:
    asked = request(stop_words=((1, 2), (3,)), temperature=0.5, seed=2**64 - 1)
    line = protocol.encode(protocol.submit(4, asked))
    assert line.count(b"\n") == 1
    assert protocol.submitted(protocol.decode(line)) == asked
    results = [
        (4, Output(token_ids=(7,), finish_reason=None)),
        (5, Output(token_ids=(), finish_reason="end_id")),
    ]
    assert protocol.output_list(protocol.decode(protocol.encode(protocol.outputs(results)))) == results


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_ids": ()},
        {"max_tokens": 0},
        {"stop_words": ((),)},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
    ],
)
def test_a_value_out_of_range_is_named(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(wrong))}: "):
        request(**wrong)
