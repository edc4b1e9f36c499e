"""A rank's decoder cut where ranks must meet: ONNX has no all-reduce, so each ends a segment.

Results that one segment hands on keep their names in the next, so a runtime is a dictionary of tensors
per rank: run a segment on it, put its outputs back, let the ranks combine `partial` into `combined`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from builder.architecture import Architecture, Attention, Linear
from builder.surgery.parallel import check_sequential
from builder.tensors import Expression
from engines.onnx_export import blocks
from engines.onnx_export.blocks import Context
from engines.onnx_export.graph import Graph

SUM, CONCATENATE = "sum", "concatenate"


@dataclass(frozen=True, kw_only=True)
class Collective:
    """What the ranks do between two segments: `combined` = `operation` of every rank's `partial`."""

    operation: str  # SUM, or CONCATENATE along the last axis in the order of ranks
    partial: str
    combined: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"operation": self.operation, "partial": self.partial, "combined": self.combined}


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A graph and what follows it; None after the last."""

    graph: Graph
    collective: Collective | None


def cut(
    local: Architecture, weights: Mapping[str, Expression], dtype: str, tp_size: int
) -> tuple[Segment, ...]:
    """The segments of a rank's share `local`: one at TP 1, else one more than there are all-reduces.

    Raises UserError where blocks run in parallel.
    """
    check_sequential(local, "ONNX")
    writer = _Writer(local, weights, dtype, tp_size)
    for index, layer in enumerate(local.layers):
        if layer.attention:
            writer.attention(index, layer.attention)
        if layer.ffn:
            writer.ffn(index, layer.ffn)
    writer.logits()
    return tuple(writer.segments)


class _Writer:
    """Where the decoder stands: the graph being written, its `places` and the residual rows `x`."""

    def __init__(
        self, local: Architecture, weights: Mapping[str, Expression], dtype: str, tp_size: int
    ) -> None:
        self.local, self.weights, self.dtype, self.tp_size = local, weights, dtype, tp_size
        self.segments: list[Segment] = []
        self._begin()
        graph, hidden = self.graph, local.hidden_size
        tokens = graph.input("input_ids", "int64", ("batch", "tokens"))
        self.places = graph.node("places", "Shape", tokens)
        embedded = graph.node("embedding", "Gather", graph.weight("embedding.weight"), tokens, axis=0)
        self.x = blocks.rows(graph, "embedding.rows", embedded, hidden)

    def _begin(self) -> None:
        self.graph = Graph(self.dtype, self.weights)
        self._context: Context | None = None

    @property
    def context(self) -> Context:
        if self._context is None:
            self._context = Context.of(self.graph, self.local, self.places)
        return self._context

    def attention(self, index: int, part: Attention | Linear) -> None:
        """x + attention(norm(x))."""
        name = f"layers.{index}.attention"
        x = blocks.rms_norm(self.graph, f"{name}_norm", self.x, self.local.norm_eps)
        if isinstance(part, Linear):
            self._matrix(name, x)
        else:
            self._add(name, blocks.attention(self.graph, index, x, self.local, part, self.context), SUM)

    def ffn(self, index: int, part: object) -> None:
        """x + ffn(norm(x))."""
        name = f"layers.{index}.ffn"
        x = blocks.rms_norm(self.graph, f"{name}_norm", self.x, self.local.norm_eps)
        if isinstance(part, Linear):
            self._matrix(name, x)
        else:
            self._add(name, blocks.feed_forward(self.graph, name, x), SUM)

    def _matrix(self, name: str, x: str) -> None:
        self._add(name, blocks.linear(self.graph, f"{name}.linear", x), CONCATENATE)

    def _add(self, name: str, x: str, operation: str) -> None:
        """Add a part's rows to the residual, through the ranks where there are several."""
        if self.tp_size > 1:
            x = self._cross(name, x, operation)
        self.x = self.graph.node(f"{name}.added", "Add", self.x, x)

    def _cross(self, name: str, x: str, operation: str) -> str:
        """End the segment with the residual and the partial rows `x`; the next begins with both."""
        graph, hidden = self.graph, self.local.hidden_size
        residual, partial, combined = (f"{name}.{what}" for what in ("residual", "partial", "combined"))
        width = self.local.linear_size if operation == CONCATENATE else hidden
        for result, source, size in ((residual, self.x, hidden), (partial, x, width)):
            blocks.unrows(graph, result, source, self.places, size)
            graph.output(result, self.dtype, ("batch", "tokens", size))
        collective = Collective(operation=operation, partial=partial, combined=combined)
        self.segments.append(Segment(graph=graph, collective=collective))
        self._begin()
        for given in (residual, combined):
            self.graph.input(given, self.dtype, ("batch", "tokens", hidden))
        self.places = self.graph.node("places", "Shape", residual, end=2)
        self.x = blocks.rows(self.graph, f"{residual}.rows", residual, hidden)
        return blocks.rows(self.graph, f"{combined}.rows", combined, hidden)

    def logits(self) -> None:
        """norm and lm_head of the tokens at `logits_index` [batch, wanted], in float32."""
        graph, hidden, size = self.graph, self.local.hidden_size, self.local.lm_head_size
        wanted = graph.input("logits_index", "int64", ("batch", "wanted"))
        whole = blocks.unrows(graph, "last", self.x, self.places, hidden)
        indices = graph.node("logits_index.column", "Unsqueeze", wanted, graph.integers(2))
        chosen = graph.node("last.wanted", "GatherND", whole, indices, batch_dims=1)
        x = blocks.rows(graph, "last.rows", chosen, hidden)
        x = blocks.linear(graph, "lm_head", blocks.rms_norm(graph, "norm", x, self.local.norm_eps))
        x = graph.cast("lm_head.wide", x, "float32", self.dtype)
        shape = graph.node("logits_index.shape", "Shape", wanted)
        blocks.unrows(graph, "logits", x, shape, size)
        graph.output("logits", "float32", ("batch", "wanted", size))
        self.segments.append(Segment(graph=graph, collective=None))
