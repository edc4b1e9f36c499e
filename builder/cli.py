"""The builder's commands: inspect, fuse, convert, verify."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from builder.errors import UserError
from builder.options import (
    DIRECTORY,
    JSON,
    THREADS,
    emit,
    make_plan,
    plan_options,
    progress_bar,
    random_options,
    random_seed,
    target_options,
)

if TYPE_CHECKING:
    from builder.checkpoint import Checkpoint
    from builder.plan import Plan
    from builder.quantization import Quantized


@click.command()
@click.argument("model", type=DIRECTORY)
@click.option(
    "--tp", "tp_size", type=click.IntRange(1), default=8, show_default=True, help="Ranks to count for."
)
@click.option(
    "--kv-dtype",
    type=click.Choice(["float32", "bfloat16", "fp8"]),
    default="bfloat16",
    show_default=True,
    help="KV-cache elements to count.",
)
@JSON
def inspect(model: Path, tp_size: int, kv_dtype: str, as_json: bool) -> None:
    """Layers, widths, attention-free runs and costs of MODEL, a directory or a bare config.json.

    \b
    Example:
        ffn-fusion inspect Llama-3.1-8B --tp 8
    """
    from builder import huggingface

    architecture = huggingface.read_architecture(model)
    counts = architecture.counts(tp_size, {"float32": 4, "bfloat16": 2, "fp8": 1}[kv_dtype])
    runs = ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in counts["attention_free_runs"]) or "none"
    widths = ", ".join(f"{w:,}" for w in counts["ffn_widths"])
    text = "\n".join(
        (
            f"layers               {counts['layers']} ({counts['attention_layers']} with attention)",
            f"hidden size          {architecture.hidden_size:,}",
            f"heads                {architecture.num_attention_heads} x {architecture.head_dim}",
            f"FFN widths           {widths}",
            f"attention-free runs  {runs}",
            f"parameters           {counts['parameters']:,}",
            f"KV cache per token   {counts['kv_bytes_per_token']:,} bytes ({kv_dtype})",
            f"all-reduces          {counts['all_reduces_per_token']} per token at TP {tp_size}",
        )
    )
    emit({"model": str(model), **counts}, as_json, text)


@click.command()
@click.argument("model", type=DIRECTORY)
@plan_options
@random_options
@click.option("-o", "--output", type=DIRECTORY, required=True, help="The fused Hugging Face directory.")
@THREADS
@JSON
def fuse(
    model: Path,
    random_weights: bool,
    seed: int | None,
    output: Path,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Drop attention from MODEL, fuse the FFN runs that remain, write a nemotron-nas directory.

    Layer numbers are MODEL's. The last layer of a run is left out unless --group names it. With
    --random-weights and --no-fuse alone the model is written as it is: a baseline to measure.

    \b
    Examples:
        ffn-fusion fuse Llama-3.1-70B --drop-attention 42-51 -o fused
        ffn-fusion fuse Llama-3.1-70B --drop-attention 42-51,53-70 --group 42-50 --group 53-69 -o fused
        ffn-fusion fuse config.json --random-weights --no-fuse -o baseline
    """
    from builder import export, manifest
    from builder.team import Team

    random = random_seed(random_weights, seed)
    team = Team.join()
    plan = team.together(lambda: make_plan(**options))
    source, parent = team.together(lambda: _read(model, random))
    child = team.together(lambda: _changed(parent, plan, random is not None and options["no_fuse"]))
    mapping = manifest.layer_mapping(child.architecture, len(parent.architecture.layers))
    made_up = team.together(lambda: _random_facts(model, random))
    facts = {"plan": plan.to_dict(), "layers": mapping, **made_up}
    total = sum(x.num_bytes for x in child.tensors.values()) // team.size
    with progress_bar("fusing", total) as progress:
        written = export.write(
            child, source, output, facts=facts, team=team, threads=threads, progress=progress
        )
    if team.rank == 0:
        members = [list(layer.members) for layer in written.layers]
        text = f"{output}: {len(parent.architecture.layers)} layers became {len(members)}"
        result = {"output": str(output), "layers": members, "parameters": written.num_parameters}
        emit({**result, **made_up}, as_json, text + _random_text(made_up))


