"""Tasks of lm-eval, found and run. Their files are code of the user's own: YAML may name Python functions.

Needs the extra `lm-eval`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from builder.errors import UserError
from builder.harness import Model

RESAMPLES = 1000  # for the standard errors that have no formula


class Tasks(TaskManager):
    """What lm-eval knows of; loads what is asked for, or refuses it by name."""

    def __init__(self, names: Sequence[str], directory: Path | None, shots: int | None, **more: Any) -> None:
        super().__init__(include_path=None if directory is None else str(directory), **more)
        self.names, self.shots, self.ready = list(names), shots, None

    def load(self, task_list: Any = None) -> Any:
        """lm-eval's table of the tasks; what `prepare` loaded is given away once, for lm-eval changes it."""
        loaded, self.ready = self.ready or self._load(), None
        return loaded

    def prepare(self) -> None:
        """Load before there is a model. Raises UserError, see `find_tasks`."""
        known = set(self.all_tasks)
        for name in self.names:
            if name not in known:
                raise UserError(
                    f"task: {name!r} is unknown; give --task-dir with its file, or one of lm-eval's"
                )
        self.ready = self._load()

    def _load(self) -> Any:
        try:
            loaded = super().load(self.names)
        except (OSError, ValueError, KeyError, ImportError) as error:  # of datasets, and of the task's file
            told = " ".join(str(error).split()) or type(error).__name__
            names = ", ".join(self.names)
            raise UserError(f"task {names}: {told}; put its data and packages on this machine") from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError(f"task {name}: runs code that the model writes; run it in lm-eval itself")
            if self.shots and task.get_config("num_fewshot") == 0:
                raise UserError(f"task {name}: has num_fewshot 0, which lm-eval keeps; leave out --shots")
        return loaded


def find_tasks(names: Sequence[str], directory: Path | None = None, shots: int | None = None) -> Tasks:
    """The tasks, and with them those of groups, loaded with their data.

    `directory` holds task files beside lm-eval's own; where it has all, those thousands of files are not
    read. Raises UserError on a task that is not known, whose data is not on this machine where it may not
    be fetched, or that runs code which a model writes.
    """
    with _quietly():
        tasks = Tasks(names, directory, shots, include_defaults=False)
        if not set(names) <= set(tasks.all_subtasks):
            tasks = Tasks(names, directory, shots)
        tasks.prepare()
    return tasks


def measure(model: Model, tasks: Tasks, *, limit: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Scores by task and metric: {task: {metric: {"value": x, "stderr": x or None}}}, as lm-eval has them."""
    with _quietly():
        found = evaluator.simple_evaluate(
            model=model,
            tasks=tasks.names,
            num_fewshot=tasks.shots,
            limit=limit,
            task_manager=tasks,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return {name: _metrics(values) for name, values in found["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's `acc,none` and `acc_stderr,none`."""
    metrics = {}
    for key, value in values.items():
        name, _, filtered = key.partition(",")
        if filtered and not name.endswith("_stderr") and isinstance(value, int | float):
            error = values.get(f"{name}_stderr,{filtered}")
            shown = name if filtered == "none" else f"{name} ({filtered})"
            metrics[shown] = {
                "value": float(value),
                "stderr": float(error) if isinstance(error, int | float) else None,
            }
    return metrics


@contextmanager
def _quietly() -> Iterator[None]:
    """lm-eval and datasets log what a user cannot act on."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [x.level for x in loggers]
    for x in loggers:
        x.setLevel(logging.ERROR)
    disable_progress_bar()
    try:
        yield
    finally:
        enable_progress_bar()
        for x, level in zip(loggers, levels, strict=True):
            x.setLevel(level)
