"""A Hugging Face config.json, read into an Architecture field by field, its values not trusted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from builder.architecture import FFN, Architecture, Attention, Layer, Linear
from builder.errors import UserError
from builder.rope import Rope
from builder.storage import read_json

SUPPORTED = ("llama", "mistral", "qwen2", "nemotron-nas")
_QK_NORMS = "its q/k norms have no place in the target formats"
_POST_NORMS = "its post-norms keep FFNs from being fused"
_EXPERTS = "mixtures of experts are not supported"
_PARALLEL = "its attention and FFN read one norm; dropping and fusing are defined for sequential ones"
_PARTIAL = "its partial rotary embedding or joined projections are not supported"
REFUSED = {
    "qwen3": _QK_NORMS,
    "gemma": "its norms add 1 to their weight, and its embeddings are scaled",
    "gemma2": _POST_NORMS,
    "gemma3": _POST_NORMS,
    "gemma3_text": _POST_NORMS,
    "olmo2": _POST_NORMS,
    "olmo3": _POST_NORMS,
    "glm4": _POST_NORMS,
    "cohere": _PARALLEL,
    "cohere2": _PARALLEL,
    "gpt_neox": _PARALLEL,
    "falcon": _PARALLEL,
    "phi": _PARALLEL,
    "phi3": _PARTIAL,
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "deepseek_v2": _EXPERTS,
    "deepseek_v3": _EXPERTS,
    "llama4": _EXPERTS,
    "llama4_text": _EXPERTS,
    "gpt_oss": _EXPERTS,
    "nemotron": "its FFN is not SwiGLU (squared ReLU), its norm is not RMSNorm",
    "nemotron_h": "its Mamba layers are not supported",
}
DTYPES = ("float64", "float32", "float16", "bfloat16")
FFN_MULTIPLE = 256  # nemotron-nas rounds widths up to it
MAX_LAYERS = 10_000  # more is a broken file


class Config:
    """`architecture()` raises UserError with the file, the field, its value and what is wrong."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values = read_json(file)
        self.model_type = str(self.values.get("model_type"))
        if self.model_type not in SUPPORTED:
            reason = REFUSED.get(self.model_type, "it is not known")
            raise UserError(
                f"{file}: model_type {self.model_type[:80]!r} cannot be read: {reason}; "
                f"supported are {', '.join(SUPPORTED)}"
            )

    def fail(self, field: str, value: object, remedy: str) -> UserError:
        """An error about a field; long values are cut."""
        shown = repr(value)
        return UserError(f"{self.file}: {field} {shown if len(shown) < 80 else shown[:77] + '...'} {remedy}")

    def integer(self, field: str, default: int | None = None) -> int:
        """A positive integer below 2^31."""
        value = self.values.get(field)
        return self._positive(field, default if value is None else value)

    def number(self, field: str, default: float) -> float:
        """A positive, finite number."""
        value = self.values.get(field, default)
        if type(value) not in (int, float) or not 0 < value < 1e12:
            raise self.fail(field, value, "is not a positive number")
        return float(value)

    def flag(self, field: str) -> bool:
        """A boolean, false where it is missing."""
        value = self.values.get(field)
        if value is not None and type(value) is not bool:
            raise self.fail(field, value, "is not true or false")
        return bool(value)

    def dtype(self) -> str:
        """`dtype`, or the older `torch_dtype`."""
        value = self.values.get("dtype") or self.values.get("torch_dtype")
        if value not in DTYPES:
            raise self.fail("torch_dtype", value, f"is not one of {', '.join(DTYPES)}; give --dtype")
        return str(value)

    def _positive(self, field: str, value: object) -> int:
        if type(value) is not int or not 0 < value < 1 << 31:
            raise self.fail(field, value, "is not a positive integer")
        return value

    def architecture(self) -> Architecture:
        """The model's Architecture. Raises UserError."""
        self._refuse_unsupported()
        hidden, heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        if self.values.get("head_dim") is None and hidden % heads:
            raise self.fail("num_attention_heads", heads, f"does not divide hidden_size {hidden}")
        head_dim = self.integer("head_dim", hidden // heads)
        if head_dim % 2:
            raise self.fail("head_dim", head_dim, "is odd; rotary embeddings turn pairs")
        try:
            return Architecture(
                hidden_size=hidden,
                num_attention_heads=heads,
                head_dim=head_dim,
                vocab_size=self.integer("vocab_size"),
                max_position_embeddings=self.integer("max_position_embeddings"),
                norm_eps=self.number("rms_norm_eps", 1e-6),
                rope=self._rope(),
                tie_word_embeddings=self.flag("tie_word_embeddings"),
                layers=self._layers(hidden, heads),
            )
        except UserError as error:
            message = str(error)
            raise UserError(
                message if message.startswith(str(self.file)) else f"{self.file}: {message}"
            ) from None

    def _refuse_unsupported(self) -> None:
        for field in ("attention_bias", "mlp_bias", "qkv_bias", "no_bias"):
            if self.values.get(field):
                raise self.fail(
                    field, self.values[field], "is not supported; only models without it can be read"
                )
        self._refuse_windows()
        kind = self.values.get("position_embedding_type")
        if kind not in (None, "rope", "rope_gpt_neox"):
            raise self.fail("position_embedding_type", kind, "is not supported; only rope is")
        if self.values.get("hidden_act", "silu") != "silu":
            raise self.fail(
                "hidden_act", self.values["hidden_act"], "is not supported; FFNs must be SwiGLU (silu)"
            )
        for field in ("qk_norm", "use_qk_norm", "post_norm", "use_post_norm", "norm_after"):
            if self.values.get(field):
                raise self.fail(field, self.values[field], "is not supported; such layers cannot be fused")
        for field in ("num_local_experts", "num_experts", "n_routed_experts"):
            if self.values.get(field):
                raise self.fail(field, self.values[field], "is not supported: mixtures of experts")
        for field in (
            "embedding_multiplier",
            "residual_multiplier",
            "attention_multiplier",
            "logits_scaling",
        ):
            if self.values.get(field) not in (None, 1, 1.0):
                raise self.fail(field, self.values[field], "is not supported; only 1 is")

    def _refuse_windows(self) -> None:
        remedy = "is not supported: sliding windows; only models with full attention can be read"
        # Qwen2 names a window that `use_sliding_window` switches on.
        used = self.model_type != "qwen2" or self.values.get("use_sliding_window")
        if used and self.values.get("sliding_window"):
            raise self.fail("sliding_window", self.values["sliding_window"], remedy)
        kinds = self.values.get("layer_types")
        if isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds):
            raise self.fail("layer_types", next(k for k in kinds if k != "full_attention"), remedy)

    def _rope(self) -> Rope:
        """Either spelling: rope_theta and rope_scaling, or rope_parameters."""
        parameters = self.values.get("rope_parameters")
        field = "rope_parameters" if parameters is not None else "rope_scaling"
        scaling = self.values.get(field)
        if scaling is not None and not isinstance(scaling, dict):
            raise self.fail(field, scaling, "is not an object")
        given = dict(scaling or {})
        for holder in (given, self.values):
            if holder.get("partial_rotary_factor") not in (None, 1, 1.0):
                raise self.fail("partial_rotary_factor", holder["partial_rotary_factor"], "is not supported")
        theta = given.get("rope_theta", self.values.get("rope_theta", 10000.0))
        if type(theta) not in (int, float) or not 1 < theta < 1e15:
            raise self.fail("rope_theta", theta, "is not a number above 1")
        if given.get("rope_type", given.get("type")) == "yarn":
            # Older files leave it to the model's own length.
            given.setdefault("original_max_position_embeddings", self.integer("max_position_embeddings"))
        return Rope.from_mapping(theta, given)

    def _layers(self, hidden: int, heads: int) -> tuple[Layer, ...]:
        count = self.integer("num_hidden_layers")
        if count > MAX_LAYERS:
            raise self.fail("num_hidden_layers", count, f"is more than {MAX_LAYERS:,}")
        blocks = self.values.get("block_configs")
        # Pruned models of other types carry a list of blocks as well.
        if self.model_type == "nemotron-nas" or blocks is not None:
            if not isinstance(blocks, list) or len(blocks) != count:
                raise self.fail("block_configs", type(blocks).__name__, f"is not a list of {count} blocks")
            return tuple(
                Layer(
                    attention=self._attention(f"block_configs[{i}].attention", block, heads),
                    ffn=self._ffn(f"block_configs[{i}].ffn", block, hidden),
                    members=(i,),
                )
                for i, block in enumerate(blocks)
            )
        attention = Attention(
            num_key_value_heads=self.integer("num_key_value_heads", heads), bias=self.model_type == "qwen2"
        )
        ffn = FFN(intermediate_size=self.integer("intermediate_size"))
        return tuple(Layer(attention=attention, ffn=ffn, members=(i,)) for i in range(count))

    def _part(self, field: str, block: object) -> tuple[dict[str, Any], Linear | None, bool]:
        """A block's attention or ffn: its fields, the matrix in its place, whether it is absent."""
        if isinstance(block, dict) and block.get("parallel_blocks"):
            raise self.fail(f"{field.rpartition('.')[0]}.parallel_blocks", "", "is not supported")
        part = block.get(field.rpartition(".")[2]) if isinstance(block, dict) else None
        if not isinstance(part, dict):
            raise self.fail(field, part, "is not an object")
        for name in ("window_length", "sliding_window", "sparsify", "num_sink_tokens", "is_sink"):
            if part.get(name):
                raise self.fail(f"{field}.{name}", part[name], "is not supported: sliding windows, sinks")
        for name in ("moe", "mamba", "llama4"):
            if part.get(name):
                raise self.fail(f"{field}.{name}", part[name], "is not supported")
        for name in ("no_op", "replace_with_linear"):
            if type(part.get(name, False)) is not bool:
                raise self.fail(f"{field}.{name}", part[name], "is not true or false")
        if part.get("no_op") and part.get("replace_with_linear"):
            raise self.fail(f"{field}.no_op", True, "contradicts replace_with_linear")
        return part, Linear() if part.get("replace_with_linear") else None, bool(part.get("no_op"))

    def _attention(self, field: str, block: object, heads: int) -> Attention | Linear | None:
        part, linear, absent = self._part(field, block)
        if absent or linear:
            return linear
        if part.get("num_key_value_heads") is not None:
            kv = self._positive(f"{field}.num_key_value_heads", part["num_key_value_heads"])
        else:
            group = self._positive(f"{field}.n_heads_in_group", part.get("n_heads_in_group"))
            if heads % group:
                raise self.fail(f"{field}.n_heads_in_group", group, f"does not divide {heads} heads")
            kv = heads // group
        return Attention(num_key_value_heads=kv, bias=self.model_type == "qwen2")

    def _ffn(self, field: str, block: object, hidden: int) -> FFN | Linear | None:
        part, linear, absent = self._part(field, block)
        if absent or linear:
            return linear
        if part.get("hidden_act", "silu") not in (None, "silu"):
            raise self.fail(f"{field}.hidden_act", part["hidden_act"], "is not supported; only silu is")
        if part.get("intermediate_size") is not None:
            width = part["intermediate_size"]
            return FFN(intermediate_size=self._positive(f"{field}.intermediate_size", width))
        mult: Any = part.get("ffn_mult")
        if type(mult) not in (int, float) or not math.isfinite(mult) or not 0 < mult < 1e6:
            raise self.fail(f"{field}.ffn_mult", mult, "is not a positive number")
        return FFN(intermediate_size=self._positive(f"{field}.ffn_mult", ffn_width(mult, hidden)))


def ffn_width(ffn_mult: float, hidden_size: int) -> int:
    """The width of a nemotron-nas FFN: int(2 * ffn_mult * hidden_size / 3), rounded up to 256."""
    return -(-int(2 * ffn_mult * hidden_size / 3) // FFN_MULTIPLE) * FFN_MULTIPLE


def ffn_mult(width: int, hidden_size: int) -> float:
    """The `ffn_mult` that `ffn_width` turns into `width`, a multiple of 256."""
    value = round(3 * width / (2 * hidden_size), 6)
    if ffn_width(value, hidden_size) != width:
        raise UserError(f"intermediate_size: {width} has no ffn_mult for hidden_size {hidden_size}")
    return value
