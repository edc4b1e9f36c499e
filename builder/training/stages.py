"""The stages of a training: how many tokens of what context, by which loss and learning rate.

stages:
  - {tokens: 54e9, context: 8192}
  - {tokens: 5e9, context: 16384, learning_rate: 5e-5}
  - {tokens: 1e9, context: 8192, loss: supervised, data: [dialogues.jsonl]}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from builder.errors import UserError
from builder.training.loss import Weights

LOSSES = ("distill", "pretrain", "supervised")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Sizes count tokens; `batch_tokens` are those of one step over all ranks.

    `distill` is cosine * the distance of hidden states + kl * the divergence of logits; `pretrain` is the
    next token's loss, `supervised` that of the responses alone. `warmup` and `final` are shares of the
    steps and of the learning rate. With `separate_documents` no document of a sequence sees another. Raises
    UserError by key.
    """

    tokens: int
    context: int
    batch_tokens: int
    learning_rate: float
    warmup: float = 0.05
    final: float = 0.1
    loss: str = "distill"
    cosine: float = 1.0
    kl: float = 1.0
    temperature: float = 1.0
    separate_documents: bool = False
    data: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"loss: {self.loss!r} is not one of {', '.join(LOSSES)}")
        for name in ("tokens", "context", "learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: {getattr(self, name)} is not positive")
        for name in ("warmup", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: {getattr(self, name)} is not between 0 and 1")
        if self.cosine < 0 or self.kl < 0 or (self.loss == "distill" and not (self.cosine or self.kl)):
            raise UserError(
                f"cosine, kl: {self.cosine} and {self.kl} weigh no loss; give one a positive weight"
            )
        if self.batch_tokens < self.context:
            raise UserError(
                f"batch_tokens: {self.batch_tokens} holds no sequence of context {self.context}; give more"
            )

    @property
    def sequences(self) -> int:
        """Of one step over all ranks."""
        return self.batch_tokens // self.context

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / (self.sequences * self.context))

    @property
    def weights(self) -> Weights:
        if self.loss == "distill":
            return Weights(cosine=self.cosine, kl=self.kl, temperature=self.temperature)
        return Weights(cosine=0.0, kl=0.0, lm=1.0)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "data": list(self.data)}


KEYS = tuple(x.name for x in fields(Stage))


def read(file: Path, defaults: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The stages of a YAML file; what they leave out is in `defaults`. Raises UserError by stage and key."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    entries = values.get("stages") if isinstance(values, dict) else None
    if (
        not isinstance(values, dict)
        or set(values) != {"stages"}
        or not isinstance(entries, list)
        or not entries
    ):
        raise UserError(f"{file}: write `stages: [{{tokens: 54e9, context: 8192}}, ...]` and nothing else")
    return tuple(_stage(f"{file}: stage {number}", x, defaults) for number, x in enumerate(entries, start=1))


def _stage(where: str, entry: Any, defaults: Mapping[str, Any]) -> Stage:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: {entry!r} is not a mapping; write {{tokens: 54e9, context: 8192}}")
    for key in entry:
        if key not in KEYS:
            raise UserError(f"{where}: key {key!r} is unknown; keys are {', '.join(KEYS)}")
    for key in ("tokens", "context"):
        if key not in entry:
            raise UserError(f"{where}: has no {key}")
    try:
        return Stage(**{**defaults, **{key: _value(key, x) for key, x in entry.items()}})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _value(key: str, value: Any) -> Any:
    if key in ("tokens", "context", "batch_tokens"):
        return integer(key, value)
    if key == "loss":
        return value
    if key == "separate_documents":
        if not isinstance(value, bool):
            raise UserError(f"{key}: {value!r} is neither true nor false")
        return value
    if key == "data":
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            raise UserError(f"data: {value!r} is not a list of files")
        return tuple(value)
    return number(key, value)


def number(key: str, value: Any) -> float:
    """A finite number; YAML reads 54e9 as a string."""
    try:
        found = float(value) if isinstance(value, int | float | str) and type(value) is not bool else math.nan
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{key}: {value!r} is not a number")
    return found


def integer(key: str, value: Any) -> int:
    """`4096` or `54e9`."""
    found = number(key, value)
    if found != int(found):
        raise UserError(f"{key}: {value!r} is not a whole number")
    return int(found)


def check(stages: tuple[Stage, ...], positions: int, ranks: int) -> None:
    """Raise UserError where a stage is longer than `positions`, or its steps do not divide over the ranks."""
    for index, stage in enumerate(stages, start=1):
        if stage.context > positions:
            raise UserError(
                f"stage {index}: context {stage.context} is longer than max_position_embeddings {positions}; "
                "give a shorter one, or models with a longer rope"
            )
        if stage.sequences % ranks:
            raise UserError(
                f"stage {index}: {stage.sequences} sequences of {stage.context} tokens do not divide over "
                f"{ranks} ranks; give batch_tokens {-(-stage.sequences // ranks) * ranks * stage.context}"
            )


def at(stages: tuple[Stage, ...], step: int) -> tuple[int, int]:
    """The stage of a step of the whole training, and its step inside that stage."""
    for index, stage in enumerate(stages):
        if step < stage.steps:
            return index, step
        step -= stage.steps
    raise IndexError(step)


def with_data(stage: Stage, data: tuple[str, ...]) -> Stage:
    """The stage with files to read where it names none."""
    return stage if stage.data else replace(stage, data=data)
