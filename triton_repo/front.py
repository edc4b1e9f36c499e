"""OpenAI's API beside a server, as a child of the process that looks after both."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from builder.errors import UserError
from engines.embedded.process import end_with_parent, package_root

MARGIN_S = 5.0


class Front:
    """Runs `command` while the `with` block lasts: it prints one line once it listens.

    SIGTERM lets its running requests finish for `grace_s` seconds. Where this process is killed, the kernel
    kills the front too. Raises UserError where it ends instead of listening.
    """

    def __init__(self, command: Sequence[str], grace_s: float) -> None:
        self._command, self._grace_s = list(command), grace_s
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or another in the place of one that has ended, and wait until it listens."""
        self.stop()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            cwd=package_root(),
            preexec_fn=end_with_parent,
        )
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise UserError(f"openai: the front end ended with {self._process.wait()}; it says why above")

    @property
    def exit_code(self) -> int | None:
        """None while it runs; -9 where SIGKILL ended it."""
        assert self._process is not None, "start first"
        return self._process.poll()

    def stop(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.terminate()
        try:
            process.wait(self._grace_s + MARGIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()

    def __enter__(self) -> Front:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
