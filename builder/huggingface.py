"""Hugging Face directories, read into a Checkpoint: llama, mistral, qwen2 and nemotron-nas.

Nothing of a model is executed, and no file outside its directory is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from builder.architecture import Architecture
from builder.arithmetic import cast
from builder.checkpoint import Checkpoint, tensor_shapes
from builder.config import Config
from builder.errors import UserError
from builder.storage import headers_digest, read_json
from builder.tensorfile import read_header
from builder.tensors import FP8, Declared, Source

LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.linear": "self_attn.linear_attn",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
    "ffn.linear": "mlp.linear_mlp",
}
OUTSIDE_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}


def hf_name(name: str) -> str:
    """The Hugging Face name of a checkpoint tensor."""
    if name in OUTSIDE_NAMES:
        return OUTSIDE_NAMES[name]
    _, index, rest = name.split(".", 2)
    part, _, kind = rest.rpartition(".")
    return f"model.layers.{index}.{LAYER_NAMES[part]}.{kind}"


def read_architecture(path: Path) -> Architecture:
    """The Architecture of a model directory or a bare config.json. Raises UserError by field."""
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise UserError(f"{path}: no such model directory or config.json")
    return Config(file).architecture()


def read(directory: Path) -> Checkpoint:
    """A model directory as a Checkpoint; headers are read, weights are not."""
    if not directory.is_dir():
        if directory.is_file():
            raise UserError(
                f"{directory}: a file, not the directory with the weights; `convert` and `fuse` take a "
                "config.json with --random-weights"
            )
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


def declared(path: Path, dtype: str | None = None) -> Checkpoint:
    """The Checkpoint that a bare config.json describes: shapes and dtype, and no weights.

    `path` may be the file or a directory that has it; `dtype` goes before the file's. Raises
    UserError by field, and where neither says a dtype.
    """
    architecture = read_architecture(path)
    file = path / "config.json" if path.is_dir() else path
    dtype = dtype or Config(file).dtype()
    shapes = tensor_shapes(architecture)
    return Checkpoint(
        architecture=architecture,
        tensors={name: Declared(hf_name(name), shape, dtype) for name, shape in shapes.items()},
        dtype=dtype,
        digest=headers_digest(file, ()),
    )


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
    for name, source in named.items():
        if source.dtype == FP8:
            raise UserError(f"{source.file}: tensor {hf_name(name)!r} is float8; give the unquantised model")
    return dtype


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        file = directory / "model.safetensors"
        if not file.exists():
            raise UserError(
                f"{directory}: has neither model.safetensors nor its index; convert it to safetensors, "
                "or give --random-weights"
            )
        return [file]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map is missing or empty; copy the file again")
    files = []
    for name in sorted({str(value) for value in weight_map.values()}):
        if Path(name).name != name or name in (".", "..") or "\0" in name:
            raise UserError(f"{index}: weight_map names {name!r}, which lies outside the model directory")
        if not _is_file(directory / name):
            raise UserError(f"{directory}: shard {name!r} is missing; copy the whole model directory")
        files.append(directory / name)
    return files


def _is_file(path: Path) -> bool:
    """False as well for what no file system takes as a name."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
