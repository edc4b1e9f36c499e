"""Which request runs in which slot: continuous batching without a model. Imports no torch and no MPI."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from engines.embedded.request import FinishReason, Output, Request
from engines.embedded.step import Decode, Prefill, Step


@dataclass(kw_only=True, eq=False)
class Running:
    """A request that has a slot, and the tokens made for it so far."""

    request_id: int
    request: Request
    slot: int
    generated: list[int] = field(default_factory=list)

    def append(self, token: int) -> Output:
        """Take the next token; tells what to send and whether this was the last."""
        if token == self.request.end_id:
            return Output(token_ids=(), finish_reason="end_id")
        self.generated.append(token)
        return Output(token_ids=(token,), finish_reason=self._finish_reason())

    def _finish_reason(self) -> FinishReason | None:
        if any(self.generated[-len(word) :] == list(word) for word in self.request.stop_words):
            return "stop_words"
        return "length" if len(self.generated) >= self.request.max_tokens else None


class Scheduler:
    """Requests join as soon as a slot is free, each with one prefill, and leave when they end.

    Waiting prompts go before decoding, in order of arrival; between them all running requests decode
    together.
    """

    def __init__(self, max_batch_size: int) -> None:
        self._free = list(range(max_batch_size - 1, -1, -1))
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: dict[int, Running] = {}

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._running)

    def submit(self, request_id: int, request: Request) -> None:
        """Queue a request."""
        self._waiting.append((request_id, request))

    def cancel(self, request_id: int) -> None:
        """Forget a request, waiting or running; one that has ended is no error."""
        self._waiting = deque(x for x in self._waiting if x[0] != request_id)
        if request_id in self._running:
            self._release(request_id)

    def next_step(self) -> tuple[Step, list[Running]] | None:
        """The next pass and the requests its rows of logits belong to; None when there is no work."""
        if self._waiting and self._free:
            request_id, request = self._waiting.popleft()
            joined = Running(request_id=request_id, request=request, slot=self._free.pop())
            self._running[request_id] = joined
            return Prefill(slot=joined.slot, tokens=request.input_ids), [joined]
        if not self._running:
            return None
        rows = list(self._running.values())
        step = Decode(
            slots=tuple(x.slot for x in rows),
            positions=tuple(len(x.request.input_ids) + len(x.generated) - 1 for x in rows),
            tokens=tuple(x.generated[-1] for x in rows),
        )
        return step, rows

    def advance(self, rows: Sequence[Running], tokens: Sequence[int]) -> list[tuple[int, Output]]:
        """Give each row its token; returns (request_id, Output) and frees the slots of those that ended."""
        outputs = []
        for row, token in zip(rows, tokens, strict=True):
            output = row.append(token)
            outputs.append((row.request_id, output))
            if output.finish_reason:
                self._release(row.request_id)
        return outputs

    def _release(self, request_id: int) -> None:
        self._free.append(self._running.pop(request_id).slot)
