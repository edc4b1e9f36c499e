"""The parts of a decoder as ONNX nodes: what `builder.decoder` computes, operator by operator.

Hidden states are rows [batch * tokens, hidden_size], so that Gemm takes the weights as they are stored,
[out, in]. Attention is MatMul, Where, Softmax, MatMul with the scale on Q before the first, the form
TensorRT asks of attention to be fused (developer guide, "Fused Attention").
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from builder.architecture import Architecture, Attention
from engines.onnx_export.graph import Graph

_LOWEST = float(np.finfo(np.float32).min)  # not -inf: a row that sees nothing stays finite


def rows(graph: Graph, name: str, x: str, width: int) -> str:
    """[batch, tokens, width] as rows."""
    return graph.node(name, "Reshape", x, graph.integers(-1, width))


def unrows(graph: Graph, name: str, x: str, places: str, width: int) -> str:
    """Rows as [*places, width]; `places` is a shape vector such as [batch, tokens]."""
    shape = graph.node(f"{name}.shape", "Concat", places, graph.integers(width), axis=0)
    return graph.node(name, "Reshape", x, shape)


def linear(graph: Graph, name: str, x: str, *, bias: bool = False) -> str:
    """x @ weight.T + bias."""
    biases = [graph.weight(f"{name}.bias")] if bias else []
    return graph.node(name, "Gemm", x, graph.weight(f"{name}.weight"), *biases, transB=1)


def rms_norm(graph: Graph, name: str, x: str, eps: float) -> str:
    """x / rms(x) * weight, the statistics in float32."""
    wide = graph.cast(f"{name}.wide", x, "float32", graph.dtype)
    square = graph.node(f"{name}.square", "Mul", wide, wide)
    mean = graph.node(f"{name}.mean", "ReduceMean", square, graph.integers(-1), keepdims=1)
    shifted = graph.node(f"{name}.shifted", "Add", mean, graph.number("rms_norm.eps", eps, "float32"))
    rms = graph.node(f"{name}.rms", "Sqrt", shifted)
    normal = graph.node(f"{name}.normal", "Div", wide, rms)
    narrow = graph.cast(f"{name}.narrow", normal, graph.dtype, "float32")
    return graph.node(name, "Mul", graph.weight(f"{name}.weight"), narrow)


def feed_forward(graph: Graph, name: str, x: str) -> str:
    """SwiGLU: down(silu(gate(x)) * up(x))."""
    gate = linear(graph, f"{name}.gate", x)
    up = linear(graph, f"{name}.up", x)
    sigmoid = graph.node(f"{name}.sigmoid", "Sigmoid", gate)
    silu = graph.node(f"{name}.silu", "Mul", gate, sigmoid)
    return linear(graph, f"{name}.down", graph.node(f"{name}.product", "Mul", silu, up))


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the attention layers of a graph share.

    `places` is the shape [batch, tokens]; `cos` and `sin` are [batch, tokens, 1, head_dim / 2]; `mask`
    is [batch, 1, tokens, total], true where a token may look.
    """

    places: str
    cos: str
    sin: str
    mask: str
    grouped_masks: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Graph, architecture: Architecture, places: str) -> Context:
        """Declare position_ids and attention_mask, and compute it from them."""
        cos, sin = _angles(graph, architecture)
        return cls(places=places, cos=cos, sin=sin, mask=_mask(graph, places))

    def grouped_mask(self, graph: Graph, group: int) -> str:
        """The mask of `group` query heads below each other: [batch, 1, group * tokens, total]."""
        if group == 1:
            return self.mask
        if group not in self.grouped_masks:
            copies = [self.mask] * group
            self.grouped_masks[group] = graph.node(f"mask.{group}_heads", "Concat", *copies, axis=2)
        return self.grouped_masks[group]


def _angles(graph: Graph, architecture: Architecture) -> tuple[str, str]:
    """cos and sin of position * frequency, in float32 until the last rounding."""
    from builder.decoder import rope_frequencies

    rope = architecture.rope
    frequencies = rope_frequencies(rope, architecture.head_dim).numpy()
    positions = graph.input("position_ids", "int64", ("batch", "tokens"))
    wide = graph.cast("rope.positions", positions, "float32", "int64")
    column = graph.node("rope.column", "Unsqueeze", wide, graph.integers(2, 3))
    angles = graph.node("rope.angles", "Mul", column, graph.constant("rope.frequencies", frequencies))
    results = []
    for operator in ("Cos", "Sin"):
        name = f"rope.{operator.lower()}"
        x = graph.node(f"{name}.wide", operator, angles)
        if rope.magnitude != 1.0:
            magnitude = graph.number("rope.magnitude", rope.magnitude, "float32")
            x = graph.node(f"{name}.magnified", "Mul", x, magnitude)
        results.append(graph.cast(name, x, graph.dtype, "float32"))
    return results[0], results[1]


