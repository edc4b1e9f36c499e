"""Looks after a running server: a model that has died is loaded again, a dead tritonserver started again.

Triton does neither: a killed stub stays dead, and an engine that lost a rank refuses every request.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from builder.errors import UserError
from triton_repo.server import Server

DEAD = ("the engine died", "no step has ended", "is not healthy", "not ready", "unknown model", "not found")


@dataclass(kw_only=True)
class Watchdog:
    """Asks for one token every `period_s` seconds. `tell` gets a line for each thing that happens.

    After `tries` repairs within `window_s` seconds it gives up. An answer that takes longer than `patience_s`
    is that of a busy server, and so is a full queue: an engine that hangs ends itself.
    """

    server: Server
    tell: Callable[[str], None]
    period_s: float = 5.0
    patience_s: float = 30.0
    tries: int = 3
    window_s: float = 600.0
    repairs: deque[float] = field(default_factory=deque)
    repaired: int = 0

    def run(self) -> None:
        """Until interrupted. Raises UserError with the last words where too many repairs did not help."""
        while True:
            try:
                self.server.wait(self.period_s)
                said = self.server.probe(self.patience_s)
            except UserError as error:
                if self.server.dead:
                    self._repair(str(error), self.server.restart)
                continue
            if any(words in said for words in DEAD):
                self._repair(said, self.server.reload)

    def _repair(self, why: str, repair: Callable[[], None]) -> None:
        now = time.monotonic()
        while self.repairs and now - self.repairs[0] > self.window_s:
            self.repairs.popleft()
        if len(self.repairs) >= self.tries:
            raise UserError(f"{why}; {self.tries} repairs within {self.window_s:.0f} s were not enough")
        time.sleep(2.0 ** len(self.repairs) - 1)
        self.repairs.append(now)
        self.repaired += 1
        what = "starting the server" if repair == self.server.restart else "loading the models"
        self.tell(f"{why.rstrip('.')}; {what} again")
        try:
            repair()
        except UserError as error:
            self.tell(f"that failed: {error}")
        else:
            self.tell("serving again")
