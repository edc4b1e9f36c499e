"""A decoder whose layers may differ, and every count derived from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from builder.errors import UserError
from builder.rope import Rope


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query attention; query heads are the model's, KV heads the layer's own."""

    num_key_value_heads: int
    bias: bool = False  # of q, k and v


@dataclass(frozen=True, kw_only=True)
class FFN:
    """A SwiGLU feed-forward network: down(silu(gate(x)) * up(x))."""

    intermediate_size: int


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One [hidden_size, hidden_size] matrix in the place of an attention or an FFN."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """x + attention(norm(x)), then x + ffn(norm(x)); either part may be absent, or a matrix."""

    attention: Attention | Linear | None
    ffn: FFN | Linear | None
    members: tuple[int, ...]  # layers of the input model that this one holds

    @property
    def num_key_value_heads(self) -> int:
        """0 where no K and V are kept."""
        return self.attention.num_key_value_heads if isinstance(self.attention, Attention) else 0

    @property
    def intermediate_size(self) -> int:
        """0 where there is no SwiGLU."""
        return self.ffn.intermediate_size if isinstance(self.ffn, FFN) else 0

    @property
    def empty(self) -> bool:
        """Whether the layer passes its input on."""
        return self.attention is None and self.ffn is None


Window = tuple[int, int]  # first and last layer, inclusive


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A pre-norm decoder. Sizes count elements; a rank's share is an Architecture as well."""

    hidden_size: int
    num_attention_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    layers: tuple[Layer, ...] = field(repr=False)
    lm_head_rows: int | None = None  # a rank's share of the vocabulary; None is all of it
    linear_rows: int | None = None  # a rank's share of every Linear; None is all of it
    parallel: tuple[Window, ...] = ()  # the layers of a window all read its input: builder.surgery.parallel

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "num_attention_heads",
            "head_dim",
            "vocab_size",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not a positive number")
        for index, layer in enumerate(self.layers):
            kv = layer.num_key_value_heads
            if isinstance(layer.attention, Attention) and (kv < 1 or self.num_attention_heads % kv):
                raise UserError(
                    f"layer {index}: num_key_value_heads {kv} does not divide "
                    f"num_attention_heads {self.num_attention_heads}"
                )
            if isinstance(layer.ffn, FFN) and layer.intermediate_size < 1:
                raise UserError(f"layer {index}: intermediate_size {layer.intermediate_size} is not positive")
        _check_windows(self.parallel, len(self.layers))

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def lm_head_size(self) -> int:
        """Rows of lm_head."""
        return self.vocab_size if self.lm_head_rows is None else self.lm_head_rows

    @property
    def linear_size(self) -> int:
        """Rows of a Linear."""
        return self.hidden_size if self.linear_rows is None else self.linear_rows

    @property
    def has_linear(self) -> bool:
        """Whether a matrix stands in the place of some attention or FFN."""
        return any(isinstance(part, Linear) for x in self.layers for part in (x.attention, x.ffn))

    @property
    def num_attention_layers(self) -> int:
        """Layers that keep K and V."""
        return sum(isinstance(layer.attention, Attention) for layer in self.layers)

    @property
    def uniform(self) -> bool:
        """Whether all layers are alike and whole, as LlamaForCausalLM and Qwen2ForCausalLM need them."""
        first = self.layers[0]
        whole = isinstance(first.attention, Attention) and isinstance(first.ffn, FFN)
        return whole and all((x.attention, x.ffn) == (first.attention, first.ffn) for x in self.layers)

    @property
    def attention_bias(self) -> bool:
        """Whether some layer's q, k and v have biases."""
        return any(isinstance(x.attention, Attention) and x.attention.bias for x in self.layers)

    @property
    def steps(self) -> tuple[range, ...]:
        """The layers in the order they are computed: one at a time, those of a parallel window together."""
        last_of = dict(self.parallel)
        steps: list[range] = []
        while (first := steps[-1].stop if steps else 0) < len(self.layers):
            steps.append(range(first, last_of.get(first, first) + 1))
        return tuple(steps)

    def attention_free_runs(self) -> Iterator[tuple[int, int]]:
        """Maximal runs (first, last) of FFNs with no attention between them; empty layers do not end one.

        Parallel windows do: their layers are in no run.
        """
        run: list[int] = []
        windowed = {i for first, last in self.parallel for i in range(first, last + 1)}
        for index, layer in enumerate((*self.layers, None)):
            outside = None if index in windowed else layer
            if outside is not None and outside.empty:
                continue
            if outside is not None and outside.attention is None and isinstance(outside.ffn, FFN):
                run.append(index)
            elif run:
                yield run[0], run[-1]
                run = []

    def layer_parameters(self, layer: Layer) -> int:
        """Weights of one layer, its norms and biases among them."""
        hidden, matrix = self.hidden_size, self.hidden_size * self.linear_size
        count = hidden * ((layer.attention is not None) + (layer.ffn is not None))
        if isinstance(layer.attention, Attention):
            kv_size = layer.num_key_value_heads * self.head_dim
            count += hidden * (2 * self.q_size + 2 * kv_size)
            count += layer.attention.bias * (self.q_size + 2 * kv_size)
        count += matrix * (isinstance(layer.attention, Linear) + isinstance(layer.ffn, Linear))
        return count + 3 * hidden * layer.intermediate_size

    @property
    def num_parameters(self) -> int:
        """All weights; a tied lm_head counts once."""
        lm_head = 0 if self.tie_word_embeddings else self.lm_head_size
        embeddings = (self.vocab_size + lm_head) * self.hidden_size
        return embeddings + self.hidden_size + sum(self.layer_parameters(layer) for layer in self.layers)

    def flops_per_token(self) -> int:
        """Multiply-adds x 2 of the linear layers for one token; attention over the cache not counted."""
        vectors = self.hidden_size * (
            1 + sum((x.attention is not None) + (x.ffn is not None) for x in self.layers)
        )
        vectors += sum(
            self.q_size + 2 * x.num_key_value_heads * self.head_dim
            for x in self.layers
            if isinstance(x.attention, Attention) and x.attention.bias
        )
        embedding = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return 2 * (self.num_parameters - vectors - embedding)

    def kv_cache_bytes_per_token(self, bytes_per_element: int) -> int:
        """Bytes of K and V of one token over all layers and ranks."""
        heads = sum(layer.num_key_value_heads for layer in self.layers)
        return 2 * heads * self.head_dim * bytes_per_element

    def all_reduces_per_token(self, tp_size: int) -> int:
        """One after every attention and every FFN, when ranks share a layer.

        A parallel window has one of all its attentions, and one of all its FFNs; a Linear, whose rows are
        gathered, always has its own.
        """
        if tp_size == 1:
            return 0
        count = 0
        for step in self.steps:
            for parts in ([self.layers[i].attention for i in step], [self.layers[i].ffn for i in step]):
                matrices = sum(isinstance(x, Linear) for x in parts)
                count += matrices + any(isinstance(x, Attention | FFN) for x in parts)
        return count

    def counts(self, tp_size: int, bytes_per_element: int) -> dict[str, Any]:
        """All of the above by name, as `inspect` and the reports show them."""
        return {
            "layers": len(self.layers),
            "attention_layers": self.num_attention_layers,
            "ffn_widths": sorted({x.intermediate_size for x in self.layers if x.intermediate_size}),
            "attention_free_runs": [list(run) for run in self.attention_free_runs()],
            "parameters": self.num_parameters,
            "flops_per_token": self.flops_per_token(),
            "kv_bytes_per_token": self.kv_cache_bytes_per_token(bytes_per_element),
            "tp_size": tp_size,
            "all_reduces_per_token": self.all_reduces_per_token(tp_size),
        }

    def shard(self, tp_size: int) -> Architecture:
        """The share of one tensor-parallel rank: heads, KV heads, widths and vocabulary divided.

        KV heads are repeated where there are fewer than ranks. The embedding stays whole; lm_head's
        rows are divided, rounded up. Raises UserError where tp_size does not fit.
        """
        if tp_size < 1 or self.num_attention_heads % tp_size:
            raise UserError(
                f"tp_size: {tp_size} does not divide num_attention_heads {self.num_attention_heads}; "
                f"choose one of {_divisors(self.num_attention_heads)}"
            )
        if self.has_linear and self.hidden_size % tp_size:
            raise UserError(f"tp_size: {tp_size} does not divide hidden_size {self.hidden_size}")
        return replace(
            self,
            linear_rows=self.hidden_size // tp_size if self.has_linear else None,
            num_attention_heads=self.num_attention_heads // tp_size,
            tie_word_embeddings=self.tie_word_embeddings and tp_size == 1,
            lm_head_rows=-(-self.vocab_size // tp_size),
            layers=tuple(_shard_layer(i, layer, tp_size) for i, layer in enumerate(self.layers)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Architecture:
        """Read what `to_dict` wrote. Raises UserError on a missing or unknown key."""
        known = {f.name for f in fields(cls)}
        if set(values) != known:
            wrong = sorted(set(values) ^ known)
            raise UserError(f"architecture: key {wrong[0]!r} is missing or unknown; write the file again")
        rope = values["rope"]
        layers = tuple(
            Layer(
                attention=_part(Attention, x["attention"]),
                ffn=_part(FFN, x["ffn"]),
                members=tuple(x["members"]),
            )
            for x in values["layers"]
        )
        scaling = tuple((name, value) for name, value in rope["scaling"])
        parallel = tuple((first, last) for first, last in values["parallel"])
        read = {"rope": Rope(**{**rope, "scaling": scaling}), "layers": layers, "parallel": parallel}
        return cls(**{**values, **read})


def _part(kind: Any, values: Mapping[str, Any] | None) -> Any:
    """An attention or FFN from `to_dict`'s values: nothing is none, no fields are a Linear's."""
    if values is None:
        return None
    return kind(**values) if values else Linear()


def _shard_layer(index: int, layer: Layer, tp_size: int) -> Layer:
    attention, ffn = layer.attention, layer.ffn
    if isinstance(attention, Attention):
        kv = attention.num_key_value_heads
        if max(kv, tp_size) % min(kv, tp_size):
            raise UserError(
                f"tp_size: {tp_size} and layer {index}'s num_key_value_heads {kv} do not divide each other"
            )
        attention = replace(attention, num_key_value_heads=max(1, kv // tp_size))
    if isinstance(ffn, FFN):
        if ffn.intermediate_size % tp_size:
            raise UserError(
                f"tp_size: {tp_size} does not divide layer {index}'s intermediate_size "
                f"{ffn.intermediate_size}; pad the width first"
            )
        ffn = FFN(intermediate_size=ffn.intermediate_size // tp_size)
    return replace(layer, attention=attention, ffn=ffn)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _check_windows(windows: tuple[Window, ...], num_layers: int) -> None:
    previous = -1
    for first, last in windows:
        if not 0 <= first < last < num_layers:
            raise UserError(
                f"parallel: {first}-{last} is no window of two or more of the layers 0-{num_layers - 1}"
            )
        if first <= previous:
            raise UserError(f"parallel: window {first}-{last} begins in or before another; layers have one")
        previous = last
