"""convert: a TensorRT-LLM checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from builder.cli.source import random_facts, random_text, read_model
from builder.options import (
    DIRECTORY,
    JSON,
    THREADS,
    asked_plan,
    emit,
    plan_options,
    progress_bar,
    random_options,
    random_seed,
    target_options,
)

if TYPE_CHECKING:
    from builder.checkpoint import Checkpoint
    from builder.quantization import Quantized


@click.command()
@click.argument("model", type=DIRECTORY)
@plan_options
@target_options
@random_options
@click.option("-o", "--output", type=DIRECTORY, help="The TensorRT-LLM checkpoint directory.")
@click.option("--dry-run", is_flag=True, help="Print what it would write and cost; a config.json is enough.")
@THREADS
@JSON
def convert(
    model: Path,
    random_weights: bool,
    seed: int | None,
    output: Path | None,
    dry_run: bool,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Write MODEL as a sharded TensorRT-LLM checkpoint, in one pass, fusing on the way if asked.

    Without a plan or its options the layers stay as they are. Under mpirun the rank files are dealt
    over the processes.

    \b
    Examples:
        ffn-fusion convert fused --tp 8 -o checkpoint
        ffn-fusion convert Llama-3.1-70B --drop-attention 42-51 --tp 8 -o checkpoint
        ffn-fusion convert fused --tp 8 --quant fp8 --kv-cache fp8 --calib text.txt -o checkpoint
        ffn-fusion convert config.json --drop-attention 42-51 --tp 8 --dry-run
        ffn-fusion convert config.json --random-weights --tp 8 -o checkpoint
        mpirun -n 4 ffn-fusion convert fused --tp 8 -o checkpoint
    """
    from builder import huggingface, manifest, trtllm
    from builder.team import Team

    _check_convert_options(output, dry_run, options)
    random = random_seed(random_weights, seed)
    team = Team.join()
    plan = team.together(lambda: asked_plan(options))
    mapping = {name: options[name] for name in ("tp_size", "pp_size")}
    dtype = None if options["dtype"] == "auto" else options["dtype"]
    target = {**mapping, "dtype": dtype, "fused_mlp": not options["no_fused_mlp"]}
    if dry_run and random is None and not model.is_dir():
        source, parent = model, team.together(lambda: huggingface.declared(model, dtype))
    else:
        source, parent = team.together(lambda: read_model(model, random, dtype))
    child = team.together(lambda: plan.apply(parent)) if plan else parent
    if dry_run:
        fp8: dict[str, Any] = {"fp8": bool(options["quant"]), "fp8_kv_cache": bool(options["kv_cache"])}
        shown = team.together(lambda: trtllm.preview(child, parent, **target, **fp8))
        if team.rank == 0:
            emit(shown.to_dict(), as_json, shown.describe())
        return
    assert output is not None, "checked above"
    quantized = team.first(lambda: _quantized(source, child, target, options) if options["quant"] else None)
    layers = manifest.layer_mapping(child.architecture, len(parent.architecture.layers))
    made_up = team.together(lambda: random_facts(model, random))
    total = sum(x.num_bytes for x in child.tensors.values()) // team.size
    with progress_bar("converting", total) as progress:
        written = trtllm.convert(
            child,
            output,
            **target,
            quantized=quantized,
            facts={"plan": plan.to_dict() if plan else None, "layers": layers, **made_up},
            team=team,
            threads=threads,
            progress=progress,
        )
    if team.rank == 0:
        text = f"{output}: {len(written.layers)} layers for TP {mapping['tp_size']}, PP {mapping['pp_size']}"
        result = {"output": str(output), "layers": len(written.layers), **mapping}
        emit({**result, **made_up}, as_json, text + random_text(made_up))


def _check_convert_options(output: Path | None, dry_run: bool, options: dict[str, Any]) -> None:
    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--output', or --dry-run to write nothing.")
    if options["kv_cache"] and not options["quant"]:
        raise click.UsageError("--kv-cache fp8 needs --quant fp8")
    if options["calib"] and not options["quant"]:
        raise click.UsageError("--calib is for --quant fp8")
    if options["quant"] and not options["calib"] and not dry_run:
        raise click.UsageError("--quant fp8 needs --calib FILE: text to measure activations on")


def _quantized(model: Path, child: Checkpoint, target: dict[str, Any], options: dict[str, Any]) -> Quantized:
    """FP8 scales: activations from a calibration run, weights from a pass over them."""
    from builder import quantization, trtllm

    prepared = trtllm.prepare(child, **target)
    quantization.check(prepared)
    from builder import calibration  # imports torch

    samples, length = options["calib_samples"], options["calib_length"]
    windows = calibration.read_windows(model, list(options["calib"]), samples, length)
    total = sum(x.num_bytes for x in prepared.tensors.values())
    with progress_bar("calibrating", total) as progress:
        activations = calibration.calibrate(prepared, windows, progress=progress)
    with progress_bar("measuring", total) as progress:
        kv_cache = bool(options["kv_cache"])
        return quantization.quantize(prepared, activations, kv_cache=kv_cache, progress=progress)
