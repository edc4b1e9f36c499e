"""FP8 for TensorRT-LLM: e4m3 weights and the scales of weights, activations and the KV cache.

A scale is the largest magnitude over 448, so that x / scale fills e4m3's range. One scale serves a
whole module on all ranks: q, k and v share theirs, and so do gate and up, which the engine joins.
The embedding, the norms and lm_head keep their dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from builder.architecture import Attention, Layer
from builder.checkpoint import Change, Checkpoint, rewrite
from builder.errors import UserError
from builder.fp8 import FP8_MAX, Quantize, absolute_maximum
from builder.tensors import Constant, Expression
from builder.writer import Progress, default_threads

# The modules that share one weight scale, and the tensors whose largest magnitude decides it.
MODULES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("attention.qkv",): ("attention.q.weight", "attention.k.weight", "attention.v.weight"),
    ("attention.o",): ("attention.o.weight",),
    ("ffn.gate", "ffn.up"): ("ffn.gate.weight", "ffn.up.weight"),
    ("ffn.down",): ("ffn.down.weight",),
}
# The input that a module reads, by the name its largest magnitude is recorded under.
INPUTS = {
    "attention.qkv": "attention.qkv",
    "attention.o": "attention.o",
    "ffn.gate": "ffn.gate",
    "ffn.up": "ffn.gate",
    "ffn.down": "ffn.down",
}
KV = "attention.kv"

Amax = Mapping[str, float]  # "layers.N.MODULE" -> largest magnitude of its input, or of K and V


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Scales by "layers.N.MODULE"."""

    weights: Mapping[str, float]
    activations: Mapping[str, float]
    kv: Mapping[str, float] | None

    @property
    def kv_cache(self) -> bool:
        """Whether the KV cache is FP8 as well."""
        return self.kv is not None

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with e4m3 weights."""
        count = len(checkpoint.architecture.layers)
        return rewrite(checkpoint, {i: self._smaller(i) for i in range(count)}, "quant")

    def _smaller(self, index: int) -> Change:
        def change(layer: Layer, part: dict[str, Expression]) -> tuple[Layer, dict[str, Expression]]:
            smaller: dict[str, Expression] = {
                name: Quantize(part[name], self.weights[f"layers.{index}.{modules[0]}"])
                for modules, names in MODULES.items()
                for name in names
                if name in part
            }
            return layer, part | smaller

        return change

    def scales(self) -> dict[str, Expression]:
        """The scale tensors, float32 (1,), by the names they have beside `decoder_tensors`."""
        tensors: dict[str, Expression] = {}
        for name, scale in self.weights.items():
            tensors[f"{name}.weights_scaling_factor"] = _scalar(scale)
            tensors[f"{name}.activation_scaling_factor"] = _scalar(self.activations[name])
        for name, scale in (self.kv or {}).items():
            tensors[f"{name}.kv_cache_scaling_factor"] = _scalar(scale)
        return tensors


def _scalar(value: float) -> Constant:
    return Constant(np.array([value], np.float32), "float32")


def check(checkpoint: Checkpoint) -> None:
    """Raise UserError where a model cannot be written in FP8."""
    if checkpoint.dtype not in ("bfloat16", "float16"):
        raise UserError(
            f"quant: fp8 needs a 16-bit model, this one is {checkpoint.dtype}; give --dtype bfloat16"
        )
    if checkpoint.architecture.has_linear:
        raise UserError("quant: fp8 is not supported for layers whose attention or FFN is a matrix")


def quantize(
    checkpoint: Checkpoint,
    activations: Amax,
    *,
    kv_cache: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Quantized:
    """Scales for `checkpoint`; its weights are read once, `activations` are those of `calibrate`.

    Raises UserError for weights that are not finite.
    """
    check(checkpoint)
    shared = dict(_modules(checkpoint))
    names = [name for group in shared.values() for name in group]
    with ThreadPoolExecutor(threads or default_threads()) as pool:
        largest = dict(zip(names, pool.map(lambda n: _largest(checkpoint, n, progress), names), strict=True))
    weights: dict[str, float] = {}
    for modules, group in shared.items():
        weights |= dict.fromkeys(modules, _scale(max(largest[name] for name in group)))
    kv = None
    if kv_cache:
        # e4m3 is as precise at any magnitude above 2^-6, so a scale below 1 gains nothing.
        kv = {name: max(1.0, _scale(activations[f"{name}.kv"])) for name in _attentions(checkpoint)}
    return Quantized(
        weights=weights,
        activations={name: _scale(activations[_input(name)]) for name in weights},
        kv=kv,
    )


def _modules(checkpoint: Checkpoint) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    for index in range(len(checkpoint.architecture.layers)):
        part = checkpoint.layer(index)
        for modules, names in MODULES.items():
            if names[0] in part:
                prefix = f"layers.{index}."
                yield tuple(prefix + m for m in modules), [prefix + n for n in names]


def _attentions(checkpoint: Checkpoint) -> list[str]:
    layers = enumerate(checkpoint.architecture.layers)
    return [f"layers.{i}.attention" for i, x in layers if isinstance(x.attention, Attention)]


def _input(module: str) -> str:
    prefix, index, name = module.split(".", 2)
    return f"{prefix}.{index}.{INPUTS[name]}"


def _largest(checkpoint: Checkpoint, name: str, progress: Progress | None) -> float:
    x = checkpoint.tensors[name]
    largest = absolute_maximum(x)
    if not np.isfinite(largest):
        raise UserError(f"tensor {name}: holds {largest}, which FP8 cannot scale; repair the model")
    if progress:
        progress(x.num_bytes)
    return largest


def _scale(largest: float) -> float:
    """1 for what was always zero."""
    return float(np.float32(largest / FP8_MAX)) or 1.0


def nominal(checkpoint: Checkpoint, *, kv_cache: bool = False) -> Quantized:
    """Scales of 1, where only shapes and bytes matter."""
    check(checkpoint)
    names = [module for modules, _ in _modules(checkpoint) for module in modules]
    ones = dict.fromkeys(names, 1.0)
    kv = dict.fromkeys(_attentions(checkpoint), 1.0) if kv_cache else None
    return Quantized(weights=ones, activations=ones, kv=kv)
