"""Continuous batching without a model: who runs when and where, and why a request ends."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.errors import UserError
from engines.embedded import protocol, step
from engines.embedded.request import Output, Request
from engines.embedded.scheduler import Scheduler
from engines.embedded.step import BLOCK_SIZE, Decode, Prefill


def request(length: int = 3, **values: object) -> Request:
    return Request(**{"input_ids": tuple(range(1, length + 1)), "max_tokens": 3, **values})


def advance(scheduler: Scheduler, *tokens: int) -> tuple[step.Step, list[tuple[int, Output]]]:
    work = scheduler.next_step()
    assert work is not None
    return work[0], scheduler.advance(work[1], tokens)


def test_prefill_goes_first_and_all_running_requests_decode_together() -> None:
    scheduler = Scheduler(max_batch_size=4, num_blocks=12)
    scheduler.submit(10, request(2))
    assert advance(scheduler, 7)[0] == Prefill(slot=0, blocks=(0,), tokens=(1, 2))
    assert advance(scheduler, 8)[0] == Decode(slots=(0,), positions=(2,), tokens=(7,))
    scheduler.submit(11, request(5, max_tokens=60))
    assert advance(scheduler, 9)[0] == Prefill(slot=1, blocks=(1, 2), tokens=(1, 2, 3, 4, 5))
    this, outputs = advance(scheduler, 5, 6)
    assert this == Decode(slots=(0, 1), positions=(3, 5), tokens=(8, 9))
    assert outputs == [
        (10, Output(token_ids=(5,), finish_reason="length")),
        (11, Output(token_ids=(6,), finish_reason=None)),
    ]
    assert advance(scheduler, 1)[1] == [(11, Output(token_ids=(1,), finish_reason=None))]
    scheduler.cancel(11)
    assert scheduler.idle
    assert scheduler.next_step() is None


def test_waits_for_a_free_slot_in_order_of_arrival() -> None:
    scheduler = Scheduler(max_batch_size=2, num_blocks=4)
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
        (
            {"stop_words": ((4, 6),), "min_tokens": 3},
            [4, 6, 7],
            [((4,), None), ((6,), None), ((7,), "length")],
        ),
        ({"stop_words": ((4, 6),), "min_tokens": 2}, [4, 6], [((4,), None), ((6,), "stop_words")]),
        ({"min_tokens": 9, "max_tokens": 1}, [4], [((4,), "length")]),
    ],
)
def test_finish_reasons(
    values: dict[str, object], tokens: list[int], expected: list[tuple[tuple[int, ...], str | None]]
) -> None:
    scheduler = Scheduler(max_batch_size=1, num_blocks=4)
    scheduler.submit(0, request(**values))
    outputs = [advance(scheduler, token)[1][0][1] for token in tokens]
    assert [(x.token_ids, x.finish_reason) for x in outputs] == expected
    assert scheduler.idle


def test_cancel_frees_the_slot_at_once() -> None:
    scheduler = Scheduler(max_batch_size=1, num_blocks=4)
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
        Prefill(slot=3, blocks=(7, 2), tokens=(1, 2, 3)),
        Decode(slots=(2, 0), positions=(7, 9), tokens=(5, 2**40)),
    ],
)
def test_steps_cross_as_numbers(this: step.Step | None) -> None:
    message = step.encode(this)
    assert step.decode(message) == this
    assert len(message) <= step.max_message_size(max_batch_size=2, max_input_len=3, max_seq_len=65)


def test_no_step_is_longer_than_the_longest() -> None:
    prompt = Prefill(slot=0, blocks=tuple(range(3)), tokens=(1,) * 90)
    crowd = Decode(slots=(1,) * 40, positions=(1,) * 40, tokens=(1,) * 40)
    assert len(step.encode(prompt)) == step.max_message_size(4, max_input_len=90, max_seq_len=130)
    assert len(step.encode(crowd)) == step.max_message_size(40, max_input_len=90, max_seq_len=130)


def test_requests_and_outputs_cross_as_lines() -> None:
    asked = request(
        stop_words=((1, 2), (3,)),
        bad_words=((9,), (8, 7)),
        temperature=0.5,
        seed=2**64 - 1,
        repetition_penalty=1.1,
        min_tokens=2,
        return_log_probs=True,
    )
    line = protocol.encode(protocol.submit(4, asked))
    assert line.count(b"\n") == 1
    assert protocol.submitted(protocol.decode(line)) == asked
    results = [
        (4, Output(token_ids=(7,), finish_reason=None)),
        (5, Output(token_ids=(), finish_reason="end_id")),
        (6, Output(token_ids=(8,), finish_reason="length", log_probs=(-0.1,), cum_log_prob=-2.7)),
        (7, Output(token_ids=(), finish_reason="end_id", log_probs=(), cum_log_prob=-float("inf"))),
    ]
    assert protocol.output_list(protocol.decode(protocol.encode(protocol.outputs(results)))) == results


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_ids": ()},
        {"max_tokens": 0},
        {"stop_words": ((),)},
        {"bad_words": ((1,), ())},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": float("-inf")},
        {"prompt_ignore_length": -1},
        {"min_tokens": -1},
    ],
)
def test_a_value_out_of_range_is_named(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(wrong))}: "):
        request(**wrong)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"length": 10, "max_tokens": 119},
            "max_tokens: 119 after 10 .* 3 blocks .* kv_cache_blocks is 2; .* 128",
        ),
        ({"length": 129, "max_tokens": 1}, "max_tokens: 1 after 129 .* 3 blocks .* kv_cache_blocks is 2"),
        ({"length": 3, "bad_words": ((4,), (5, 320))}, "bad_words: token 320 is not below vocab_size 320"),
    ],
)
def test_what_could_never_run_is_refused(values: dict[str, int], told: str) -> None:
    limits = SimpleNamespace(
        max_input_len=150,
        max_seq_len=200,
        kv_cache_blocks=2,
        architecture=SimpleNamespace(vocab_size=320),
    )
    with pytest.raises(UserError, match=f"^{told}"):
        request(**values).check_limits(limits)
    request(10, max_tokens=118).check_limits(limits)


def test_log_probs_add_up() -> None:
    scheduler = Scheduler(max_batch_size=2, num_blocks=2)
    for i in range(2):
        scheduler.submit(i, request(end_id=5))
    outputs = []
    for tokens, log_probs in (
        ((4,), (-0.5,)),
        ((4,), (None,)),
        ((6, 6), (-1.0, None)),
        ((5, 5), (-2.0, None)),
    ):
        _, rows = scheduler.next_step() or pytest.fail("work is left")
        outputs += scheduler.advance(rows, tokens, log_probs)
    assert [(x.log_probs, x.cum_log_prob) for i, x in outputs if i == 0] == [
        ((-0.5,), -0.5),
        ((-1.0,), -1.5),
        ((), -3.5),
    ]
    assert {(x.log_probs, x.cum_log_prob) for i, x in outputs if i == 1} == {((), None)}


def test_nobody_overtakes_who_waits_for_blocks() -> None:
    """The third would fit at once, and runs after the second all the same."""
    scheduler = Scheduler(max_batch_size=4, num_blocks=4)
    scheduler.submit(0, request(100, max_tokens=29))  # three blocks
    scheduler.submit(1, request(100, max_tokens=28))  # two
    scheduler.submit(2, request(1, max_tokens=1))  # one
    order = []
    while not scheduler.idle:
        this, rows = scheduler.next_step() or pytest.fail("work is left")
        order += [row.request_id for row in rows if isinstance(this, Prefill)]
        scheduler.advance(rows, [9] * len(rows))
        if order == [0]:
            assert scheduler.num_free_blocks == (1 if len(rows[0].generated) < 29 else 4)
    assert order == [0, 1, 2]


def test_cancelling_the_first_in_line_lets_the_next_in() -> None:
    scheduler = Scheduler(max_batch_size=4, num_blocks=4)
    for i, length in enumerate((150, 150, 2)):
        scheduler.submit(i, request(length))
    assert advance(scheduler, 9)[1][0][0] == 0
    assert isinstance(advance(scheduler, 9)[0], Decode)
    scheduler.cancel(1)
    this, rows = scheduler.next_step() or pytest.fail("work is left")
    assert (this, rows[0].request_id) == (Prefill(slot=1, blocks=(3,), tokens=(1, 2)), 2)


class Watched:
    """A scheduler and what must hold of it whatever happens, kept by a second bookkeeping."""

    def __init__(self, max_batch_size: int, num_blocks: int) -> None:
        self.scheduler = Scheduler(max_batch_size, num_blocks)
        self.max_batch_size, self.num_blocks = max_batch_size, num_blocks
        self.asked: dict[int, Request] = {}  # waiting, in order of arrival
        self.held: dict[int, tuple[int, tuple[int, ...], int]] = {}  # slot, blocks and tokens in the cache
        self.numbers = itertools.count()

    def submit(self, asked: Request) -> None:
        number = next(self.numbers)
        self.asked[number] = asked
        self.scheduler.submit(number, asked)

    def cancel(self, which: int) -> None:
        known = [*self.asked, *self.held]
        if known:
            number = known[which % len(known)]
            self.scheduler.cancel(number)
            self.asked.pop(number, None)
            self.held.pop(number, None)

    def step(self, token: int) -> None:
        work = self.scheduler.next_step()
        if work is None:
            assert not self.asked
            assert not self.held
            return
        this, rows = work
        if isinstance(this, Prefill):
            number = next(iter(self.asked))
            asked = self.asked.pop(number)
            assert [row.request_id for row in rows] == [number]
            assert this.tokens == asked.input_ids
            assert len(this.blocks) * BLOCK_SIZE >= len(asked.input_ids) + asked.max_tokens
            assert (len(this.blocks) - 1) * BLOCK_SIZE < len(asked.input_ids) + asked.max_tokens
            self.held[number] = (this.slot, this.blocks, len(this.tokens))
        else:
            self.check_nobody_is_kept_out()
            assert [row.request_id for row in rows] == list(self.held)
            assert this.slots == tuple(slot for slot, _, _ in self.held.values())
            for number, position in zip(list(self.held), this.positions, strict=True):
                slot, blocks, length = self.held[number]
                assert position == length < len(blocks) * BLOCK_SIZE
                self.held[number] = (slot, blocks, length + 1)
        self.check_room()
        for number, output in self.scheduler.advance(rows, [token] * len(rows)):
            if output.finish_reason:
                del self.held[number]
        self.check_room()

    def check_room(self) -> None:
        slots = [slot for slot, _, _ in self.held.values()]
        blocks = [block for _, blocks, _ in self.held.values() for block in blocks]
        assert len(set(slots)) == len(slots)
        assert set(slots) <= set(range(self.max_batch_size))
        assert len(set(blocks)) == len(blocks)
        assert set(blocks) <= set(range(self.num_blocks))

    def check_nobody_is_kept_out(self) -> None:
        if self.asked:
            asked = next(iter(self.asked.values()))
            used = sum(len(blocks) for _, blocks, _ in self.held.values())
            needed = step.num_blocks(len(asked.input_ids) + asked.max_tokens)
            assert len(self.held) == self.max_batch_size or used + needed > self.num_blocks


actions = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 200), st.integers(1, 70)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("step"), st.sampled_from([3, 4, 5])),
    ),
    max_size=120,
)


@settings(max_examples=100, deadline=None)
@given(max_batch_size=st.integers(1, 4), num_blocks=st.integers(5, 14), actions=actions)
def test_room_is_never_shared_lacking_or_lost(
    max_batch_size: int, num_blocks: int, actions: list[tuple]
) -> None:
    """Whatever comes, is cancelled or ends; 5 is everybody's end_id."""
    watched = Watched(max_batch_size, num_blocks)
    for kind, *numbers in actions:
        if kind == "submit":
            watched.submit(request(numbers[0], max_tokens=numbers[1], end_id=5))
        else:
            getattr(watched, kind)(*numbers)
    while not watched.scheduler.idle:
        watched.step(3)
    assert not watched.asked
    assert not watched.held
    assert watched.scheduler.num_free_blocks == num_blocks
    for _ in range(max_batch_size):  # slots are free again, too
        watched.submit(request(1, max_tokens=2))
    for _ in range(max_batch_size):
        watched.step(3)
    assert len(watched.held) == max_batch_size
