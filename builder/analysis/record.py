"""analysis.json: what `analyze` found out, as `plan` and the report read it.

KL is KL(parent || child) in nats per token; distances are cosine distances, 0 to 2, means over tokens.
Layers are those of the input model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from builder.errors import UserError
from builder.storage import read_json
from builder.tensorfile import read_header

VERSION = 1
FILE = "analysis.json"
CHANNELS = "channels.safetensors"

T = TypeVar("T")
Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Data:
    """The calibration text: `samples` pieces of `length` tokens, chosen by `seed`."""

    files: tuple[str, ...]
    samples: int
    length: int
    seed: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The model as it is."""

    perplexity: float


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Of the layer's output, the distance with and without a part; of the logits, the divergence."""

    cosine: float
    kl: float


@dataclass(frozen=True, kw_only=True)
class Explain:
    """Of x, the block's output f(x) and its contribution h(x) = f(x) - x."""

    input_output: float  # cosdist(x, f(x))
    ratio: float  # |h(x)| / |x|
    input_contribution: float  # cosdist(x, h(x))


@dataclass(frozen=True, kw_only=True)
class KVHead:
    """Norms of a head's K and V, and how far they are from the mean of all heads, as a share of the norm."""

    k_norm: float
    v_norm: float
    k_spread: float
    v_spread: float


@dataclass(frozen=True, kw_only=True)
class LayerAnalysis:
    """`attention`, `ffn` and `kv_heads` are None where the layer has none."""

    attention: Importance | None
    ffn: Importance | None
    block: Importance
    explain: Explain
    kv_heads: tuple[KVHead, ...] | None


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """One part of the parent in another size: KV heads or width left, 0 for none."""

    layer: int
    part: Literal["attention", "ffn"]
    size: int
    kl: float


@dataclass(frozen=True, kw_only=True)
class Dependency:
    """[i][j]: cosdist of block j's contribution with and without block i; 0 for j <= i.

    `dropped` is of the model after the planned drops, None without any.
    """

    model: Matrix
    dropped: Matrix | None


