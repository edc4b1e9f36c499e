"""build-engine: one command for the embedded engine, TensorRT-LLM and ONNX."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from builder.options import DIRECTORY, JSON, emit
from builder.surgery.parallel import format_windows
from engines.options import (
    backend_options,
    check_dtype,
    check_sequential,
    embedded_options,
    engine_options,
    pytorch_options,
    refuse_given,
)

if TYPE_CHECKING:
    from engines.manifest import Manifest
    from engines.trtllm.build import Prepared
    from engines.trtllm.preflight import Check


@click.command("build-engine")
@click.argument("checkpoint", type=DIRECTORY)
@click.option(
    "--backend",
    type=click.Choice(["embedded", "tensorrt-llm", "onnx"]),
    default="embedded",
    show_default=True,
    help="embedded runs on CPUs, and on GPUs with --device cuda; tensorrt-llm needs TensorRT-LLM and an H100 "
    "or H200; onnx is portable.",
)
@click.option(
    "--max-batch-size", type=click.IntRange(1), help="Requests at once. Default: 4; tensorrt-llm: 32."
)
@click.option(
    "--max-input-len", type=click.IntRange(1), help="Tokens of a prompt. Default: half of --max-seq-len."
)
@click.option(
    "--max-seq-len",
    type=click.IntRange(4),
    help="Prompt and output together. Default: the model's limit; tensorrt-llm: 8192 at most.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Weights and KV cache; auto is the checkpoint's. float16: onnx only.",
)
@click.option("-o", "--output", type=DIRECTORY, help="The engine directory.")
@backend_options
@JSON
def build_engine(
    checkpoint: Path,
    backend: str,
    max_batch_size: int | None,
    max_input_len: int | None,
    max_seq_len: int | None,
    dtype: str,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compile CHECKPOINT, a TensorRT-LLM checkpoint directory, into an engine.

    With --backend tensorrt-llm it may be a Hugging Face directory: TensorRT-LLM 1.0 and later serve that
    with their PyTorch backend, so it is checked and the serving configuration is written.

    \b
    Examples:
        build-engine checkpoint --max-batch-size 8 --max-seq-len 2048 -o engine
        build-engine checkpoint --quant int8 --kv-cache-memory 4GiB -o engine
        build-engine checkpoint --parallel-blocks 38-41,71-74 -o engine
        build-engine checkpoint --backend onnx --dtype float16 -o onnx
        build-engine checkpoint --backend tensorrt-llm --dry-run
        build-engine checkpoint --backend tensorrt-llm --config build.yaml -o engine
        build-engine fused --backend tensorrt-llm --tp 8 -o engine
    """
    if output is None and not options["dry_run"]:
        raise click.UsageError("Missing option '-o' / '--output'.")
    check_sequential(options, backend)
    limits = {
        "max_batch_size": max_batch_size,
        "max_input_len": max_input_len,
        "max_seq_len": max_seq_len,
    }
    if backend == "tensorrt-llm":
        check_dtype(dtype)
        _build_trtllm(checkpoint, output, as_json, options, limits)
        return
    assert output is not None, "checked above"
    if backend == "onnx":
        refuse_given(options, "onnx")
        _build_onnx(checkpoint, output, as_json, dtype, limits)
        return
    _build_embedded(checkpoint, output, as_json, dtype, limits, embedded_options(options))


def _build_embedded(
    checkpoint: Path,
    output: Path,
    as_json: bool,
    dtype: str,
    limits: dict[str, int | None],
    given: dict[str, Any],
) -> None:
    from builder.plan import parse_windows
    from engines.embedded.compilation import build

    data, tokenizer = given.get("data"), given.get("tokenizer")
    if (data is None) != (tokenizer is None):
        raise click.UsageError("--data and --tokenizer go together")
    if data is not None and "quant" not in given:
        raise click.UsageError("--data is for --quant")
    windows = None
    if data and tokenizer:
        from engines.embedded import quality

        windows = quality.read_text(data, tokenizer)
    start = time.monotonic()
    manifest = build(
        checkpoint,
        output,
        max_batch_size=limits["max_batch_size"] or 4,
        max_input_len=limits["max_input_len"],
        max_seq_len=limits["max_seq_len"],
        kv_cache_memory=given.get("kv_cache_memory"),
        device=given.get("device", "cpu"),
        dtype=None if dtype == "auto" else dtype,
        quant=given.get("quant"),
        parallel=parse_windows(given["parallel_blocks"]) if "parallel_blocks" in given else (),
        progress=_report,
    )
    seconds, cost = time.monotonic() - start, None
    if manifest.quant:
        from engines.embedded import quality

        windows = quality.own_text(output) if windows is None else windows
        cost = quality.cost(checkpoint, output, windows, own=data is None)
        _report(cost.describe(manifest.quant))
    _emit_engine(manifest, output, seconds, as_json, {"quality": asdict(cost)} if cost else {})


def _build_onnx(
    checkpoint: Path, output: Path, as_json: bool, dtype: str, limits: dict[str, int | None]
) -> None:
    from engines.onnx_export import compilation

    start = time.monotonic()
    manifest = compilation.build(
        checkpoint,
        output,
        max_batch_size=limits["max_batch_size"] or 4,
        max_input_len=limits["max_input_len"],
        max_seq_len=limits["max_seq_len"],
        dtype=None if dtype == "auto" else dtype,
        progress=_report,
    )
    script = output / compilation.SCRIPT
    result = {
        "engine": str(output),
        "backend": manifest.backend,
        "tp_size": manifest.tp_size,
        **{name: getattr(manifest, name) for name in limits},
        "dtype": manifest.dtype,
        "trtexec": str(script),
        "seconds": round(time.monotonic() - start, 1),
    }
    text = (
        f"{output}: ONNX, TP {manifest.tp_size}, {manifest.dtype}, written in {result['seconds']} s\n"
        f"TensorRT: run {shlex.quote(str(script))}; it calls trtexec for every graph"
    )
    emit(result, as_json, text)


def _build_trtllm(
    checkpoint: Path, output: Path | None, as_json: bool, options: dict[str, Any], limits: dict[str, Any]
) -> None:
    from builder.storage import read_json

    dry_run = options.pop("dry_run")
    if "model_type" in read_json(checkpoint / "config.json"):
        engine_only = {name: options.pop(name) or None for name in ("config_file", "without_nvlink")}
        given = pytorch_options({**options, **engine_only})
        _write_serving(checkpoint, output, as_json, dry_run, {**given, **limits})
        return
    config_file, without_nvlink = options.pop("config_file"), options.pop("without_nvlink")
    given = engine_options(options)
    from engines.trtllm import build as trtllm
    from engines.trtllm import options as build_options

    chosen = build_options.read(config_file, {**given, **limits})
    prepared = trtllm.prepare(checkpoint, output or Path("engine"), chosen, without_nvlink=without_nvlink)
    if not prepared.build.use_fused_mlp and chosen.use_fused_mlp is None:
        _report("use_fused_mlp is off: the joined gate and up weight would reach TensorRT's 2^31 elements")
    if dry_run:
        _emit_dry_run(prepared, as_json)
        return
    start = time.monotonic()
    manifest = trtllm.build(prepared, _report)
    if manifest is not None:
        _emit_engine(manifest, prepared.output, time.monotonic() - start, as_json)


def _write_serving(
    model: Path, output: Path | None, as_json: bool, dry_run: bool, given: dict[str, Any]
) -> None:
    from engines.trtllm import serving

    options = serving.ServingOptions(**{name: value for name, value in given.items() if value is not None})
    prepared = serving.prepare(model, options)
    if dry_run:
        checks = serving.checks(prepared)
        arguments = prepared.llm_arguments()
        lines = [*_check_lines(checks), "", *(f"{name}: {value}" for name, value in arguments.items())]
        emit({"llm": arguments, "checks": _check_values(checks)}, as_json, "\n".join(lines))
        return
    assert output is not None, "checked by the command"
    manifest = serving.write(prepared, output)
    result = {"engine": str(output), "backend": manifest.backend, "tp_size": manifest.tp_size}
    emit(result, as_json, f"{output}: {manifest.backend}, TP {manifest.tp_size}; nothing was compiled")


def _check_values(checks: Sequence[Check]) -> dict[str, Any]:
    return {c.name: {"passed": c.passed, "detail": c.detail} for c in checks}


def _check_lines(checks: Sequence[Check]) -> list[str]:
    return [f"{'ok    ' if c.passed else 'FAILS '} {c.name:13} {c.detail}" for c in checks]


def _emit_dry_run(prepared: Prepared, as_json: bool) -> None:
    if prepared.place[0] > 0:
        return
    command = ["trtllm-build", *prepared.command(prepared.output)]
    checks = prepared.checks()
    result = {
        "command": command,
        "estimate": prepared.estimate.to_dict(),
        "checks": _check_values(checks),
    }
    lines = [prepared.estimate.describe(), "", *_check_lines(checks), "", shlex.join(command)]
    emit(result, as_json, "\n".join(lines))


def _emit_engine(
    manifest: Manifest, output: Path, seconds: float, as_json: bool, more: dict[str, Any] | None = None
) -> None:
    limits = {n: getattr(manifest, n) for n in ("max_batch_size", "max_input_len", "max_seq_len")}
    result = {"engine": str(output), "backend": manifest.backend, "tp_size": manifest.tp_size, **limits}
    numbers = manifest.dtype + (f" with {manifest.quant} weights" if manifest.quant else "")
    windows = format_windows(manifest.architecture.parallel)
    numbers += f", blocks {windows} in parallel" if windows else ""
    text = f"{output}: {manifest.backend} engine, TP {manifest.tp_size}, {numbers}, built in {seconds:.1f} s"
    result |= {"dtype": manifest.dtype, "quant": manifest.quant, "seconds": round(seconds, 1), **(more or {})}
    result |= {"parallel_blocks": windows} if windows else {}
    emit(result, as_json, text)


def _report(line: str) -> None:
    click.echo(line, err=True)
