"""Looks after a running server: a model that has died is loaded again, a dead tritonserver started again.

Triton does neither: a killed stub stays dead, and an engine that lost a rank refuses every request.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from builder.errors import UserError
from triton_repo.front import Front
from triton_repo.processes import cpu_s, descendants
from triton_repo.registry import State
from triton_repo.server import Server

IDLE = 0.05  # of a core for each process; seen 0.001 at TP 1, and 0.006 at TP 2, where a rank polls
DEAD = ("the engine died", "no step has ended", "is not healthy", "not ready", "unknown model", "not found")


@dataclass(kw_only=True)
class Watchdog:
    """Asks for one token every `period_s` seconds; `tell` gets a line for what happens, and the state then.

    After `tries` repairs within `window_s` seconds it gives up. A model that takes longer than `patience_s`
    is busy, and so is one with a full queue. A server hangs that for `silence_s` seconds has not said that
    it lives, or has given no token and done nothing either: the processor's time of all its processes tells.
    """

    server: Server
    tell: Callable[[str, State], None]
    front: Front | None = None
    period_s: float = 5.0
    patience_s: float = 30.0
    silence_s: float = 120.0
    tries: int = 3
    window_s: float = 600.0
    repairs: deque[float] = field(default_factory=deque)
    heard: float = field(default_factory=time.monotonic)
    used: tuple[float, float] = (0.0, 0.0)  # when, and how much time of the processor until then

    def run(self) -> None:
        """Until interrupted. Raises UserError with the last words where too many repairs did not help."""
        while True:
            self.look()

    def look(self) -> None:
        """Once, after `period_s`; repairs what it finds."""
        try:
            self.server.wait(self.period_s)
            said = self.server.probe(self.patience_s)
        except UserError as error:
            if self.server.dead or self._silent():
                self._repair(str(error), "starting the server", self.server.restart)
            return
        self.heard = time.monotonic()
        if any(words in said for words in DEAD):
            self._repair(said, "loading the models", self.server.reload)
        elif self.front is not None and self.front.exit_code is not None:
            self._repair(f"openai: ended with {self.front.exit_code}", "starting it", self.front.start)

    def _silent(self) -> bool:
        if self.server.answers(self.patience_s) and self._works():
            self.heard = time.monotonic()
        return time.monotonic() - self.heard > self.silence_s

    def _works(self) -> bool:
        """Whether it has used more of a processor than an idle server does, since this was asked last."""
        before, self.used = self.used, (time.monotonic(), cpu_s(self.server.pid))
        passed, used = (now - then for now, then in zip(self.used, before, strict=True))
        return used > IDLE * passed * (1 + len(descendants(self.server.pid)))

    def _repair(self, why: str, what: str, repair: Callable[[], None]) -> None:
        now = time.monotonic()
        while self.repairs and now - self.repairs[0] > self.window_s:
            self.repairs.popleft()
        if len(self.repairs) >= self.tries:
            raise UserError(f"{why}; {self.tries} repairs within {self.window_s:.0f} s were not enough")
        time.sleep(2.0 ** len(self.repairs) - 1)
        self.repairs.append(now)
        self.tell(f"{why.rstrip('.')}; {what} again", "repairing")
        try:
            repair()
        except UserError as error:
            self.tell(f"that failed: {error}", "failed")
        else:
            self.tell("serving again", "serving")
        self.heard = time.monotonic()
