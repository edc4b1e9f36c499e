"""What the parts of a model cost on this machine: differences between embedded engines that lack a part.

Engines with random weights of the model's sizes, alike but for a few more attentions or FFNs, decode in
turns; what more time a step takes, shared among the layers it has more, is a part's.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median

from builder import random_weights, trtllm
from builder.architecture import FFN, Architecture, Attention, Layer
from builder.checkpoint import Checkpoint, tensor_shapes
from builder.errors import UserError
from builder.huggingface import hf_name
from builder.search.measured import Table
from builder.tensors import Declared
from engines import mpi
from engines.embedded import compilation
from engines.embedded.request import Request
from engines.embedded.session import Session
from engines.manifest import Manifest

Report = Callable[[str], None]
Timer = Callable[[Path], float]
Part = tuple[str, int]  # "attention" and KV heads, or "ffn" and width

BASE: Part = ("base", 0)
_WARM_UP = 4  # steps that are not counted
_LARGEST_CACHE = 1 << 30
_RUNS = 5  # in one session
_START_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to measure, and how: sizes of the whole model, ascending; tokens; counts.

    `layers` are the base's, see `base_layers`; `copies` of a part are what an engine has more; `rounds`
    through all engines, `steps` decode steps timed in each. Raises UserError by field.
    """

    kv_heads: tuple[int, ...]
    widths: tuple[int, ...]
    tp_size: int = 1
    batch: int = 1
    context: int = 512
    dtype: str = "bfloat16"
    quant: str | None = None
    device: str = "cpu"
    layers: int = 1
    copies: int = 4
    rounds: int = 5
    steps: int = 32

    def __post_init__(self) -> None:
        if not self.kv_heads or not self.widths:
            raise UserError("profile: needs at least one number of KV heads and one width; give them")
        for name in ("tp_size", "batch", "layers", "copies", "rounds", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not positive; give at least 1")
        least = self.steps // 2 + _WARM_UP + 1
        if self.context < least:
            raise UserError(
                f"context: {self.context} is too short for {self.steps} steps; give at least {least}"
            )

    @property
    def prompt(self) -> int:
        """Tokens of a prompt, so that the mean context over the timed steps is `context`."""
        return self.context - self.steps // 2 - _WARM_UP

    @property
    def max_tokens(self) -> int:
        """Of a request: enough that none ends before the last one's steps are timed."""
        return 2 * (self.steps + _WARM_UP)

    @property
    def base(self) -> tuple[int, int]:
        """KV heads and width of the base's layers: those of a large model's, not the ladder's ends."""
        return self.kv_heads[-1], self.widths[len(self.widths) // 2]

    @property
    def parts(self) -> tuple[Part, ...]:
        attention: list[Part] = [("attention", heads) for heads in self.kv_heads]
        return (*attention, *(("ffn", width) for width in self.widths))


def ladder(widths: Sequence[int], max_width: int, multiple: int) -> tuple[int, ...]:
    """The model's own widths, fractions of its narrowest, and doublings of its widest up to `max_width`.

    All are rounded up to `multiple`, the ranks that FFNs are cut over.
    """
    rungs, low, high = {*widths, max_width}, min(widths), max(widths)
    rungs |= {max(1, low // share) for share in (2, 4, 16)}
    while (high := high * 2) < max_width:
        rungs.add(high)
    return rounded((x for x in rungs if x <= max_width), multiple)


def rounded(widths: Iterable[int], multiple: int) -> tuple[int, ...]:
    """Ascending, each rounded up to a multiple."""
    return tuple(sorted({-(-width // multiple) * multiple for width in widths}))


def engine_architecture(architecture: Architecture, wanted: Wanted, part: Part) -> Architecture:
    """`layers` of the base, and `copies` layers of `part` alone, none for BASE.

    Biases of q, k and v are left out: unlike layers cannot have them, and they cost next to nothing.
    """
    kind, size = part
    layers = [base_layer(*wanted.base, index) for index in range(wanted.layers)]
    for index in range(wanted.layers, wanted.layers + (wanted.copies if part != BASE else 0)):
        own = Attention(num_key_value_heads=size) if kind == "attention" else None
        ffn = FFN(intermediate_size=size) if kind == "ffn" else None
        layers.append(Layer(attention=own, ffn=ffn, members=(index,)))
    return replace(architecture, layers=tuple(layers))


def base_layer(num_key_value_heads: int, width: int, index: int = 0) -> Layer:
    """A whole layer."""
    attention = Attention(num_key_value_heads=num_key_value_heads)
    return Layer(attention=attention, ffn=FFN(intermediate_size=width), members=(index,))


def base_layers(architecture: Architecture, wanted: Wanted) -> int:
    """How many layers the base needs: as much to read as the model, but no more than caches can hold.

    A part's weights come from memory in a large model, so they must not lie in a cache here.
    """
    element_bytes = 4 if wanted.dtype == "float32" else 2
    layer = architecture.layer_parameters(base_layer(*wanted.base)) * element_bytes
    model = sum(map(architecture.layer_parameters, architecture.layers)) * element_bytes
    return max(1, -(-min(model, _LARGEST_CACHE) // layer))


def build(architecture: Architecture, wanted: Wanted, part: Part, output: Path) -> Manifest:
    """An engine with random weights that has more of `part` than the base."""
    sizes = engine_architecture(architecture, wanted, part)
    shapes = tensor_shapes(sizes)
    declared = Checkpoint(
        architecture=sizes,
        tensors={name: Declared(hf_name(name), shape, wanted.dtype) for name, shape in shapes.items()},
        dtype=wanted.dtype,
        digest=f"profile {part[0]} {part[1]}",
    )
    checkpoint = output.with_name(f"{output.name}-checkpoint")
    trtllm.convert(random_weights.randomised(declared, 0), checkpoint, tp_size=wanted.tp_size)
    manifest = compilation.build(
        checkpoint,
        output,
        max_batch_size=wanted.batch,
        max_input_len=wanted.prompt,
        max_seq_len=wanted.prompt + wanted.max_tokens,
        device=wanted.device,
        quant=wanted.quant,
    )
    shutil.rmtree(checkpoint)
    return manifest


def decode_seconds(engine: Path, wanted: Wanted) -> float:
    """A decode step of the whole batch: the median over several runs in a session started for it."""
    with Session(engine, start_timeout_s=_START_S) as session:
        return median(_mean_step(session, wanted) for _ in range(_RUNS))


def _mean_step(session: Session, wanted: Wanted) -> float:
    """Mean seconds of a step, over `steps` of them; a busy reader sees several at once, so not of each.

    The last request joins when all others run, so every step between two of its tokens is of all.
    """
    request = Request(input_ids=(1,) * wanted.prompt, max_tokens=wanted.max_tokens)
    generations = [session.generate(request) for _ in range(wanted.batch)]
    times: list[float] = []
    for _ in generations[-1]:
        times.append(time.perf_counter())
        if len(times) > _WARM_UP + wanted.steps:
            break
    for generation in generations:
        generation.close()
    return (times[-1] - times[_WARM_UP]) / wanted.steps


def rounds(engines: Mapping[Part, Path], count: int, timer: Timer, report: Report) -> list[dict[Part, float]]:
    """Seconds of a step of every engine, all of them in turn, `count` times over."""
    results = []
    for number in range(count):
        results.append({part: timer(engine) for part, engine in engines.items()})
        report(f"round {number + 1} of {count}: the base takes {results[-1][BASE] * 1e3:.3f} ms a step")
    return results


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Medians over the rounds, in seconds; `noise` is the largest spread of a part's figures."""

    parts: Mapping[Part, float]
    outside: float
    noise: float


def differences(results: Sequence[Mapping[Part, float]], wanted: Wanted) -> Measurement:
    """Each part's seconds, from engines of the same round. Raises UserError where one is lost in noise."""
    figures = {
        part: [(round_[part] - round_[BASE]) / wanted.copies for round_ in results] for part in wanted.parts
    }
    parts = {part: median(values) for part, values in figures.items()}
    own = zip(("attention", "ffn"), wanted.base, strict=True)
    outside = median(round_[BASE] for round_ in results) - wanted.layers * sum(parts[part] for part in own)
    noise = max(max(values) - min(values) for values in figures.values())
    if -noise * wanted.layers < outside <= 0:
        outside = 0.0  # what is left of the base is less than the noise
    named = {f"{kind} {size}": seconds for (kind, size), seconds in parts.items()}
    for name, value in {**named, "outside": outside}.items():
        if value < 0 or (value == 0 and name != "outside"):
            raise UserError(
                f"{name}: measured as {value * 1e6:.1f} us, with a noise of {noise * 1e6:.1f} us; use a "
                f"quiet machine, or more than --copies {wanted.copies} and --rounds {wanted.rounds}"
            )
    return Measurement(parts=parts, outside=outside, noise=noise)


def profile(
    architecture: Architecture,
    wanted: Wanted,
    work: Path,
    *,
    digest: str,
    report: Report | None = None,
    timer: Timer | None = None,
) -> Table:
    """Build the engines in the directory `work`, measure, and tabulate.

    `timer` gives an engine's seconds a step; by default `decode_seconds`. Raises UserError where a size
    does not fit the model, the ranks or the embedded engine, or where noise hides a part.
    """
    if wanted.tp_size > 1:
        mpi.launcher()  # says what is missing before anything is built
    say = report or (lambda line: None)
    engines: dict[Part, Path] = {}
    for part in (BASE, *wanted.parts):
        engines[part] = work / f"{part[0]}-{part[1]}"
        say(f"building {engines[part].name}")
        manifest = build(architecture, wanted, part, engines[part])
    results = rounds(engines, wanted.rounds, timer or (lambda engine: decode_seconds(engine, wanted)), say)
    found = differences(results, wanted)
    return Table(
        model=digest,
        **{name: getattr(architecture, name) for name in ("hidden_size", "num_attention_heads", "head_dim")},
        vocab_size=architecture.vocab_size,
        **{name: getattr(wanted, name) for name in ("tp_size", "batch", "context", "quant", "device")},
        dtype=manifest.dtype,
        outside=found.outside,
        attention=tuple((heads, found.parts["attention", heads]) for heads in wanted.kv_heads),
        ffn=tuple((width, found.parts["ffn", width]) for width in wanted.widths),
        noise=found.noise,
        hardware=manifest.hardware,
        versions={name: version(name) for name in ("ffn-fusion", "torch")},
        method={name: getattr(wanted, name) for name in ("layers", "copies", "rounds", "steps")},
    )
