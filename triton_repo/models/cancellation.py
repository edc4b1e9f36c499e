"""Clients that have gone: Triton tells of them only when asked, so one thread asks for all requests."""

import collections
import itertools
import threading
import time

PERIOD_S = 0.02  # asking costs a message to the server, too much for every token
KEPT_S = 1.0


class Watcher:
    """Calls `stop` for each request whose client has cancelled it, once.

    A sender must not be asked after its last response, which would crash the server: `forget` comes before
    that response, and waits for a question under way. Nor may it go right after a question: the stub still
    signals the asker on memory that goes with it (python_backend, src/pb_cancel.cc, ReportIsCancelled).
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.watched: dict = {}
        self.kept: collections.deque = collections.deque()
        self.keys = itertools.count()
        self.closed = False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def watch(self, sender, stop) -> int:
        """Ask for `sender` from now on; returns a key for `forget`."""
        with self.changed:
            key = next(self.keys)
            self.watched[key] = (sender, stop)
            self.changed.notify()
        return key

    def forget(self, key: int) -> None:
        """The request has ended."""
        now = time.monotonic()
        with self.changed:
            sender, _ = self.watched.pop(key, (None, None))
            self.kept.append((now, sender))
            while now - self.kept[0][0] > KEPT_S:
                self.kept.popleft()

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.watched or self.closed)
                if self.closed:
                    return
                keys = list(self.watched)
            for key in keys:
                stop = self.cancelled(key)
                if stop is not None:
                    stop()
            time.sleep(PERIOD_S)

    def cancelled(self, key: int):
        """The request's `stop` if its client has gone and nobody was told yet."""
        with self.changed:
            sender, stop = self.watched.get(key, (None, None))
            if sender is None or not sender.is_cancelled():
                return None
            del self.watched[key]
            self.kept.append((time.monotonic(), sender))
            return stop

    def close(self) -> None:
        """End the thread."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()