def _read(model: Path, seed: int | None, dtype: str | None = None) -> tuple[Path, Checkpoint]:
    """MODEL, random where there is a seed, and the directory that has its tokenizer."""
    if seed is None:
        from builder import huggingface

        return model, huggingface.read(model)
    from builder import random_weights

    if random_weights.has_weights(model):
        raise click.UsageError(f"{model} has weights; leave out --random-weights or give its config.json")
    scratch = click.get_current_context().with_resource(TemporaryDirectory())
    return random_weights.read(model, seed, Path(scratch), dtype)


def _random_facts(model: Path, seed: int | None) -> dict[str, Any]:
    """What ffn-fusion.json and the result say of random weights, those MODEL was written with as well."""
    if seed is not None:
        return {"random_weights": {"seed": seed}}
    from builder import manifest

    name = "random_weights"
    record = manifest.read(model) or {}
    return {name: record[name]} if name in record else {}


def _random_text(facts: dict[str, Any]) -> str:
    return f"; the weights are random, seed {facts['random_weights']['seed']}" if facts else ""


def _changed(parent: Checkpoint, plan: Plan, as_it_is: bool) -> Checkpoint:
    child = plan.apply(parent)
    if child.architecture == parent.architecture and not as_it_is:
        raise UserError("fuse: nothing to drop and no run to fuse; name layers with --drop-attention")
    return child


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
    plan = team.together(lambda: _asked_plan(options))
    mapping = {name: options[name] for name in ("tp_size", "pp_size")}
    dtype = None if options["dtype"] == "auto" else options["dtype"]
    target = {**mapping, "dtype": dtype, "fused_mlp": not options["no_fused_mlp"]}
    if dry_run and random is None and not model.is_dir():
        source, parent = model, team.together(lambda: huggingface.declared(model, dtype))
    else:
        source, parent = team.together(lambda: _read(model, random, dtype))
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
    made_up = team.together(lambda: _random_facts(model, random))
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
        emit({**result, **made_up}, as_json, text + _random_text(made_up))


def _check_convert_options(output: Path | None, dry_run: bool, options: dict[str, Any]) -> None:
    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--output', or --dry-run to write nothing.")
    if options["kv_cache"] and not options["quant"]:
        raise click.UsageError("--kv-cache fp8 needs --quant fp8")
    if options["calib"] and not options["quant"]:
        raise click.UsageError("--calib is for --quant fp8")
    if options["quant"] and not options["calib"] and not dry_run:
        raise click.UsageError("--quant fp8 needs --calib FILE: text to measure activations on")


def _asked_plan(options: dict[str, Any]) -> Plan | None:
    """The plan of the options, None where none of them asks for a change."""
    names = ("plan_file", "drop_attention", "drop_ffn", "kv_heads", "groups", "no_fuse", "norm")
    given = {name: options[name] for name in names}
    changes = ("plan_file", "drop_attention", "drop_ffn", "kv_heads", "groups")
    if any(given[name] for name in changes):
        return make_plan(**given)
    if given["norm"]:
        raise click.UsageError("--norm says how to fuse; name what to fuse, with --group or --drop-attention")
    return None


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


@click.command()
@click.argument("directory", type=DIRECTORY)
@THREADS
@JSON
def verify(directory: Path, threads: int | None, as_json: bool) -> None:
    """Re-read every file of DIRECTORY, written by fuse or convert, or any supported model directory.

    Checks that headers, shapes and dtypes are those of config.json, that all numbers are finite, and,
    where ffn-fusion.json holds digests, that nothing has changed since it was written.

    \b
    Example:
        ffn-fusion verify checkpoint
    """
    from dataclasses import asdict

    from builder import verification

    with progress_bar("verifying", verification.weight_bytes(directory)) as progress:
        report = verification.verify(directory, threads=threads, progress=progress)
    against = "digests match" if report.digests else "no digests to compare with (ffn-fusion.json is missing)"
    text = f"{directory}: {report.files} files, {report.tensors} tensors, {report.bytes:,} bytes; "
    emit(asdict(report), as_json, "\n".join(report.problems) or text + against)
    if report.problems:
        count = len(report.problems)
        raise UserError(f"{directory}: {count} problem{'s' * (count > 1)}; write or copy it again")


COMMANDS = (inspect, fuse, convert, verify)
