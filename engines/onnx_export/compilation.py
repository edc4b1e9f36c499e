"""From a TensorRT-LLM checkpoint to a directory of ONNX graphs.

config.json      the Manifest
decoder.json     what a runtime needs: inputs, segments and collectives in order, cache, logits
trtexec.sh       compiles the graphs with TensorRT
decoder.onnx, weights.safetensors                              at TP 1
rankR/segmentNNN.onnx, rankR/weights.safetensors               at TP 2 and more; graphs alike for all ranks

A safetensors file is a header and raw tensors one after the other, so ONNX can take it for its external
data: an initializer is an offset and a length in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from builder import trtllm, writer
from builder.errors import UserError
from builder.storage import output_directory, write_json
from builder.tensorfile import Layout
from builder.trtllm.reading import TrtllmCheckpoint
from engines.manifest import Manifest

if TYPE_CHECKING:
    from engines.onnx_export.segments import Segment

BACKEND = "onnx"
DTYPES = ("float32", "float16", "bfloat16")
WEIGHTS = "weights.safetensors"
CONTRACT = "decoder.json"
SCRIPT = "trtexec.sh"

Report = Callable[[str], None]


def build(
    checkpoint_dir: Path,
    output: Path,
    *,
    max_batch_size: int = 4,
    max_input_len: int | None = None,
    max_seq_len: int | None = None,
    dtype: str | None = None,
    progress: Report | None = None,
) -> Manifest:
    """Write `checkpoint_dir` as ONNX into a new directory `output`; `progress` gets a line a stage.

    Limits default to the model's max_position_embeddings and half of it, and bound TensorRT's profiles
    only; `dtype` defaults to the checkpoint's. Raises UserError for a checkpoint or limit that does not
    fit, a graph that onnx refuses, or an output that exists; nothing is left behind then.
    """
    report = progress or (lambda line: None)
    checkpoint = trtllm.read(checkpoint_dir)
    _check_checkpoint(checkpoint)
    longest = checkpoint.architecture.max_position_embeddings if max_seq_len is None else max_seq_len
    manifest = Manifest(
        backend=BACKEND,
        checkpoint_digest=checkpoint.digest,
        architecture=checkpoint.architecture,
        dtype=dtype or checkpoint.dtype,
        tp_size=checkpoint.tp_size,
        pp_size=checkpoint.pp_size,
        max_batch_size=max_batch_size,
        max_input_len=longest // 2 if max_input_len is None else max_input_len,
        max_seq_len=longest,
        hardware={},
        compiler={"onnx": onnx_version()},
    )
    if manifest.dtype not in DTYPES:
        raise UserError(f"dtype: {manifest.dtype!r} is not one of {', '.join(DTYPES)}")
    manifest.check_limits()
    _write(checkpoint, manifest, output, report)
    return manifest


def onnx_version() -> str:
    """onnx's version, not importing it. Raises UserError where it is missing."""
    try:
        return metadata.version("onnx")
    except metadata.PackageNotFoundError:
        raise UserError("onnx: not installed; pip install onnx") from None


def _check_checkpoint(checkpoint: TrtllmCheckpoint) -> None:
    if checkpoint.pp_size > 1:
        raise UserError(
            f"pp_size: {checkpoint.pp_size} in {checkpoint.directory}, ONNX is written with tensor "
            "parallelism only; convert with --pp 1"
        )
    if checkpoint.quant_algo:
        raise UserError(
            f"quant_algo: {checkpoint.quant_algo} in {checkpoint.directory}, ONNX is written without FP8; "
            "convert without --quant, or build with --backend tensorrt-llm"
        )


def _write(checkpoint: TrtllmCheckpoint, manifest: Manifest, output: Path, report: Report) -> None:
    from engines.onnx_export import contract, segments, trtexec

    tp_size, dtype = manifest.tp_size, manifest.dtype
    ranks = [checkpoint.rank(r).cast(dtype) for r in range(tp_size)]
    weights = [rank.decoder_tensors() for rank in ranks]
    cut = segments.cut(ranks[0].architecture, weights[0], dtype, tp_size)
    places = [f"rank{r}" for r in range(tp_size)] if tp_size > 1 else ["."]
    names = [f"segment{i:03}" for i in range(len(cut))] if tp_size > 1 else ["decoder"]
    files = {f"{name}.onnx": segment for name, segment in zip(names, cut, strict=True)}
    num_bytes = sum(x.num_bytes for rank in weights for x in rank.values())
    with output_directory(output, num_bytes) as directory:
        manifest.write(directory)
        write_json(directory / CONTRACT, contract.describe(manifest, places, files))
        inputs = {name: segment.graph.inputs.values() for name, segment in files.items()}
        trtexec.write(directory / SCRIPT, manifest, places, inputs)
        for place in places:
            (directory / place).mkdir(exist_ok=True)
        start = time.monotonic()
        writer.write(directory, {f"{p}/{WEIGHTS}": w for p, w in zip(places, weights, strict=True)})
        report(f"weights of TP {tp_size} written in {time.monotonic() - start:.1f} s")
        _write_graphs(directory, places, files, Layout.of(weights[0]))
        report(f"{len(places) * len(files)} graphs written and checked by onnx {manifest.compiler['onnx']}")


def _write_graphs(directory: Path, places: list[str], files: dict[str, Segment], layout: Layout) -> None:
    """The same graphs into every place, each checked where it lies, with the weights beside it."""
    for name, segment in files.items():
        data = segment.graph.model(name.removesuffix(".onnx"), WEIGHTS, layout).SerializeToString()
        for place in places:
            (directory / place / name).write_bytes(data)
            _check_graph(directory / place / name)


def _check_graph(file: Path) -> None:
    """Raises UserError where onnx refuses a written graph."""
    from onnx import checker, shape_inference

    try:
        checker.check_model(str(file), full_check=True)
    except (checker.ValidationError, shape_inference.InferenceError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UserError(
            f"{file.name}: onnx {onnx_version()} refuses it: {reason}; pip install --upgrade onnx"
        ) from None