def _mask(graph: Graph, places: str) -> str:
    """A token looks at the columns of the cache up to its own that attention_mask has not zeroed."""
    given = graph.input("attention_mask", "int64", ("batch", "total"))
    first, one = graph.integer(0), graph.integer(1)
    shape = graph.node("mask.shape", "Shape", given)
    total = graph.node("mask.total", "Gather", shape, one, axis=0)
    tokens = graph.node("mask.tokens", "Gather", places, one, axis=0)
    past = graph.node("mask.past", "Sub", total, tokens)
    columns = graph.node("mask.columns", "Range", first, total, one)
    own = graph.node("mask.own", "Range", past, total, one)
    own_column = graph.node("mask.own_column", "Unsqueeze", own, graph.integers(1))
    causal = graph.node("mask.causal", "LessOrEqual", columns, own_column)  # [tokens, total]
    kept = graph.cast("mask.kept", given, "bool", "int64")
    kept_rows = graph.node("mask.kept_rows", "Unsqueeze", kept, graph.integers(1, 2))
    return graph.node("mask", "And", kept_rows, causal)


def rotate(graph: Graph, name: str, x: str, context: Context, head_dim: int) -> str:
    """Rotate pairs (i, i + head_dim/2) of [batch, tokens, heads, head_dim]."""
    halves = (f"{name}.first", f"{name}.second")
    first, second = graph.split(halves, x, [head_dim // 2] * 2, axis=3)
    products = {
        f"{left}_{right}": graph.node(f"{name}.{left}_{right}", "Mul", x, y)
        for left, x in (("first", first), ("second", second))
        for right, y in (("cos", context.cos), ("sin", context.sin))
    }
    low = graph.node(f"{name}.low", "Sub", products["first_cos"], products["second_sin"])
    high = graph.node(f"{name}.high", "Add", products["second_cos"], products["first_sin"])
    return graph.node(name, "Concat", low, high, axis=3)


def attention(
    graph: Graph, index: int, x: str, architecture: Architecture, part: Attention, context: Context
) -> str:
    """Causal grouped-query attention of layer `index`; declares its cache, past.N.* and present.N.*.

    The query heads of one KV head become further query rows, so K and V are never repeated.
    """
    name = f"layers.{index}.attention"
    kv, size = part.num_key_value_heads, architecture.head_dim
    group = architecture.num_attention_heads // kv
    q, k, v = _heads(graph, name, x, architecture, part, context)
    keys = _cached(graph, f"{index}.key", k, kv, size)
    values = _cached(graph, f"{index}.value", v, kv, size)
    scale = graph.number("attention.scale", size**-0.5, graph.dtype)
    scaled = graph.node(f"{name}.q.scaled", "Mul", q, scale)
    grouped = graph.node(f"{name}.q.grouped", "Reshape", scaled, graph.integers(0, 0, kv, group, size))
    turned = graph.node(f"{name}.q.turned", "Transpose", grouped, perm=[0, 2, 3, 1, 4])
    queries = graph.node(f"{name}.q.rows", "Reshape", turned, graph.integers(0, 0, -1, size))
    mask = context.grouped_mask(graph, group)
    out = _looked_up(graph, name, queries, keys, values, mask)  # [batch, kv, group * tokens, size]
    apart = graph.node(f"{name}.apart", "Reshape", out, graph.integers(0, 0, group, -1, size))
    back = graph.node(f"{name}.back", "Transpose", apart, perm=[0, 3, 1, 2, 4])
    return linear(graph, f"{name}.o", rows(graph, f"{name}.joined", back, architecture.q_size))


def _heads(
    graph: Graph, name: str, x: str, architecture: Architecture, part: Attention, context: Context
) -> list[str]:
    """Rotated q and k, and v: [batch, tokens, heads, head_dim]."""
    q_heads, kv, size = architecture.num_attention_heads, part.num_key_value_heads, architecture.head_dim
    joined = linear(graph, f"{name}.qkv", x, bias=part.bias)
    shape = graph.node(
        f"{name}.qkv.shape", "Concat", context.places, graph.integers(q_heads + 2 * kv, size), axis=0
    )
    heads = graph.node(f"{name}.qkv.heads", "Reshape", joined, shape)
    qk, v = graph.split((f"{name}.qk", f"{name}.v"), heads, (q_heads + kv, kv), axis=2)
    rotated = rotate(graph, f"{name}.rotated", qk, context, size)
    return [*graph.split((f"{name}.q", f"{name}.k"), rotated, (q_heads, kv), axis=2), v]


def _cached(graph: Graph, name: str, x: str, heads: int, size: int) -> str:
    """What was kept, and behind it x [batch, tokens, heads, size]: [batch, heads, total, size]."""
    past = graph.input(f"past.{name}", graph.dtype, ("batch", heads, "past", size))
    new = graph.node(f"new.{name}", "Transpose", x, perm=[0, 2, 1, 3])
    present = graph.node(f"present.{name}", "Concat", past, new, axis=2)
    return graph.output(present, graph.dtype, ("batch", heads, "total", size))


def _looked_up(graph: Graph, name: str, queries: str, keys: str, values: str, mask: str) -> str:
    """softmax(queries @ keys.T where mask) @ values, the softmax in float32."""
    turned = graph.node(f"{name}.keys", "Transpose", keys, perm=[0, 1, 3, 2])
    scores = graph.node(f"{name}.scores", "MatMul", queries, turned)
    wide = graph.cast(f"{name}.scores.wide", scores, "float32", graph.dtype)
    lowest = graph.number("attention.lowest", _LOWEST, "float32")
    masked = graph.node(f"{name}.scores.masked", "Where", mask, wide, lowest)
    softmax = graph.node(f"{name}.softmax", "Softmax", masked, axis=-1)
    weights = graph.cast(f"{name}.weights", softmax, graph.dtype, "float32")
    return graph.node(f"{name}.out", "MatMul", weights, values)
