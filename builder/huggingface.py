"""Hugging Face directories, read into a Checkpoint: llama, mistral and nemotron-nas.

Nothing of a model is executed, and no file outside its directory is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.architecture import FFN, Architecture, Attention, Layer, Rope
from builder.checkpoint import Checkpoint, tensor_shapes
from builder.errors import UserError
from builder.storage import headers_digest, read_header, read_json
from builder.tensors import Source, cast

LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}
OUTSIDE_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
SUPPORTED = ("llama", "mistral", "nemotron-nas")
REFUSED = {
    "qwen2": "its q/k/v biases are not supported",
    "qwen3": "its q/k norms have no place in the target formats",
    "gemma2": "its post-norms keep FFNs from being fused",
    "gemma3": "its post-norms keep FFNs from being fused",
    "gemma3_text": "its post-norms keep FFNs from being fused",
    "olmo2": "its post-norms keep FFNs from being fused",
    "mixtral": "mixtures of experts are not supported",
    "gpt_oss": "mixtures of experts are not supported",
}
FFN_MULTIPLE = 256  # nemotron-nas rounds widths up to it


def hf_name(name: str) -> str:
    """The Hugging Face name of a checkpoint tensor."""
    if name in OUTSIDE_NAMES:
        return OUTSIDE_NAMES[name]
    _, index, rest = name.split(".", 2)
    return f"model.layers.{index}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def read_architecture(path: Path) -> Architecture:
    """The Architecture of a model directory or a bare config.json. Raises UserError by field."""
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise UserError(f"{path}: no such model directory or config.json")
    return _Config(file).architecture()


def read(directory: Path) -> Checkpoint:
    """A model directory as a Checkpoint; headers are read, weights are not."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such model directory")
    architecture = read_architecture(directory)
    files = _weight_files(directory)
    sources: dict[str, Source] = {}
    for file in files:
        for name, source in read_header(file).items():
            if name in sources:
                raise UserError(f"{file}: tensor {name!r} is in {sources[name].file.name} as well")
            sources[name] = source
    named = _match(directory, architecture, sources)
    dtype = _dtype(directory / "config.json", named)
    try:
        return Checkpoint(
            architecture=architecture,
            tensors={name: cast(source, dtype) for name, source in named.items()},
            dtype=dtype,
            digest=headers_digest(directory / "config.json", files),
        )
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None


def _match(directory: Path, architecture: Architecture, sources: dict[str, Source]) -> dict[str, Source]:
    """Total mapping: every tensor wanted is there, every tensor there is wanted."""
    named, left = {}, dict(sources)
    for name in tensor_shapes(architecture):
        source = left.pop(hf_name(name), None)
        if source is None:
            raise UserError(
                f"{directory}: tensor {hf_name(name)!r} is missing; a shard may not have been copied"
            )
        named[name] = source
    if architecture.tie_word_embeddings:
        left.pop("lm_head.weight", None)  # some writers store the tied copy
    for name in left:
        if not name.endswith("rotary_emb.inv_freq"):  # derived from rope_theta
            raise UserError(
                f"{directory}: tensor {name!r} is not part of the architecture; it is not supported"
            )
    return named


def _dtype(config: Path, named: Mapping[str, Source]) -> str:
    """The dtype of the layers' weights; the rest is cast to it."""
    dtype = next((x.dtype for n, x in named.items() if n.startswith("layers.") and len(x.shape) == 2), None)
    if dtype is None:
        raise UserError(f"{config}: the model has no layer with weights")
    return dtype


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        file = directory / "model.safetensors"
        if not file.exists():
            raise UserError(
                f"{directory}: has neither model.safetensors nor its index; convert it to safetensors"
            )
        return [file]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map is missing or empty; copy the file again")
    files = []
    for name in sorted({str(value) for value in weight_map.values()}):
        if Path(name).name != name or name in (".", ".."):
            raise UserError(f"{index}: weight_map names {name!r}, which lies outside the model directory")
        if not (directory / name).is_file():
            raise UserError(f"{directory / name}: shard is missing; copy the whole model directory")
        files.append(directory / name)
    return files


