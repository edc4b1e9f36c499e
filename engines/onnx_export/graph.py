"""One ONNX graph while it is being written: nodes under readable names, weights by reference.

Opset 18 is inside what TensorRT 10.0 parses (9 to 20, onnx-tensorrt docs/operators.md), and so is every
operator here in the types used. IR version 8 is that opset's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from builder.tensorfile import Layout
from builder.tensors import NUMPY_DTYPES, Array, Expression

OPSET = 18
IR_VERSION = 8
ELEMENT_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or output of a graph; a dimension is a number, or the name of one that varies."""

    name: str
    dtype: str
    shape: tuple[str | int, ...]

    def info(self) -> ValueInfoProto:
        """It as ONNX has it."""
        return helper.make_tensor_value_info(self.name, ELEMENT_TYPES[self.dtype], list(self.shape))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"dtype": self.dtype, "shape": list(self.shape)}


class Graph:
    """Nodes in order of computation. A node is called as its first result; results are names.

    `weights` are the tensors that nodes may name; only those named become initializers.
    """

    def __init__(self, dtype: str, weights: Mapping[str, Expression]) -> None:
        self.dtype = dtype
        self.inputs: dict[str, Port] = {}
        self.outputs: dict[str, Port] = {}
        self.nodes: list[NodeProto] = []
        self._weights = weights
        self._named: list[str] = []
        self._constants: dict[str, TensorProto] = {}

    def input(self, name: str, dtype: str, shape: Sequence[str | int]) -> str:
        """Declare an input, once."""
        self.inputs[name] = Port(name=name, dtype=dtype, shape=tuple(shape))
        return name

    def output(self, name: str, dtype: str, shape: Sequence[str | int]) -> str:
        """Declare that the result `name` leaves the graph."""
        self.outputs[name] = Port(name=name, dtype=dtype, shape=tuple(shape))
        return name

    def node(self, name: str, operator: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one result, `name`."""
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def split(self, names: Sequence[str], x: str, sizes: Sequence[int], axis: int) -> list[str]:
        """Cut `x` along an axis into parts of the given sizes."""
        inputs = [x, self.integers(*sizes)]
        self.nodes.append(helper.make_node("Split", inputs, list(names), name=names[0], axis=axis))
        return list(names)

    def cast(self, name: str, x: str, dtype: str, stored: str) -> str:
        """`x`, of dtype `stored`, in `dtype`; itself where nothing changes."""
        return x if dtype == stored else self.node(name, "Cast", x, to=ELEMENT_TYPES[dtype])

    def weight(self, name: str) -> str:
        """A tensor of the weights file."""
        assert name in self._weights, name
        if name not in self._named:
            self._named.append(name)
        return name

    def constant(self, name: str, values: Array) -> str:
        """Numbers that stand in the graph itself; one name always means the same numbers."""
        self._constants.setdefault(name, numpy_helper.from_array(np.asarray(values), name))
        return name

    def integers(self, *values: int) -> str:
        """An int64 vector, as shapes and axes are given."""
        return self.constant(f"ints.{'_'.join(map(str, values))}", np.array(values, np.int64))

    def integer(self, value: int) -> str:
        """An int64 scalar."""
        return self.constant(f"int.{value}", np.array(value, np.int64))

    def number(self, name: str, value: float, dtype: str) -> str:
        """A scalar of `dtype`, rounded to nearest."""
        raw = np.array(value, NUMPY_DTYPES[dtype]).tobytes()
        self._constants.setdefault(name, helper.make_tensor(name, ELEMENT_TYPES[dtype], [], raw, raw=True))
        return name

    def model(self, name: str, weights_file: str, layout: Layout) -> ModelProto:
        """The finished model; its weights lie in `weights_file` beside it, at `layout`'s offsets."""
        stored = [self._external(w, weights_file, layout.offsets[w]) for w in self._named]
        graph: GraphProto = helper.make_graph(
            self.nodes,
            name,
            [port.info() for port in self.inputs.values()],
            [port.info() for port in self.outputs.values()],
            [*self._constants.values(), *stored],
        )
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="ffn-fusion"
        )

    def _external(self, name: str, file: str, offset: int) -> TensorProto:
        x = self._weights[name]
        tensor = TensorProto(
            name=name,
            data_type=ELEMENT_TYPES[x.dtype],
            dims=x.shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (("location", file), ("offset", offset), ("length", x.num_bytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor
