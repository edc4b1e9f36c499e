"""TensorRT-LLM's PyTorch backend: no engine to compile, a checked Hugging Face directory and how to serve it.

The keys of llm.yaml are arguments of `tensorrt_llm.LLM` (TorchLlmArgs, 1.0 on). A nemotron-nas directory
is read there by attribute from `block_configs`, a width through `ffn_mult` alone
(tensorrt_llm/_torch/models/modeling_nemotron_nas.py).
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from builder import huggingface
from builder.architecture import Architecture
from builder.checkpoint import Checkpoint
from builder.errors import UserError
from builder.storage import output_directory, read_json
from builder.surgery.sharding import check_stages, stage_layers
from engines import hardware
from engines.manifest import Manifest
from engines.trtllm import preflight, release
from engines.trtllm.estimate import ELEMENT_BYTES, RUNTIME_BYTES
from engines.trtllm.options import DEFAULT_MAX_SEQ_LEN

BACKEND = "tensorrt-llm-pytorch"
CONFIG = "llm.yaml"
DTYPES = ("bfloat16", "float16")
_BLOCK_KEYS = {
    "attention": ("no_op", "replace_with_linear", "n_heads_in_group"),
    "ffn": ("no_op", "replace_with_linear", "ffn_mult"),
}


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """How the PyTorch backend serves: limits in tokens and requests, a fraction of the free GPU memory."""

    tp_size: int = 1
    pp_size: int = 1
    max_batch_size: int = 32
    max_input_len: int | None = None
    max_seq_len: int | None = None
    max_num_tokens: int = 8192
    max_beam_width: int = 1
    kv_cache_fraction: float = 0.9
    cuda_graphs: bool = True
    chunked_prefill: bool = True


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A checked directory with every choice made."""

    model: Path
    checkpoint: Checkpoint
    options: ServingOptions
    max_input_len: int
    max_seq_len: int

    def llm_arguments(self) -> dict[str, Any]:
        """The content of llm.yaml."""
        o = self.options
        return {
            "model": str(self.model),
            "backend": "pytorch",
            # A nemotron-nas config is no class of transformers: the directory's own is loaded.
            "trust_remote_code": read_json(self.model / "config.json").get("model_type") == "nemotron-nas",
            "dtype": self.checkpoint.dtype,
            "tensor_parallel_size": o.tp_size,
            "pipeline_parallel_size": o.pp_size,
            "max_batch_size": o.max_batch_size,
            "max_input_len": self.max_input_len,
            "max_seq_len": self.max_seq_len,
            "max_num_tokens": o.max_num_tokens,
            "max_beam_width": o.max_beam_width,
            "enable_chunked_prefill": o.chunked_prefill,
            "kv_cache_config": {"free_gpu_memory_fraction": o.kv_cache_fraction, "enable_block_reuse": True},
            "cuda_graph_config": (
                {"enable_padding": True, "max_batch_size": o.max_batch_size} if o.cuda_graphs else None
            ),
        }

    def gpu_bytes(self) -> int:
        """Bytes of the rank with most weights, one request of max_seq_len and the runtime, estimated."""
        o, size = self.options, ELEMENT_BYTES[self.checkpoint.dtype]
        local = self.checkpoint.architecture.shard(o.tp_size)
        weights = max(_stage_parameters(local, o.pp_size, s) for s in range(o.pp_size)) * size
        return weights + self.max_seq_len * local.kv_cache_bytes_per_token(size) + RUNTIME_BYTES


