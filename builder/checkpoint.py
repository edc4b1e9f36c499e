"""A checkpoint: an Architecture and the lazy tensors that belong to it, under one set of names.

embedding.weight                      [vocab_size, hidden_size]
layers.N.attention_norm.weight        [hidden_size]
layers.N.attention.{q,k,v}.weight     [heads * head_dim, hidden_size]
layers.N.attention.{q,k,v}.bias       [heads * head_dim], where the model has them
layers.N.attention.o.weight           [hidden_size, heads * head_dim]
layers.N.ffn_norm.weight              [hidden_size]
layers.N.ffn.{gate,up}.weight         [intermediate_size, hidden_size]
layers.N.ffn.down.weight              [hidden_size, intermediate_size]
layers.N.{attention,ffn}.linear.weight  [hidden_size, hidden_size], a matrix in the place of either
norm.weight                           [hidden_size]
lm_head.weight                        [vocab_size, hidden_size], absent when tied
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from builder.architecture import Architecture, Attention, Layer, Linear
from builder.arithmetic import cast
from builder.errors import UserError
from builder.tensors import FP8, Expression, concat

Tensors = Mapping[str, Expression]


def layer_shapes(architecture: Architecture, index: int) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of one layer, by their names inside the layer."""
    layer, hidden = architecture.layers[index], architecture.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    if layer.attention:
        shapes["attention_norm.weight"] = (hidden,)
    if isinstance(layer.attention, Linear):
        shapes["attention.linear.weight"] = (architecture.linear_size, hidden)
    elif layer.attention:
        q_size, kv_size = architecture.q_size, layer.num_key_value_heads * architecture.head_dim
        for name, rows in (("q", q_size), ("k", kv_size), ("v", kv_size)):
            shapes[f"attention.{name}.weight"] = (rows, hidden)
            if layer.attention.bias:
                shapes[f"attention.{name}.bias"] = (rows,)
        shapes["attention.o.weight"] = (hidden, q_size)
    if layer.ffn:
        shapes["ffn_norm.weight"] = (hidden,)
    if isinstance(layer.ffn, Linear):
        shapes["ffn.linear.weight"] = (architecture.linear_size, hidden)
    elif layer.ffn:
        width = layer.intermediate_size
        shapes["ffn.gate.weight"] = (width, hidden)
        shapes["ffn.up.weight"] = (width, hidden)
        shapes["ffn.down.weight"] = (hidden, width)
    return shapes


def tensor_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor name of a checkpoint and its shape."""
    hidden, vocab = architecture.hidden_size, architecture.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (vocab, hidden), "norm.weight": (hidden,)}
    if not architecture.tie_word_embeddings:
        shapes["lm_head.weight"] = (architecture.lm_head_size, hidden)
    for index in range(len(architecture.layers)):
        for name, shape in layer_shapes(architecture, index).items():
            shapes[f"layers.{index}.{name}"] = shape
    return shapes


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """`dtype` is that of all tensors but quantised ones; `digest` names the model it came from."""

    architecture: Architecture
    tensors: Tensors
    dtype: str
    digest: str

    def __post_init__(self) -> None:
        expected = tensor_shapes(self.architecture)
        for name in sorted(expected.keys() | self.tensors.keys()):
            if name not in self.tensors:
                raise UserError(f"tensor {name}: missing, {list(expected[name])} was expected")
            if name not in expected:
                raise UserError(f"tensor {name}: has no place in this architecture")
            x = self.tensors[name]
            if x.shape != expected[name]:
                raise UserError(
                    f"tensor {name}: shape {list(x.shape)}, but config.json says {list(expected[name])}"
                )
            assert x.dtype in (self.dtype, FP8), f"{name} is {x.dtype}"

    def layer(self, index: int) -> dict[str, Expression]:
        """One layer's tensors by their names inside the layer."""
        return {n: self.tensors[f"layers.{index}.{n}"] for n in layer_shapes(self.architecture, index)}

    def outside_layers(self) -> dict[str, Expression]:
        """Embedding, final norm and, if untied, lm_head."""
        return {n: x for n, x in self.tensors.items() if not n.startswith("layers.")}

    def cast(self, dtype: str) -> Checkpoint:
        """The same checkpoint in another dtype."""
        tensors = {name: cast(x, dtype) for name, x in self.tensors.items()}
        return Checkpoint(architecture=self.architecture, tensors=tensors, dtype=dtype, digest=self.digest)

    def decoder_tensors(self) -> dict[str, Expression]:
        """The tensors as `builder.decoder.Decoder` names them: q, k and v joined, lm_head always there."""
        joined = dict(self.tensors)
        for index, layer in enumerate(self.architecture.layers):
            if isinstance(layer.attention, Attention):
                prefix = f"layers.{index}.attention."
                for kind in ("weight", "bias")[: 1 + layer.attention.bias]:
                    parts = [joined.pop(f"{prefix}{n}.{kind}") for n in "qkv"]
                    joined[f"{prefix}qkv.{kind}"] = concat(parts, 0)
        joined.setdefault("lm_head.weight", joined["embedding.weight"])
        return joined


def assemble(
    checkpoint: Checkpoint,
    architecture: Architecture,
    layers: list[dict[str, Expression]],
    outside: dict[str, Expression] | None = None,
) -> Checkpoint:
    """A checkpoint from per-layer tensors; `outside` defaults to the old embedding, norm and lm_head."""
    tensors = dict(checkpoint.outside_layers() if outside is None else outside)
    for index, layer in enumerate(layers):
        tensors.update({f"layers.{index}.{name}": x for name, x in layer.items()})
    return Checkpoint(
        architecture=architecture, tensors=tensors, dtype=checkpoint.dtype, digest=checkpoint.digest
    )


Change = Callable[[Layer, dict[str, Expression]], tuple[Layer, dict[str, Expression]]]


def rewrite(checkpoint: Checkpoint, changes: Mapping[int, Change], key: str) -> Checkpoint:
    """The checkpoint with some layers changed, each by its own function of (layer, its tensors).

    Raises UserError for a layer the model does not have, and puts `key` and the layer before what a
    change raises.
    """
    if not changes:
        return checkpoint
    architecture = checkpoint.architecture
    for index in changes:
        if not 0 <= index < len(architecture.layers):
            last = len(architecture.layers) - 1
            raise UserError(f"{key}: layer {index} does not exist; the model has 0-{last}")
    layers, tensors = [], []
    for index, layer in enumerate(architecture.layers):
        part = checkpoint.layer(index)
        if index in changes:
            try:
                layer, part = changes[index](layer, part)
            except UserError as error:
                raise UserError(f"{key}: layer {index} {error}") from None
        layers.append(layer)
        tensors.append(part)
    return assemble(checkpoint, replace(architecture, layers=tuple(layers)), tensors)