class _Config:
    """A config.json, read field by field with errors that name the field."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values = read_json(file)
        self.model_type = str(self.values.get("model_type"))
        if self.model_type not in SUPPORTED:
            reason = REFUSED.get(self.model_type, "it is not known")
            raise UserError(
                f"{file}: model_type {self.model_type!r} cannot be read: {reason}; "
                f"supported are {', '.join(SUPPORTED)}"
            )

    def fail(self, field: str, value: object, remedy: str) -> UserError:
        return UserError(f"{self.file}: {field} {value!r} {remedy}")

    def integer(self, field: str, default: int | None = None) -> int:
        value = self.values.get(field)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 1 << 31:
            raise self.fail(field, value, "is not a positive integer")
        return value

    def number(self, field: str, default: float) -> float:
        value = self.values.get(field, default)
        if type(value) not in (int, float) or not 0 < value < 1e12:
            raise self.fail(field, value, "is not a positive number")
        return float(value)

    def architecture(self) -> Architecture:
        self._refuse_unsupported()
        hidden, heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        if self.values.get("head_dim") is None and hidden % heads:
            raise self.fail("num_attention_heads", heads, f"does not divide hidden_size {hidden}")
        try:
            return Architecture(
                hidden_size=hidden,
                num_attention_heads=heads,
                head_dim=self.integer("head_dim", hidden // heads),
                vocab_size=self.integer("vocab_size"),
                max_position_embeddings=self.integer("max_position_embeddings"),
                norm_eps=self.number("rms_norm_eps", 1e-6),
                rope=self._rope(),
                tie_word_embeddings=bool(self.values.get("tie_word_embeddings", False)),
                layers=self._layers(hidden, heads),
            )
        except UserError as error:
            message = str(error)
            raise UserError(
                message if message.startswith(str(self.file)) else f"{self.file}: {message}"
            ) from None

    def _refuse_unsupported(self) -> None:
        for field in ("attention_bias", "mlp_bias", "sliding_window"):
            if self.values.get(field):
                raise self.fail(
                    field, self.values[field], "is not supported; only models without it can be read"
                )
        if self.values.get("hidden_act", "silu") != "silu":
            raise self.fail(
                "hidden_act", self.values["hidden_act"], "is not supported; FFNs must be SwiGLU (silu)"
            )
        for field in ("qk_norm", "use_qk_norm", "post_norm", "use_post_norm"):
            if self.values.get(field):
                raise self.fail(field, self.values[field], "is not supported; such layers cannot be fused")

    def _rope(self) -> Rope:
        """Either spelling: rope_theta and rope_scaling, or rope_parameters."""
        parameters = self.values.get("rope_parameters")
        scaling = parameters if isinstance(parameters, dict) else self.values.get("rope_scaling")
        if scaling is not None and not isinstance(scaling, dict):
            raise self.fail("rope_scaling", scaling, "is not an object")
        theta = (scaling or {}).get("rope_theta", self.values.get("rope_theta", 10000.0))
        if type(theta) not in (int, float) or not theta > 0:
            raise self.fail("rope_theta", theta, "is not a positive number")
        return Rope.from_mapping(theta, scaling)

    def _layers(self, hidden: int, heads: int) -> tuple[Layer, ...]:
        count = self.integer("num_hidden_layers")
        if self.model_type == "nemotron-nas":
            blocks = self.values.get("block_configs")
            if not isinstance(blocks, list) or len(blocks) != count:
                raise self.fail("block_configs", type(blocks).__name__, f"is not a list of {count} blocks")
            return tuple(self._block(i, block, hidden, heads) for i, block in enumerate(blocks))
        attention = Attention(num_key_value_heads=self.integer("num_key_value_heads", heads))
        ffn = FFN(intermediate_size=self.integer("intermediate_size"))
        return tuple(Layer(attention=attention, ffn=ffn, members=(i,)) for i in range(count))

    def _block(self, index: int, block: Any, hidden: int, heads: int) -> Layer:
        try:
            attention, ffn = block["attention"], block["ffn"]
            for part in ("attention", "ffn"):
                if block[part].get("replace_with_linear"):
                    field = f"block_configs[{index}].{part}.replace_with_linear"
                    raise self.fail(field, True, "is not supported")
            kv = None if attention.get("no_op") else heads // int(attention["n_heads_in_group"])
            width = None if ffn.get("no_op") else ffn_width(float(ffn["ffn_mult"]), hidden)
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError) as error:
            raise self.fail(f"block_configs[{index}]", str(error), "is missing or broken") from None
        return Layer(
            attention=None if kv is None else Attention(num_key_value_heads=kv),
            ffn=None if width is None else FFN(intermediate_size=width),
            members=(index,),
        )


def ffn_width(ffn_mult: float, hidden_size: int) -> int:
    """The width of a nemotron-nas FFN: int(2 * ffn_mult * hidden_size / 3), rounded up to 256."""
    return -(-int(2 * ffn_mult * hidden_size / 3) // FFN_MULTIPLE) * FFN_MULTIPLE


def ffn_mult(width: int, hidden_size: int) -> float:
    """The `ffn_mult` that `ffn_width` turns into `width`, a multiple of 256."""
    value = round(3 * width / (2 * hidden_size), 6)
    if ffn_width(value, hidden_size) != width:
        raise UserError(f"intermediate_size: {width} has no ffn_mult for hidden_size {hidden_size}")
    return value
