"""What a conversion would write and what the engine would cost, told without reading a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import groupby
from typing import Any

from builder.architecture import Architecture
from builder.checkpoint import Checkpoint
from builder.model_class import model_class
from builder.quantization import Quantized, nominal
from builder.tensorfile import Layout
from builder.tensors import NUMPY_DTYPES
from builder.trtllm.conversion import MAX_ELEMENTS, largest_weight, prepare, weights


@dataclass(frozen=True, kw_only=True)
class LayerPreview:
    """One layer of the output. Widths are of the whole model but `rank_width`; `elements` are a rank's."""

    members: tuple[int, ...]
    num_key_value_heads: int
    width: int
    padding: int  # channels of zeros in the width
    rank_width: int
    elements: int  # of the largest TensorRT weight
    headroom: float  # TensorRT's limit over `elements`


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a token costs, over all ranks."""

    layers: int
    attention_layers: int
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    all_reduces_per_token: int


@dataclass(frozen=True, kw_only=True)
class Preview:
    """`parent` is the model as it came, for the same ranks and dtypes."""

    architecture: str
    dtype: str
    tp_size: int
    pp_size: int
    rank_bytes: tuple[int, ...]
    layers: tuple[LayerPreview, ...]
    cost: Cost
    parent: Cost

    @property
    def largest(self) -> LayerPreview:
        """The layer nearest to TensorRT's limit."""
        return min(self.layers, key=lambda x: x.headroom)

    def describe(self) -> str:
        """The preview as a text; ranks and neighbouring layers that are alike share a line."""
        lines = [f"{self.architecture} for TP {self.tp_size}, PP {self.pp_size}, {self.dtype}", ""]
        lines += [
            f"rank {_span(ranks):8} {size:17,} bytes"
            for size, ranks in _alike(range(len(self.rank_bytes)), self.rank_bytes.__getitem__)
        ]
        lines += ["", _HEADER]
        lines += [
            _layer_line([self.layers[i] for i in indices], indices)
            for _, indices in _alike(range(len(self.layers)), lambda i: _figures(self.layers[i]))
        ]
        rows = (
            ("layers", self.parent.layers, self.cost.layers),
            ("with attention", self.parent.attention_layers, self.cost.attention_layers),
            ("parameters", self.parent.parameters, self.cost.parameters),
            ("weight bytes", self.parent.weight_bytes, self.cost.weight_bytes),
            ("KV bytes per token", self.parent.kv_bytes_per_token, self.cost.kv_bytes_per_token),
            ("all-reduces per token", self.parent.all_reduces_per_token, self.cost.all_reduces_per_token),
        )
        lines += ["", f"{'':21}  {'as it came':>17}  {'converted':>17}"]
        lines += [f"{name:21}  {before:17,}  {after:17,}" for name, before, after in rows]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The preview as plain values."""
        return asdict(self)


def preview(
    child: Checkpoint,
    parent: Checkpoint,
    *,
    tp_size: int,
    pp_size: int = 1,
    dtype: str | None = None,
    fused_mlp: bool = True,
    fp8: bool = False,
    fp8_kv_cache: bool = False,
) -> Preview:
    """What `convert(child, ...)` would write, beside `parent`. Raises UserError where it would fail."""
    whole = prepare(child, tp_size, pp_size, dtype, fused_mlp)
    quantized = nominal(whole, kv_cache=fp8_kv_cache) if fp8 else None
    return Preview(
        architecture=model_class(whole.architecture),
        dtype=whole.dtype,
        tp_size=tp_size,
        pp_size=pp_size,
        rank_bytes=_rank_bytes(whole, tp_size, pp_size, quantized),
        layers=tuple(_layers(child.architecture, whole.architecture, tp_size, fused_mlp)),
        cost=_cost(whole, tp_size, fp8, fp8_kv_cache),
        parent=_cost(parent.cast(whole.dtype), tp_size, fp8, fp8_kv_cache),
    )


def _rank_bytes(
    whole: Checkpoint, tp_size: int, pp_size: int, quantized: Quantized | None
) -> tuple[int, ...]:
    files = weights(whole, tp_size, pp_size, quantized)
    return tuple(Layout.of(tensors).num_bytes for tensors in files.values())


def _layers(asked: Architecture, whole: Architecture, tp_size: int, fused_mlp: bool) -> list[LayerPreview]:
    local = whole.shard(tp_size)
    rows = []
    for index, layer in enumerate(whole.layers):
        elements = largest_weight(local, index, fused_mlp)
        rows.append(
            LayerPreview(
                members=layer.members,
                num_key_value_heads=layer.num_key_value_heads,
                width=layer.intermediate_size,
                padding=layer.intermediate_size - asked.layers[index].intermediate_size,
                rank_width=local.layers[index].intermediate_size,
                elements=elements,
                headroom=MAX_ELEMENTS / max(1, elements),
            )
        )
    return rows


def _cost(checkpoint: Checkpoint, tp_size: int, fp8: bool, fp8_kv_cache: bool) -> Cost:
    a, element_bytes = checkpoint.architecture, NUMPY_DTYPES[checkpoint.dtype].itemsize
    if fp8:
        checkpoint = nominal(checkpoint).apply(checkpoint)
    return Cost(
        layers=len(a.layers),
        attention_layers=a.num_attention_layers,
        parameters=a.num_parameters,
        weight_bytes=sum(x.num_bytes for x in checkpoint.tensors.values()),
        kv_bytes_per_token=a.kv_cache_bytes_per_token(1 if fp8_kv_cache else element_bytes),
        all_reduces_per_token=a.all_reduces_per_token(tp_size),
    )


_HEADER = "layer    of the input  KV heads    width  padding   a rank  largest weight  of TensorRT's limit"


def _alike(items: Iterable[int], key: Callable[[int], Any]) -> list[tuple[Any, list[int]]]:
    """Neighbours with the same key, together."""
    return [(value, list(group)) for value, group in groupby(items, key)]


def _span(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


def _figures(layer: LayerPreview) -> tuple[object, ...]:
    # A fused layer has a line of its own.
    return (astuple(layer)[1:], layer.members if len(layer.members) > 1 else ())


def _layer_line(layers: list[LayerPreview], indices: list[int]) -> str:
    first = layers[0]
    members = [member for layer in layers for member in layer.members]
    return (
        f"{_span(indices):7}  {_span(members):>12}  {first.num_key_value_heads or '-':>8}  "
        f"{first.width or '-':>7}  {first.padding:>7}  {first.rank_width or '-':>7}  "
        f"{first.elements:14,}  {1 / first.headroom:19.1%}"
    )
