"""What the harness and an engine's process say to each other: one JSON object a line.

Both sides import this, and the peers' environment has none of our dependencies: standard library only.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

_PR_SET_PDEATHSIG = 1


class NotOffered(Exception):  # noqa: N818  an answer, not an error
    """The engine has no such precision; the message says so."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model directory in bfloat16, and what an engine has to be ready for. Lengths count tokens."""

    model: str
    work: str  # an empty directory of this engine
    precision: str
    threads: int
    prompt: int
    length: int  # of prompt and output
    batch: int  # at most


@dataclass
class Trace:
    """The tokens of each sequence, and the seconds since the start at which each was there."""

    tokens: list[list[int]]
    seconds: list[list[float]]
    start: float = field(default_factory=time.perf_counter)

    @classmethod
    def begin(cls, sequences: int) -> Trace:
        """Now."""
        return cls([[] for _ in range(sequences)], [[] for _ in range(sequences)])

    def add(self, sequence: int, tokens: Sequence[int]) -> None:
        """Tokens of one sequence."""
        now = time.perf_counter() - self.start
        self.tokens[sequence].extend(tokens)
        self.seconds[sequence].extend([now] * len(tokens))

    def add_step(self, tokens: Sequence[int]) -> None:
        """One token of every sequence."""
        now = time.perf_counter() - self.start
        for sequence, token in enumerate(tokens):
            self.tokens[sequence].append(int(token))
            self.seconds[sequence].append(now)


class Engine:
    """What an engine's process does. `prepare` runs in a process of its own, before `load`."""

    packages: tuple[str, ...] = ()  # whose versions are told

    def prepare(self, job: Job) -> dict[str, Any]:
        """Make the engine's files in `job.work`. Raises NotOffered for a precision it has not."""
        return {}

    def load(self, job: Job) -> dict[str, Any]:
        """Be ready to generate; may tell `pids` of other processes that compute, and `settings`."""
        raise NotImplementedError

    def generate(self, prompts: list[list[int]], count: int) -> Trace:
        """Continue all prompts at once, greedily, by `count` tokens each, whatever they are."""
        raise NotImplementedError

    def close(self) -> None:
        """End what `load` started."""


def _answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    do = request["do"]
    if do == "generate":
        trace = engine.generate(request["prompts"], request["count"])
        return {"tokens": trace.tokens, "seconds": trace.seconds}
    method: Callable[..., dict[str, Any]] = getattr(engine, do)
    start = time.perf_counter()
    facts = method(Job(**request["job"]))
    versions = {name: metadata.version(name) for name in engine.packages}
    return {f"{do}_s": round(time.perf_counter() - start, 2), "versions": versions, **facts}


def _checked(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"answer": _answer(engine, request)}
    except NotOffered as reason:
        return {"not_offered": str(reason)}
    except Exception as error:  # noqa: BLE001  told to the harness, which shows it
        return {"error": f"{type(error).__name__}: {error}"}


def serve(engine: Engine) -> None:
    """Answer requests from stdin until it ends; what libraries print goes to stderr."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a stopped process would outlive the harness
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        for line in sys.stdin:
            answers.write(json.dumps(_checked(engine, json.loads(line))) + "\n")
            answers.flush()
    finally:
        engine.close()


def job_fields(job: Job) -> dict[str, Any]:
    """A Job as JSON."""
    return asdict(job)
