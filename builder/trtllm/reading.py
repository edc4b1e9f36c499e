"""A TensorRT-LLM checkpoint directory read back into Checkpoints, one a rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from builder.architecture import FFN, Architecture, Attention, Layer, Linear
from builder.arithmetic import cast
from builder.checkpoint import Checkpoint, tensor_shapes
from builder.errors import UserError
from builder.fp8 import Dequantize
from builder.model_class import QWEN
from builder.storage import headers_digest, read_json
from builder.surgery.sharding import stage_layers
from builder.tensorfile import read_header
from builder.tensors import FP8, Expression, Slice
from builder.trtllm.layout import DTYPES, KINDS, on_stage, read_rope, trtllm_name

MAX_RANKS = 10_000  # more is a broken file


@dataclass(frozen=True, kw_only=True)
class TrtllmCheckpoint:
    """A TensorRT-LLM checkpoint directory; `architecture` is that of the whole model."""

    directory: Path
    kind: str
    architecture: Architecture
    tp_size: int
    pp_size: int
    dtype: str
    digest: str
    quant_algo: str | None = None  # "FP8" or None
    kv_cache_quant_algo: str | None = None

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    def rank(self, rank: int) -> Checkpoint:
        """One tensor-parallel rank's share (pp_size 1), FP8 weights dequantised to `dtype`.

        Raises UserError by file and tensor.
        """
        assert self.pp_size == 1, "one stage"
        file = self.directory / f"rank{rank}.safetensors"
        local = replace(self.architecture.shard(self.tp_size), tie_word_embeddings=False)
        sources: Mapping[str, Expression] = read_header(file)
        tensors: dict[str, Expression] = {}
        for name, shape in decoder_shapes(local).items():
            tensors[name] = self._tensor(file, sources, trtllm_name(name, self.kind), shape)
        return Checkpoint(
            architecture=local, tensors=_split_qkv(tensors, local), dtype=self.dtype, digest=self.digest
        )

    def stored_shapes(self, rank: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of every tensor that a rank's file holds, by its name there."""
        stage, _ = divmod(rank, self.tp_size)
        local = replace(self.architecture.shard(self.tp_size), tie_word_embeddings=False)
        layers = stage_layers(len(local.layers), self.pp_size, stage)
        stored: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, shape in decoder_shapes(local).items():
            if on_stage(name, layers, stage, self.pp_size):
                there = trtllm_name(name, self.kind, layers.start)
                quantized = self.is_quantized(there)
                stored[there] = (FP8 if quantized else self.dtype, shape)
                module = there.removesuffix(".weight")
                if quantized:
                    stored[f"{module}.weights_scaling_factor"] = ("float32", (1,))
                    stored[f"{module}.activation_scaling_factor"] = ("float32", (1,))
                if self.kv_cache_quant_algo and module.endswith("attention.qkv"):
                    scale = f"{module.removesuffix('.qkv')}.kv_cache_scaling_factor"
                    stored[scale] = ("float32", (1,))
        return stored

    def _tensor(
        self, file: Path, sources: Mapping[str, Expression], name: str, shape: tuple[int, ...]
    ) -> Expression:
        x = sources.get(name)
        if x is None:
            raise UserError(f"{file}: tensor {name!r} is missing; convert the model again")
        expected = FP8 if self.is_quantized(name) else self.dtype
        if x.shape != shape or x.dtype != expected:
            raise UserError(
                f"{file}: tensor {name!r} is {x.dtype} {list(x.shape)}, "
                f"config.json says {expected} {list(shape)}"
            )
        if expected != FP8:
            return x
        scale_name = f"{name.removesuffix('.weight')}.weights_scaling_factor"
        scale = sources.get(scale_name)
        if scale is None or scale.shape != (1,) or scale.dtype != "float32":
            raise UserError(f"{file}: tensor {scale_name!r} is missing or no float32 [1]; convert again")
        return cast(Dequantize(x, float(scale.read_all()[0])), self.dtype)

    def is_quantized(self, name: str) -> bool:
        """Whether a stored weight is e4m3: the linear layers' but lm_head's."""
        return (
            self.quant_algo == "FP8"
            and name.startswith("transformer.layers.")
            and (name.endswith(".weight") and "layernorm" not in name)
        )


def decoder_shapes(local: Architecture) -> dict[str, tuple[int, ...]]:
    """Shapes of `Checkpoint.decoder_tensors` for a rank's share."""
    shapes = tensor_shapes(local)
    for index, layer in enumerate(local.layers):
        if isinstance(layer.attention, Attention):
            prefix = f"layers.{index}.attention."
            for kind in ("weight", "bias")[: 1 + layer.attention.bias]:
                parts = [shapes.pop(f"{prefix}{n}.{kind}") for n in "qkv"]
                shapes[f"{prefix}qkv.{kind}"] = (sum(p[0] for p in parts), *parts[0][1:])
    return shapes


