"""Clients that have gone: Triton tells of them only when asked.

It tells a model that a client asks directly, and of an ensemble the steps that begin after the client has
gone. So `Watcher` asks for the running requests of a model, in one thread, and `Streams` asks at the step
that every token of a stream begins anew, on behalf of the one that runs.
"""

import collections
import itertools
import math
import threading
import time

PERIOD_S = 0.02  # asking costs a message to the server, too much for every token
KEPT_S = 1.0


class Kept:
    """What was asked may not go right after: the stub still signals the asker on memory that goes with it
    (python_backend, src/pb_cancel.cc, ReportIsCancelled)."""

    def __init__(self) -> None:
        self.kept: collections.deque = collections.deque()

    def add(self, asked) -> None:
        now = time.monotonic()
        self.kept.append((now, asked))
        while now - self.kept[0][0] > KEPT_S:
            self.kept.popleft()


class Streams:
    """Whether the client of an ensemble's stream has gone, asked every `PERIOD_S` at most."""

    MOST = 4096  # the least recently seen is forgotten

    def __init__(self) -> None:
        self.asked: collections.OrderedDict = collections.OrderedDict()
        self.kept = Kept()

    def gone(self, name, request) -> bool:
        """Of the stream `name`, whose step `request` is; true once."""
        now = time.monotonic()
        last = self.asked.setdefault(name, now)
        self.asked.move_to_end(name)
        if len(self.asked) > self.MOST:
            self.asked.popitem(last=False)
        if now - last < PERIOD_S:
            return False
        self.kept.add(request)
        gone = request.is_cancelled()
        self.asked[name] = math.inf if gone else now
        return gone


class Watcher:
    """Calls `stop` for each request whose client has cancelled it, once.

    A sender must not be asked after its last response, which would crash the server: `forget` comes before
    that response, and waits for a question under way.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.watched: dict = {}
        self.kept = Kept()
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
        with self.changed:
            sender, _ = self.watched.pop(key, (None, None))
            self.kept.add(sender)

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
            self.kept.add(sender)
            return stop

    def close(self) -> None:
        """End the thread."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()
