"""Rank 0's end of the session's socket."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import socket
import threading
import time
from pathlib import Path

from builder.errors import UserError
from engines.embedded import protocol
from engines.embedded.protocol import Message

_GRACE_S = 3.0  # from the socket's end to the hard end of a rank that does not notice


class Connection:
    """Messages from and to the session; a thread reads, so that the end is noticed during a long step.

    `path` is the socket, in a directory of the session's. A session that ends removes it; one that was
    killed cannot, so it goes with the connection. Raises UserError where no session listens.
    """

    def __init__(self, path: str) -> None:
        self._directory = Path(path).parent
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            self.forget_directory()
            raise UserError(
                f"{path}: no session listens on {socket.gethostname()}; it has ended, or runs on another "
                "host: start it on the first of the hosts"
            ) from None
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with self._socket.makefile("rb") as lines, contextlib.suppress(ConnectionError):
            for line in lines:
                self._inbox.put(protocol.decode(line))
        self._inbox.put(None)
        self.forget_directory()
        time.sleep(_GRACE_S)
        self.forget_directory()
        os._exit(1)

    def forget_directory(self) -> None:
        """Remove the session's directory, which a killed session cannot."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def receive(self, *, wait: bool) -> list[Message | None]:
        """Messages that have come, None at the end of the stream; with `wait` at least one."""
        messages = [self._inbox.get()] if wait else []
        while not self._inbox.empty():
            messages.append(self._inbox.get())
        return messages

    def send(self, message: Message) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the reading thread sees it too
            self._socket.sendall(protocol.encode(message))