def _split_qkv(tensors: dict[str, Expression], local: Architecture) -> dict[str, Expression]:
    split = dict(tensors)
    for index, layer in enumerate(local.layers):
        if isinstance(layer.attention, Attention):
            prefix, kv_size = f"layers.{index}.attention.", layer.num_key_value_heads * local.head_dim
            bounds = (0, local.q_size, local.q_size + kv_size, local.q_size + 2 * kv_size)
            for kind in ("weight", "bias")[: 1 + layer.attention.bias]:
                joined = split.pop(f"{prefix}qkv.{kind}")
                for name, first, last in zip("qkv", bounds, bounds[1:], strict=False):
                    split[f"{prefix}{name}.{kind}"] = Slice(joined, 0, first, last)
    return split


def read(directory: Path) -> TrtllmCheckpoint:
    """Read a checkpoint directory's config. Raises UserError naming the field that is off."""
    file = directory / "config.json"
    values = read_json(file)
    kind = values.get("architecture")
    if kind not in KINDS:
        raise UserError(
            f"{file}: architecture {kind!r} is not one of {', '.join(KINDS)}; "
            "write it with `ffn-fusion convert`"
        )
    try:
        quantization = values.get("quantization") or {}
        quant_algo, kv_algo = quantization.get("quant_algo"), quantization.get("kv_cache_quant_algo")
        architecture = _read_architecture(values, bias=kind == QWEN)
        mapping = values["mapping"]
        tp_size, pp_size, dtype = int(mapping["tp_size"]), int(mapping["pp_size"]), str(values["dtype"])
    except KeyError as error:
        raise UserError(f"{file}: key {error} is missing; convert the model again") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: {error}; convert the model again") from None
    if dtype not in DTYPES:
        raise UserError(f"{file}: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    for algorithm in (quant_algo, kv_algo):
        if algorithm not in (None, "FP8"):
            raise UserError(f"{file}: quant_algo {algorithm!r} is not supported; only FP8 is")
    if not (0 < tp_size <= MAX_RANKS and 0 < pp_size <= MAX_RANKS):
        raise UserError(f"{file}: mapping {mapping!r} is broken; convert the model again")
    files = [directory / f"rank{r}.safetensors" for r in range(tp_size * pp_size)]
    for rank_file in files:
        if not rank_file.is_file():
            raise UserError(f"{rank_file}: missing; convert the model again")
    return TrtllmCheckpoint(
        directory=directory,
        kind=kind,
        architecture=architecture,
        tp_size=tp_size,
        pp_size=pp_size,
        dtype=dtype,
        quant_algo=quant_algo,
        kv_cache_quant_algo=kv_algo,
        digest=headers_digest(file, files),
    )


def _read_architecture(values: dict[str, Any], *, bias: bool) -> Architecture:
    count = int(values["num_hidden_layers"])
    uniform = {
        "attention": {"impl": "attention", "num_key_value_heads": values["num_key_value_heads"]},
        "ffn": {"impl": "mlp", "intermediate_size": values["intermediate_size"]},
    }
    entries = values.get("layer_configs") or [uniform] * count
    if len(entries) != count:
        raise ValueError(f"layer_configs has {len(entries)} entries, num_hidden_layers is {count}")
    layers = tuple(
        Layer(attention=_attention(entry["attention"], bias), ffn=_ffn(entry["ffn"]), members=(index,))
        for index, entry in enumerate(entries)
    )
    return Architecture(
        hidden_size=int(values["hidden_size"]),
        num_attention_heads=int(values["num_attention_heads"]),
        head_dim=int(values["head_size"]),
        vocab_size=int(values["vocab_size"]),
        max_position_embeddings=int(values["max_position_embeddings"]),
        norm_eps=float(values["norm_epsilon"]),
        rope=read_rope(values["rotary_base"], values["rotary_scaling"]),
        tie_word_embeddings=False,
        layers=layers,
    )


def _attention(entry: Mapping[str, Any], bias: bool) -> Attention | Linear | None:
    if entry["impl"] == "attention":
        return Attention(num_key_value_heads=int(entry["num_key_value_heads"]), bias=bias)
    return _other(entry["impl"])


def _ffn(entry: Mapping[str, Any]) -> FFN | Linear | None:
    if entry["impl"] == "mlp":
        return FFN(intermediate_size=int(entry["intermediate_size"]))
    return _other(entry["impl"])


def _other(implementation: object) -> Linear | None:
    if implementation not in ("linear", "no_op"):
        raise ValueError(f"layer_configs: impl {implementation!r} is unknown")
    return Linear() if implementation == "linear" else None
