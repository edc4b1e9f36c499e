"""Which request runs in which slot and blocks: continuous batching without a model, torch or MPI."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from engines.embedded.request import FinishReason, Output, Request
from engines.embedded.step import Decode, Prefill, Step, num_blocks


@dataclass(kw_only=True, eq=False)
class Running:
    """A request that has a slot and blocks of the KV cache, and the tokens made for it so far."""

    request_id: int
    request: Request
    slot: int
    blocks: tuple[int, ...]
    generated: list[int] = field(default_factory=list)
    cum_log_prob: float = 0.0

    @property
    def position(self) -> int:
        """Where the latest token goes."""
        return len(self.request.input_ids) + len(self.generated) - 1

    def append(self, token: int, log_prob: float | None = None) -> Output:
        """Take the next token; tells what to send and whether this was the last."""
        ended = token == self.request.end_id
        if not ended:
            self.generated.append(token)
        tokens = () if ended else (token,)
        reason = "end_id" if ended else self._finish_reason()
        if log_prob is None:
            return Output(token_ids=tokens, finish_reason=reason)
        self.cum_log_prob += log_prob
        return Output(
            token_ids=tokens,
            finish_reason=reason,
            log_probs=() if ended else (log_prob,),
            cum_log_prob=self.cum_log_prob,
        )

    def _finish_reason(self) -> FinishReason | None:
        request, length = self.request, len(self.generated)
        if length >= request.min_tokens and any(
            self.generated[-len(word) :] == list(word) for word in request.stop_words
        ):
            return "stop_words"
        return "length" if length >= request.max_tokens else None


class Scheduler:
    """Requests join in order of arrival, each with one prefill, and leave when they end.

    One joins as soon as a slot is free and as many of the `num_blocks` blocks as its longest answer
    needs, and keeps them until it ends, so no running request ever lacks room. None overtakes another,
    so none waits for ever: whoever is first in line gets what is freed. Waiting prompts that fit go
    before decoding; between them all running requests decode together.
    """

    def __init__(self, max_batch_size: int, num_blocks: int) -> None:
        self._free_slots = list(range(max_batch_size - 1, -1, -1))
        self._free_blocks = list(range(num_blocks - 1, -1, -1))
        self._waiting: OrderedDict[int, Request] = OrderedDict()
        self._running: dict[int, Running] = {}

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._running)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no running request has reserved."""
        return len(self._free_blocks)

    def submit(self, request_id: int, request: Request) -> None:
        """Queue a request that `Request.check_limits` has passed."""
        self._waiting[request_id] = request

    def cancel(self, request_id: int) -> None:
        """Forget a request, waiting or running; one that has ended is no error."""
        self._waiting.pop(request_id, None)
        if request_id in self._running:
            self._release(request_id)

    def next_step(self) -> tuple[Step, list[Running]] | None:
        """The next pass and the requests its rows of logits belong to; None when there is no work."""
        joined = self._admit()
        if joined is not None:
            prompt = joined.request.input_ids
            return Prefill(slot=joined.slot, blocks=joined.blocks, tokens=prompt), [joined]
        if not self._running:
            return None
        rows = list(self._running.values())
        step = Decode(
            slots=tuple([row.slot for row in rows]),
            positions=tuple([row.position for row in rows]),
            tokens=tuple([row.generated[-1] for row in rows]),
        )
        return step, rows

    def _admit(self) -> Running | None:
        """Whoever is first in line, where there is room."""
        if not (self._waiting and self._free_slots):
            return None
        request_id, request = next(iter(self._waiting.items()))
        count = num_blocks(len(request.input_ids) + request.max_tokens)
        if count > len(self._free_blocks):
            assert self._running, "check_limits lets nothing wait that would not fit alone"
            return None
        del self._waiting[request_id]
        blocks = tuple([self._free_blocks.pop() for _ in range(count)])
        joined = Running(request_id=request_id, request=request, slot=self._free_slots.pop(), blocks=blocks)
        self._running[request_id] = joined
        return joined

    def advance(
        self,
        rows: Sequence[Running],
        tokens: Sequence[int],
        log_probs: Sequence[float | None] | None = None,
    ) -> list[tuple[int, Output]]:
        """Give each row its token; returns (request_id, Output) and frees the room of those that ended."""
        outputs = []
        for row, token, log_prob in zip(rows, tokens, log_probs or [None] * len(rows), strict=True):
            output = row.append(token, log_prob)
            outputs.append((row.request_id, output))
            if output.finish_reason:
                self._release(row.request_id)
        return outputs

    def _release(self, request_id: int) -> None:
        ended = self._running.pop(request_id)
        self._free_slots.append(ended.slot)
        self._free_blocks.extend(reversed(ended.blocks))