@dataclass(frozen=True, kw_only=True)
class Window:
    """Full blocks `first` to `last`, with the largest entry and the sum of their part of the dependency."""

    first: int
    last: int
    max: float
    sum: float


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How near a model is to the undropped parent; `top1` is the share of tokens with the same likeliest."""

    kl: float
    perplexity: float
    top1: float


@dataclass(frozen=True, kw_only=True)
class GroupAnalysis:
    """A run of FFNs one after the other, on one input, in reversed order, and gone.

    `fused_with_last` fuses the FFN that follows the group in its run as well, None where there is none.
    """

    first: int
    last: int
    sequential: Fidelity
    fused: Fidelity
    reversed: Fidelity
    removed: Fidelity
    fused_with_last: Fidelity | None


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """Blocks that were run, once for each batch: what the analysis cost."""

    dependency: int  # the model and every dropped block: at most m (m + 1) / 2 a batch
    dependency_dropped: int
    importance: int  # attentions and FFNs dropped alone
    alternatives: int
    groups: int
    statistics: int


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The content of analysis.json; `model` is `Checkpoint.digest`."""

    model: str
    num_layers: int
    data: Data
    baseline: Baseline
    layers: tuple[LayerAnalysis, ...]
    alternatives: tuple[Alternative, ...]
    planned_drops: tuple[int, ...]
    dependency: Dependency
    windows: tuple[Window, ...]
    groups: tuple[GroupAnalysis, ...]
    evaluations: Evaluations
    channels: str = CHANNELS
    version: int = VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `read` reads them back."""
        return asdict(self)


def read(path: Path) -> Analysis:
    """Read analysis.json, given itself or its directory.

    Raises UserError where it is missing, broken or of another version.
    """
    file = path / FILE if path.is_dir() else path
    values = read_json(file)
    version = values.get("version")
    if version != VERSION:
        raise UserError(f"{file}: version {version!r}, this release reads {VERSION}; run `analyze` again")
    try:
        analysis = _analysis(values)
        _check(analysis)
    except _BrokenError as error:
        raise UserError(f"{file}: {error}; run `analyze` again") from None
    return analysis


def read_channels(path: Path) -> dict[int, np.ndarray]:
    """By layer, mean |activation| x norm of the down column of every FFN channel, [width] in float32.

    `path` is the directory of an analysis, or its analysis.json. Raises UserError on a broken file.
    """
    file = (path if path.is_dir() else path.parent) / CHANNELS
    channels = {}
    for name, source in read_header(file).items():
        _, layer, part = (*name.split("."), "", "")[:3]
        if not layer.isdecimal() or part != "ffn" or len(source.shape) != 1:
            raise UserError(f"{file}: tensor {name!r} is not layers.N.ffn; run `analyze` again")
        channels[int(layer)] = source.read_all()
        if not np.isfinite(channels[int(layer)]).all():
            raise UserError(f"{file}: {name} has numbers that are not finite; run `analyze` again")
    return dict(sorted(channels.items()))


def _check(analysis: Analysis) -> None:
    """That the parts fit one another."""
    count = analysis.num_layers
    if len(analysis.layers) != count:
        raise _BrokenError(f"{len(analysis.layers)} layers, num_layers says {count}")
    for name, matrix in (("model", analysis.dependency.model), ("dropped", analysis.dependency.dropped)):
        if matrix is not None and len(matrix) != count:
            raise _BrokenError(f"dependency.{name} has {len(matrix)} rows for {count} layers")
    runs = [(x.first, x.last) for x in analysis.windows] + [(x.first, x.last) for x in analysis.groups]
    named = (
        *analysis.planned_drops,
        *(x.layer for x in analysis.alternatives),
        *(i for x in runs for i in x),
    )
    wrong = next((i for i in named if not 0 <= i < count), None)
    if wrong is not None:
        raise _BrokenError(f"layer {wrong!r} does not exist, there are 0-{count - 1}")
    if any(x.size < 0 for x in analysis.alternatives):
        raise _BrokenError("an alternative has a size below 0")


class _BrokenError(Exception):
    """A value that `to_dict` cannot have written."""


def _analysis(values: dict[str, Any]) -> Analysis:
    return _make(
        Analysis,
        values,
        data=lambda x: _make(Data, x, files=lambda y: _tuple(y, str)),
        baseline=lambda x: _make(Baseline, x),
        layers=lambda x: _tuple(x, _layer),
        alternatives=lambda x: _tuple(x, lambda y: _make(Alternative, y, part=_part)),
        planned_drops=lambda x: _tuple(x, int),
        dependency=lambda x: _make(Dependency, x, model=_matrix, dropped=_optional(_matrix)),
        windows=lambda x: _tuple(x, lambda y: _make(Window, y)),
        groups=lambda x: _tuple(x, _group),
        evaluations=lambda x: _make(Evaluations, x),
    )


def _part(value: Any) -> Any:
    if value not in ("attention", "ffn"):
        raise _BrokenError(f"part is {value!r}, not attention or ffn")
    return value


def _layer(values: Any) -> LayerAnalysis:
    importance = _optional(lambda x: _make(Importance, x))
    return _make(
        LayerAnalysis,
        values,
        attention=importance,
        ffn=importance,
        block=lambda x: _make(Importance, x),
        explain=lambda x: _make(Explain, x),
        kv_heads=_optional(lambda x: _tuple(x, lambda y: _make(KVHead, y))),
    )


def _group(values: Any) -> GroupAnalysis:
    names = ("sequential", "fused", "reversed", "removed")
    measured: dict[str, Callable[[Any], Any]] = {n: lambda x: _make(Fidelity, x) for n in names}
    last = _optional(lambda x: _make(Fidelity, x))
    return _make(GroupAnalysis, values, fused_with_last=last, **measured)


_LARGEST = 1e300
_PLAIN: dict[str, tuple[type, ...]] = {"float": (int, float), "int": (int,), "str": (str,)}


def _make(kind: type[T], values: Any, **readers: Callable[[Any], Any]) -> T:
    """A dataclass of plain fields, and of others by their own readers."""
    names = {field.name: str(field.type) for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(values, dict) or set(values) != set(names):
        wrong = sorted(set(values) ^ set(names))[0] if isinstance(values, dict) else kind.__name__
        raise _BrokenError(f"{wrong!r} is missing or unknown")
    for name, annotation in names.items():
        types = _PLAIN.get(annotation)
        if types and (not isinstance(values[name], types) or isinstance(values[name], bool)):
            raise _BrokenError(f"{name} is {repr(values[name])[:40]}, not a {annotation}")
        if annotation == "float" and not _is_sound(name, values[name]):
            raise _BrokenError(f"{name} is {repr(values[name])[:40]}, which nothing measures")
    return kind(**{name: readers[name](x) if name in readers else x for name, x in values.items()})


def _is_sound(name: str, value: float) -> bool:
    """Finite, and a KL not below 0 by more than rounding."""
    return -_LARGEST < value < _LARGEST and (name != "kl" or value > -1e-3)


def _optional(reader: Callable[[Any], T]) -> Callable[[Any], T | None]:
    return lambda value: None if value is None else reader(value)


def _tuple(value: Any, reader: Callable[[Any], T]) -> tuple[T, ...]:
    if not isinstance(value, list):
        raise _BrokenError(f"{str(value)[:40]!r} is not a list")
    if isinstance(reader, type) and not all(type(x) is reader for x in value):
        raise _BrokenError(f"{str(value)[:40]!r} is not a list of {reader.__name__}")
    return tuple(reader(x) for x in value)


def _matrix(value: Any) -> Matrix:
    rows = _tuple(value, lambda row: _tuple(row, _number))
    if any(len(row) != len(rows) for row in rows):
        raise _BrokenError("dependency is not square")
    return rows


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _BrokenError(f"{str(value)[:40]!r} is not a number")
    if not _is_sound("dependency", value):
        raise _BrokenError(f"dependency has {str(value)[:40]}, which nothing measures")
    return float(value)