def prepare(model: Path, options: ServingOptions) -> Serving:
    """Read and check a Hugging Face directory. Raises UserError naming the field that does not fit."""
    model = model.resolve()
    checkpoint = huggingface.read(model)
    architecture = checkpoint.architecture
    _check_config(model / "config.json", checkpoint)
    architecture.shard(options.tp_size)
    check_stages(architecture, options.pp_size)
    limit = architecture.max_position_embeddings
    max_seq_len = options.max_seq_len or min(limit, DEFAULT_MAX_SEQ_LEN)
    max_input_len = options.max_input_len or max(1, max_seq_len // 2)
    if max_seq_len > limit:
        raise UserError(f"max_seq_len: {max_seq_len} is above the model's max_position_embeddings {limit}")
    if max_input_len >= max_seq_len:
        raise UserError(f"max_input_len: {max_input_len} leaves no token of max_seq_len {max_seq_len}")
    if not options.chunked_prefill and options.max_num_tokens < max_input_len:
        raise UserError(
            f"max_num_tokens: {options.max_num_tokens} is less than max_input_len {max_input_len}, and "
            "prompts are not cut into chunks without --chunked-prefill"
        )
    if not 0 < options.kv_cache_fraction < 1:
        raise UserError(f"kv_cache_fraction: {options.kv_cache_fraction} is not between 0 and 1")
    return Serving(
        model=model,
        checkpoint=checkpoint,
        options=options,
        max_input_len=max_input_len,
        max_seq_len=max_seq_len,
    )


def _check_config(file: Path, checkpoint: Checkpoint) -> None:
    """What the PyTorch backend asks of config.json beyond what every reader does."""
    values = read_json(file)
    if checkpoint.dtype not in DTYPES:
        raise UserError(
            f"{file}: dtype {checkpoint.dtype}, the PyTorch backend is made for bfloat16; "
            "write the directory in bfloat16"
        )
    for name in ("rms_norm_eps", "rope_theta", "torch_dtype"):
        if values.get(name) is None:
            raise UserError(
                f"{file}: {name} is missing and the PyTorch backend reads it; run fuse to write it"
            )
    for index, block in enumerate(values.get("block_configs") or ()):
        for part, keys in _BLOCK_KEYS.items():
            missing = [key for key in keys if not isinstance(block.get(part), dict) or key not in block[part]]
            if missing:
                raise UserError(
                    f"{file}: block_configs[{index}].{part}.{missing[0]} is missing and the PyTorch backend "
                    "reads it; run fuse to write it"
                )


def _stage_parameters(local: Architecture, pp_size: int, stage: int) -> int:
    layers = stage_layers(len(local.layers), pp_size, stage)
    inside = sum(local.layer_parameters(local.layers[i]) for i in layers)
    ends = (stage == 0) + (stage == pp_size - 1)
    return inside + ends * local.vocab_size * local.hidden_size


def checks(serving: Serving) -> list[preflight.Check]:
    """The release and the GPUs of this machine; where it has none, the serving machine will be asked."""
    return [
        preflight.tried("model", lambda: f"{serving.checkpoint.dtype}, {serving.model}"),
        preflight.tried("TensorRT-LLM", _release),
        preflight.tried("GPUs", lambda: _gpus(serving)),
    ]


def _release() -> str:
    version = release.installed()
    if not release.has_pytorch_backend(version):
        raise UserError(f"tensorrt_llm: {version} has no PyTorch backend to serve this, 1.0 and later do")
    return version


def _gpus(serving: Serving) -> str:
    found, needed = preflight.hopper(), serving.gpu_bytes()
    world_size = serving.options.tp_size * serving.options.pp_size
    if len(found) < world_size:
        raise UserError(f"gpu: {world_size} ranks need as many, {len(found)} visible; lower --tp or --pp")
    tightest = min(found, key=lambda gpu: gpu.free_memory)
    if needed > tightest.free_memory:
        raise UserError(
            f"gpu {tightest.index}: a rank needs {needed / 1e9:.1f} GB, {tightest.free_memory / 1e9:.1f} GB "
            "are free; raise --tp or lower --max-seq-len"
        )
    return f"{len(found)} x {found[0].name}, a rank needs {needed / 1e9:.1f} GB"


def write(serving: Serving, output: Path) -> Manifest:
    """Write the engine directory: llm.yaml and the manifest. The model stays where it is.

    Raises UserError where a TensorRT-LLM or GPUs are here that could not serve it; a machine that
    has neither may still write it.
    """
    if shutil.which("nvidia-smi") is not None and hardware.gpus():
        _gpus(serving)
    try:
        version: str | None = release.installed()
    except UserError:
        version = None
    if version is not None:
        _release()
    o = serving.options
    manifest = Manifest(
        backend=BACKEND,
        checkpoint_digest=serving.checkpoint.digest,
        architecture=serving.checkpoint.architecture,
        dtype=serving.checkpoint.dtype,
        tp_size=o.tp_size,
        pp_size=o.pp_size,
        max_batch_size=o.max_batch_size,
        max_input_len=serving.max_input_len,
        max_seq_len=serving.max_seq_len,
        hardware={"gpus": [asdict(gpu) for gpu in hardware.gpus()]},
        compiler={"tensorrt_llm": version, "model": str(serving.model)},
    )
    with output_directory(output) as directory:
        text = yaml.safe_dump(serving.llm_arguments(), sort_keys=False)
        (directory / CONFIG).write_text(text, encoding="utf-8")
        manifest.write(directory)
    return manifest
