"""Rank 0's loop over a runtime without a model: what a step is spent on, counted step by step."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engines.embedded import protocol, step
from engines.embedded.collectives import Alone
from engines.embedded.leader import Leader, follow
from engines.embedded.request import Output, Request
from engines.embedded.step import Decode, Prefill, Step

VOCAB = 1000
OWN = 100  # request n speaks in tokens n * OWN and up
MANIFEST = SimpleNamespace(max_batch_size=2, max_input_len=100, max_seq_len=300, kv_cache_blocks=5)


class Counting:
    """A runtime whose next token is the last one plus 1; it keeps the steps it was asked for."""

    def __init__(self) -> None:
        self.manifest = MANIFEST
        self.steps: list[Step] = []

    def run(self, this: Step) -> torch.Tensor:
        self.steps.append(this)
        tokens = this.tokens[-1:] if isinstance(this, Prefill) else this.tokens
        return torch.nn.functional.one_hot((torch.tensor(tokens) + 1) % VOCAB, VOCAB).float()


class Script:
    """The session's end of the line: messages that come once the runtime has made so many steps."""

    def __init__(self, runtime: Counting, messages: Iterable[tuple[int, dict[str, Any]]]) -> None:
        self.runtime, self.messages = runtime, list(messages)
        self.sent: list[tuple[int, Output]] = []

    def receive(self, *, wait: bool) -> list[dict[str, Any] | None]:
        if wait and not self.messages:
            return [None]
        now = max(len(self.runtime.steps), self.messages[0][0] if wait else 0)
        due = [m for at, m in self.messages if at <= now]
        self.messages = [(at, m) for at, m in self.messages if at > now]
        return [protocol.decode(protocol.encode(m)) for m in due]

    def send(self, message: dict[str, Any]) -> None:
        self.sent += protocol.output_list(protocol.decode(protocol.encode(message)))


def submit(number: int, length: int = 3, **values: Any) -> dict[str, Any]:
    prompt = tuple(range(number * OWN + 1, number * OWN + length + 1))
    asked = {"input_ids": prompt, "max_tokens": 50, **values}
    return protocol.submit(number, Request(**asked))


def lead(messages: Iterable[tuple[int, dict[str, Any]]]) -> tuple[Counting, Script]:
    runtime = Counting()
    script = Script(runtime, messages)
    Leader(runtime, Alone(), script).run()
    return runtime, script


def at_work(this: Step) -> set[int]:
    """The requests that a step is for."""
    tokens = this.tokens[-1:] if isinstance(this, Prefill) else this.tokens
    return {token // OWN for token in tokens}


def test_every_request_gets_its_tokens_and_no_step_is_wasted() -> None:
    runtime, script = lead([(0, submit(0, 3, max_tokens=4)), (0, submit(1, 5, max_tokens=2))])
    told = {i: [t for n, output in script.sent if n == i for t in output.token_ids] for i in (0, 1)}
    assert told == {0: [4, 5, 6, 7], 1: [106, 107]}
    assert runtime.steps == [
        Prefill(slot=0, blocks=(0,), tokens=(1, 2, 3)),
        Prefill(slot=1, blocks=(1,), tokens=(101, 102, 103, 104, 105)),
        Decode(slots=(0, 1), positions=(3, 5), tokens=(4, 106)),
        Decode(slots=(0,), positions=(4,), tokens=(5,)),
        Decode(slots=(0,), positions=(5,), tokens=(6,)),
    ]


@pytest.mark.parametrize("at", [1, 2, 3, 17])
def test_a_cancelled_request_is_in_no_later_step(at: int) -> None:
    """The message comes while step `at` runs; slot and blocks serve the next in line in the step after."""
    waiting = submit(2, 250, max_tokens=2)  # four of the five blocks, so room is what it waits for
    runtime, script = lead([(0, submit(0)), (0, submit(1, max_tokens=30)), (0, waiting), (at, {"cancel": 0})])
    worked = [0 in at_work(this) for this in runtime.steps]
    assert worked[0]
    assert any(worked[2:]) == (at > 2)
    assert not any(worked[at:])
    third = [at_work(this) for this in runtime.steps].index({4})  # its prompt ends with token 450
    assert third == max(at, 2)  # the second's own prefill comes first
    assert [output.finish_reason for i, output in script.sent if i == 2] == [None, "length"]
    assert len([output for i, output in script.sent if i == 1]) == 30


def test_cancelled_while_waiting_is_never_started() -> None:
    gone = (1, {"cancel": 2})
    runtime, _ = lead([*((0, submit(i, max_tokens=5)) for i in range(3)), gone, gone])
    assert len(runtime.steps) == 6
    assert not any(2 in at_work(this) for this in runtime.steps)


def test_all_cancelled_is_no_work_at_all() -> None:
    runtime, script = lead([*((0, submit(i)) for i in range(5)), *((4, {"cancel": i}) for i in range(5))])
    assert len(runtime.steps) == 4
    assert len(script.sent) == 6  # two prefills, two decodes of two


def test_a_slot_keeps_nothing_of_the_request_before() -> None:
    """Penalties, seeds and bad words belong to a request."""
    plain = submit(9, 3, max_tokens=6)
    _, alone = lead([(0, plain)])
    spoilt = [submit(i, max_tokens=6, bad_words=((904,), (905,)), seed=i, top_k=9) for i in range(2)]
    _, after = lead([(0, spoilt[0]), (0, spoilt[1]), (0, plain)])
    assert [output for i, output in after.sent if i == 9] == [output for _, output in alone.sent]
    assert [output.token_ids for _, output in alone.sent] == [(token,) for token in range(904, 910)]


def test_log_probs_are_sent_where_asked_for() -> None:
    _, script = lead([(0, submit(0, max_tokens=3, return_log_probs=True)), (0, submit(1, max_tokens=3))])
    asked = [output for i, output in script.sent if i == 0]
    one = float(torch.nn.functional.one_hot(torch.tensor(1), VOCAB).float().log_softmax(-1)[1])
    assert [output.log_probs for output in asked] == [pytest.approx((one,))] * 3
    assert [output.cum_log_prob for output in asked] == pytest.approx([one, 2 * one, 3 * one])
    assert {(output.log_probs, output.cum_log_prob) for i, output in script.sent if i == 1} == {((), None)}


class Relay(Alone):
    """Rank 0 of two: keeps the messages for the other."""

    size = 2

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def send_step(self, message: Any) -> None:
        self.messages.append(message)

    def receive_step(self, longest: int) -> Any:
        message = self.messages.pop(0)
        assert len(message) <= longest
        return message


def test_the_other_ranks_run_the_same_steps() -> None:
    leading, following, relay = Counting(), Counting(), Relay()
    messages = [(0, submit(0, 100, max_tokens=5)), (0, submit(1, 2, max_tokens=9)), (0, submit(2, 99))]
    Leader(leading, relay, Script(leading, messages)).run()
    assert len(relay.messages) == len(leading.steps) + 1  # one message a step, and the end
    assert step.decode(relay.messages[-1]) is None
    follow(following, relay)
    assert following.steps == leading.steps
    assert len(leading.steps) > 50
