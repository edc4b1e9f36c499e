"""A decoder whose layers may differ, and every count derived from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from builder.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query attention; query heads are the model's, KV heads the layer's own."""

    num_key_value_heads: int


@dataclass(frozen=True, kw_only=True)
class FFN:
    """A SwiGLU feed-forward network: down(silu(gate(x)) * up(x))."""

    intermediate_size: int


@dataclass(frozen=True, kw_only=True)
class Layer:
    """x + attention(norm(x)), then x + ffn(norm(x)); either part may be absent."""

    attention: Attention | None
    ffn: FFN | None
    members: tuple[int, ...]  # layers of the input model that this one holds


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding. `scaling` holds the numbers of its `kind`, as Hugging Face names them."""

    theta: float = 10000.0
    kind: str = "default"
    scaling: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ROPE_FIELDS:
            known = ", ".join(ROPE_FIELDS)
            raise UserError(f"rope_type: {self.kind!r} is not supported; supported are {known}")
        if tuple(name for name, _ in self.scaling) != ROPE_FIELDS[self.kind]:
            need = ", ".join(ROPE_FIELDS[self.kind]) or "nothing"
            raise UserError(
                f"rope_scaling: {dict(self.scaling)} does not fit {self.kind!r}, which needs {need}"
            )

    @classmethod
    def from_mapping(cls, theta: float, scaling: Mapping[str, Any] | None) -> Rope:
        """Read Hugging Face's `rope_scaling` (key `rope_type`, or the older `type`)."""
        given = dict(scaling or {})
        kind = str(given.get("rope_type", given.get("type", "default")))
        names = ROPE_FIELDS.get(kind, ())
        missing = [name for name in names if name not in given]
        if missing:
            raise UserError(f"rope_scaling.{missing[0]}: missing, but rope_type {kind!r} needs it")
        numbers = tuple((name, float(given[name])) for name in names)
        return cls(theta=float(theta), kind=kind, scaling=numbers)

    def to_mapping(self) -> dict[str, Any] | None:
        """Hugging Face's `rope_scaling` value; None where positions are not scaled."""
        if self.kind == "default":
            return None
        whole = {n: int(v) if n == "original_max_position_embeddings" else v for n, v in self.scaling}
        return {"rope_type": self.kind, **whole}


ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


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
            kv = layer.attention.num_key_value_heads if layer.attention else 1
            if kv < 1 or self.num_attention_heads % kv:
                raise UserError(
                    f"layer {index}: num_key_value_heads {kv} does not divide "
                    f"num_attention_heads {self.num_attention_heads}"
                )
            if layer.ffn and layer.ffn.intermediate_size < 1:
                raise UserError(
                    f"layer {index}: intermediate_size {layer.ffn.intermediate_size} is not positive"
                )

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def lm_head_size(self) -> int:
        """Rows of lm_head."""
        return self.vocab_size if self.lm_head_rows is None else self.lm_head_rows

    @property
    def num_attention_layers(self) -> int:
        return sum(layer.attention is not None for layer in self.layers)

    @property
    def uniform(self) -> bool:
        """Whether all layers are alike and whole, as LlamaForCausalLM needs them."""
        first = self.layers[0]
        whole = first.attention is not None and first.ffn is not None
        return whole and all((x.attention, x.ffn) == (first.attention, first.ffn) for x in self.layers)

    def attention_free_runs(self) -> Iterator[tuple[int, int]]:
        """Maximal runs (first, last) of layers that have an FFN and no attention."""
        first = None
        for index, layer in enumerate((*self.layers, None)):
            free = layer is not None and layer.attention is None and layer.ffn is not None
            if free and first is None:
                first = index
            elif not free and first is not None:
                yield first, index - 1
                first = None

    def layer_parameters(self, layer: Layer) -> int:
        """Weights of one layer, its norms among them."""
        count = 0
        if layer.attention:
            kv_size = layer.attention.num_key_value_heads * self.head_dim
            count += self.hidden_size * (2 * self.q_size + 2 * kv_size) + self.hidden_size
        if layer.ffn:
            count += 3 * self.hidden_size * layer.ffn.intermediate_size + self.hidden_size
        return count

    @property
    def num_parameters(self) -> int:
        """All weights; a tied lm_head counts once."""
        lm_head = 0 if self.tie_word_embeddings else self.lm_head_size
        embeddings = (self.vocab_size + lm_head) * self.hidden_size
        return embeddings + self.hidden_size + sum(self.layer_parameters(layer) for layer in self.layers)

    def flops_per_token(self) -> int:
        """Multiply-adds x 2 of the linear layers for one token; attention over the cache not counted."""
        norms = self.hidden_size * (
            1 + sum((x.attention is not None) + (x.ffn is not None) for x in self.layers)
        )
        embedding = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return 2 * (self.num_parameters - norms - embedding)

    def kv_cache_bytes_per_token(self, bytes_per_element: int) -> int:
        """Bytes of K and V of one token over all layers and ranks."""
        heads = sum(x.attention.num_key_value_heads for x in self.layers if x.attention)
        return 2 * heads * self.head_dim * bytes_per_element

    def all_reduces_per_token(self, tp_size: int) -> int:
        """One after every attention and every FFN, when ranks share a layer."""
        if tp_size == 1:
            return 0
        return sum((x.attention is not None) + (x.ffn is not None) for x in self.layers)

    def counts(self, tp_size: int, bytes_per_element: int) -> dict[str, Any]:
        """All of the above by name, as `inspect` and the reports show them."""
        return {
            "layers": len(self.layers),
            "attention_layers": self.num_attention_layers,
            "ffn_widths": sorted({x.ffn.intermediate_size for x in self.layers if x.ffn}),
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
        rows are divided, rounded up.
        """
        if tp_size < 1 or self.num_attention_heads % tp_size:
            raise UserError(
                f"tp_size: {tp_size} does not divide num_attention_heads {self.num_attention_heads}; "
                f"choose one of {_divisors(self.num_attention_heads)}"
            )
        return replace(
            self,
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
                attention=Attention(**x["attention"]) if x["attention"] else None,
                ffn=FFN(**x["ffn"]) if x["ffn"] else None,
                members=tuple(x["members"]),
            )
            for x in values["layers"]
        )
        scaling = tuple((name, value) for name, value in rope["scaling"])
        return cls(**{**values, "rope": Rope(**{**rope, "scaling": scaling}), "layers": layers})


def _shard_layer(index: int, layer: Layer, tp_size: int) -> Layer:
    attention, ffn = layer.attention, layer.ffn
    if attention:
        kv = attention.num_key_value_heads
        if max(kv, tp_size) % min(kv, tp_size):
            raise UserError(
                f"tp_size: {tp_size} and layer {index}'s num_key_value_heads {kv} do not divide each other"
            )
        attention = Attention(num_key_value_heads=max(1, kv // tp_size))
    if ffn:
        if ffn.intermediate_size % tp_size:
            raise UserError(
                f"tp_size: {tp_size} does not divide layer {index}'s intermediate_size "
                f"{ffn.intermediate_size}; pad the width first"
            )
        ffn = FFN(intermediate_size=ffn.intermediate_size // tp_size)
    return replace(layer, attention=attention, ffn=ffn)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
