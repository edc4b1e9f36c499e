"""Engines taking turns on one model in one precision."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine import figures, models
from benchmarks.engine.channel import Job, NotOffered
from benchmarks.engine.entries import Entry
from benchmarks.engine.group import Group, Samples
from benchmarks.engine.load import other_cores
from benchmarks.engine.process import Failed, Process

Report = Callable[[str], None]
MEMORY = Entry("memory", "benchmarks.engine.memory")
_WARM_TOKENS = 8


@dataclass(kw_only=True)
class Runner:
    """Runs groups in directories under `work`."""

    pythons: dict[str, Path]  # by engine
    work: Path
    threads: int
    prompt: int
    count: int
    batches: Sequence[int]
    rounds: Callable[[int], int]  # by batch
    report: Report

    def job(self, group: Group, name: str) -> Job:
        """One engine's; its directory is made where it is missing."""
        work = self.work / f"{group.model}-{group.precision}" / name
        work.mkdir(parents=True, exist_ok=True)
        return Job(
            model=str(group.directory),
            work=str(work),
            precision=group.precision,
            threads=self.threads,
            prompt=self.prompt,
            length=self.prompt + self.count,
            batch=max(self.batches),
        )

    def _start(self, entry: Entry, job: Job) -> Process:
        return Process(self.pythons[entry.name], entry.module, Path(job.work) / "log", self.threads)

    def run(self, group: Group, entries: Sequence[Entry], available: float) -> None:
        """Fill `group`; MEMORY may be among the entries. One that fails is left out from there on."""
        try:
            ready = [entry for entry in entries if self._prepared(group, entry)]
            engines = [entry.name for entry in ready if entry != MEMORY]
            for names in figures.batches_of(engines, _need(group), available):
                self._run_set(group, [x for x in ready if x == MEMORY or x.name in names])
        finally:
            shutil.rmtree(self.work / f"{group.model}-{group.precision}", ignore_errors=True)

    def _prepared(self, group: Group, entry: Entry) -> bool:
        job = self.job(group, entry.name)
        return self._attempt(group, entry, "prepare", job) is not None

    def _attempt(
        self, group: Group, entry: Entry, do: str, job: Job, process: Process | None = None
    ) -> dict[str, Any] | None:
        """The answer, None where there is none, for a reason that `group` gets."""
        self.report(f"{group.model} {group.precision}: {do} {entry.name}")
        own = process or self._start(entry, job)
        try:
            answer = own.ask(do, job)
        except NotOffered as reason:
            group.not_offered[entry.name] = str(reason)
            return None
        except Failed as error:
            self._fail(group, entry.name, f"{do}: {error}")
            return None
        finally:
            if process is None:
                own.close()
        group.facts.setdefault(entry.name, {}).update(answer)
        return answer

    def _fail(self, group: Group, name: str, error: str) -> None:
        group.errors[name] = error
        self.report(f"{group.model} {group.precision}: {name} failed: {error}")

    def _run_set(self, group: Group, entries: Sequence[Entry]) -> None:
        with ExitStack() as stack:
            processes: dict[str, Process] = {}
            for entry in entries:
                job = self.job(group, entry.name)
                process = self._start(entry, job)
                stack.callback(process.close)
                if self._attempt(group, entry, "load", job, process) is not None:
                    processes[entry.name] = process
                process.stop()
            memory = processes.pop(MEMORY.name, None)
            samples = Samples(list(processes))
            group.sets.append(samples)
            for batch in self.batches:
                self._run_batch(group, samples, processes, memory, batch)

    def _run_batch(
        self,
        group: Group,
        samples: Samples,
        processes: dict[str, Process],
        memory: Process | None,
        batch: int,
    ) -> None:
        vocab = models.vocab_size(group.directory)
        prompts = models.prompts(vocab, batch, self.prompt)
        speeds = samples.speeds.setdefault(batch, {})
        tokens = samples.tokens.setdefault(batch, {})
        for name in list(processes):
            self._generate(group, processes, name, prompts, _WARM_TOKENS)
        for index in range(self.rounds(batch)):
            group.other_cores.append(other_cores())
            if memory is not None:
                self._read_memory(group, memory)
            for name in turn(list(processes), index):
                trace = self._generate(group, processes, name, prompts, self.count)
                if trace is None:
                    speeds.pop(name, None)
                    tokens.pop(name, None)
                    continue
                speeds.setdefault(name, []).append(figures.speed(trace["seconds"]))
                tokens[name] = trace["tokens"]
            self.report(_progress(group, batch, index, speeds))

    def _read_memory(self, group: Group, memory: Process) -> None:
        try:
            with memory.awake():
                group.bandwidth.append(memory.ask("read", self.job(group, MEMORY.name))["gb_per_s"])
        except Failed as error:
            self._fail(group, MEMORY.name, f"read: {error}")

    def _generate(
        self, group: Group, processes: dict[str, Process], name: str, prompts: list[list[int]], count: int
    ) -> dict[str, Any] | None:
        try:
            with processes[name].awake():
                trace = processes[name].generate(prompts, count)
            short = [len(x) for x in trace["tokens"] if len(x) != count]
            if short:
                raise Failed(f"{short[0]} tokens instead of {count}")
        except Failed as error:
            self._fail(group, name, f"batch {len(prompts)}: {error}")
            del processes[name]
            return None
        return trace


def turn(names: list[str], index: int) -> list[str]:
    """Each round begins with another engine."""
    start = index % len(names) if names else 0
    return names[start:] + names[:start]


def _need(group: Group) -> float:
    """Bytes of an engine that keeps its file and half of it again in another layout, with its libraries."""
    return 1.5 * models.read_per_token(group.directory) * models.WEIGHT_BYTES[group.precision] + 1e9


def _progress(group: Group, batch: int, index: int, speeds: dict[str, list[figures.Speed]]) -> str:
    now = "  ".join(f"{name} {runs[-1].decode:.1f}" for name, runs in speeds.items())
    return f"{group.model} {group.precision} batch {batch} round {index + 1}, tokens/s: {now}"
