"""plan: what to drop, narrow and fuse."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from builder.errors import UserError
from builder.options import DIRECTORY, JSON, Finite, emit

if TYPE_CHECKING:
    from builder.architecture import Architecture
    from builder.checkpoint import Checkpoint
    from builder.plan import Plan
    from builder.search.alternatives import Pins
    from builder.search.proposal import Conditions, Proposal, Targets

DEFAULT_SPEEDUP = 1.25
_DEFAULTS = {"tp_size": 8, "batch": 1, "context": 2048}
MOST = 1_000_000_000  # tokens or sequences
POSITIVE = Finite(min=0, min_open=True)


@click.command()
@click.argument("model", type=DIRECTORY)
@click.option("--analysis", "analysis_dir", type=DIRECTORY, help="What `analyze` wrote of MODEL.")
@click.option("--tp", "tp_size", type=click.IntRange(1), help="Tensor-parallel ranks. Default: 8.")
@click.option("--gpu", type=click.Choice(["h100", "h200"]), help="Default: h100, unless --profile is given.")
@click.option("--batch", type=click.IntRange(1, MOST), help="Sequences at once. Default: 1.")
@click.option(
    "--context", type=click.IntRange(1, MOST), help="Tokens of each in the KV cache. Default: 2048."
)
@click.option(
    "--dtype",
    type=click.Choice(["fp8", "bfloat16"]),
    help="Of the layers' matrices. Default: fp8, or the table's with --profile.",
)
@click.option("--kv-dtype", type=click.Choice(["fp8", "bfloat16"]), help="Of the KV cache. Default: --dtype.")
@click.option("--profile", type=DIRECTORY, help="Seconds measured by `profile`, in the place of estimates.")
@click.option("--target-speedup", type=POSITIVE, metavar="X", help="At least X times as fast as MODEL.")
@click.option("--max-latency", type=POSITIVE, metavar="MS", help="Milliseconds per token, at most.")
@click.option("--max-memory", type=POSITIVE, metavar="GB", help="Of weights and KV cache on a GPU, at most.")
@click.option(
    "--min-quality",
    type=Finite(0, 1, min_open=True),
    metavar="Q",
    help="exp(-KL(MODEL || plan)) is at least Q, 1 is MODEL's.",
)
@click.option("--keep-attention", metavar="LAYERS", help="Layers whose attention stays as it is: 0,1,75-79.")
@click.option("--keep-ffn", metavar="LAYERS", help="Layers whose FFN stays as it is.")
@click.option("--drop-attention", metavar="LAYERS", help="Layers that lose attention in any case.")
@click.option("--plan", "plan_file", type=DIRECTORY, help="A plan.yaml whose choices are kept.")
@click.option("--solutions", type=click.IntRange(1), default=1, show_default=True, help="Plans to find.")
@click.option(
    "--difference",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Attentions and FFNs in which any two plans differ at least.",
)
@click.option(
    "--time-limit", type=POSITIVE, default=60.0, show_default=True, help="Seconds to search a plan."
)
@click.option("-o", "--output", type=DIRECTORY, help="plan.yaml; further plans are plan-2.yaml and so on.")
@JSON
def plan(
    model: Path,
    analysis_dir: Path | None,
    output: Path | None,
    solutions: int,
    difference: int,
    time_limit: float,
    as_json: bool,
    **options: Any,
) -> None:
    """What to drop, narrow and fuse in MODEL, a directory or a bare config.json.

    With --analysis a mixed-integer program meets the targets at the least cost in quality; without, only
    layers named by hand are dropped and the runs that are there are fused. Times are estimated unless
    --profile gives measured ones.

    \b
    Examples:
        ffn-fusion plan Llama-3.1-70B --analysis analysis --tp 8 --target-speedup 1.5 -o plan.yaml
        ffn-fusion plan Llama-3.1-70B --analysis analysis --tp 8 --min-quality 0.95 --keep-attention 0
        ffn-fusion plan nemotron-super-49b/config.json --tp 8 -o plan.yaml
    """
    from builder.search.proposal import Search, read_scores, summary

    targets, told = _targets(options, analysis_dir)
    files = _outputs(output, solutions)
    checkpoint = _read(model, analysis_dir)
    scores = read_scores(checkpoint, analysis_dir) if analysis_dir is not None else None
    pins = _pins(options)
    conditions = _conditions(checkpoint.architecture, options)
    search = Search(checkpoint, conditions, scores, pins, time_limit)
    proposals = search.propose(targets, solutions, difference)
    _write([x.plan for x in proposals], files)
    written = [str(x) for x in files[: len(proposals)]]
    notes = [*told, *_notes(proposals, conditions, solutions)]
    result = {
        "model": str(model),
        "costs": {"measured": conditions.costs.measured, "source": conditions.costs.source},
        "solutions": [summary(x, conditions) for x in proposals],
        "files": written,
        "notes": notes,
    }
    emit(result, as_json, _text(proposals, conditions, written, notes))


def _targets(options: dict[str, Any], analysis_dir: Path | None) -> tuple[Targets, list[str]]:
    """The targets, and what has to be said of them."""
    from builder.search.proposal import Targets

    latency, memory = options["max_latency"], options["max_memory"]
    targets = Targets(
        speedup=options["target_speedup"],
        max_seconds=None if latency is None else latency / 1e3,
        max_bytes=None if memory is None else memory * 1e9,
        min_quality=options["min_quality"],
    )
    if analysis_dir is None and targets.min_quality is not None:
        raise click.UsageError("--min-quality needs --analysis DIR: without it no quality is known")
    if analysis_dir is not None and targets == Targets():
        note = f"no target was given: --target-speedup {DEFAULT_SPEEDUP}"
        return Targets(speedup=DEFAULT_SPEEDUP), [note]
    return targets, []


def _read(model: Path, analysis_dir: Path | None) -> Checkpoint:
    """MODEL; a bare config names no weights, so plans made from it name no model."""
    from dataclasses import replace

    from builder import huggingface, random_weights

    if model.is_dir() and random_weights.has_weights(model):
        return huggingface.read(model)
    if analysis_dir is not None and model.exists():
        raise click.UsageError("--analysis is of a model with its weights; give that directory as MODEL")
    return replace(huggingface.declared(model, "bfloat16"), digest="")


def _pins(options: dict[str, Any]) -> Pins:
    from builder import plan as plans
    from builder.search.alternatives import Pins
    from builder.search.proposal import with_drops

    given = plans.read(options["plan_file"]) if options["plan_file"] else plans.Plan()
    dropped = plans.parse_layers(options["drop_attention"]) if options["drop_attention"] else ()
    keep = {
        name: frozenset(plans.parse_layers(options[name]) if options[name] else ())
        for name in ("keep_attention", "keep_ffn")
    }
    return Pins(plan=with_drops(given, dropped), **keep)


def _conditions(architecture: Architecture, options: dict[str, Any]) -> Conditions:
    from builder.search import gpu, measured
    from builder.search.latency import RUNTIME_BYTES, Costs, gpu_bytes
    from builder.search.proposal import Conditions
    from builder.search.roofline import estimated
    from builder.search.setting import Setting

    costs: Costs | None = None
    dtypes = {"dtype": options["dtype"] or "fp8", "kv_dtype": options["kv_dtype"]}
    widest, given = None, {name: options[name] for name in _DEFAULTS if options[name]}
    if options["profile"]:
        if options["dtype"] or options["kv_dtype"]:
            raise click.UsageError("--profile has its own --dtype and --kv-dtype; leave them out")
        costs = table = measured.read(options["profile"])
        dtypes = {"dtype": table.table.quant or table.table.dtype, "kv_dtype": table.table.dtype}
        table.check(architecture, **given)
        widest, given = table.widest, {name: getattr(table.table, name) for name in _DEFAULTS}
    kind = gpu.named(options["gpu"] or "h100")
    setting = Setting(gpu=kind, **dtypes, **{**_DEFAULTS, **given})
    known_gpu = options["gpu"] or not options["profile"]
    return Conditions(
        costs=costs or estimated(architecture, setting),
        memory=lambda x: gpu_bytes(x, setting),
        tp_size=setting.tp_size,
        kv_element_bytes=setting.kv_bytes,
        capacity=kind.memory_bytes - RUNTIME_BYTES if known_gpu else None,
        widest=widest,
    )


def _outputs(output: Path | None, solutions: int) -> list[Path]:
    """A file for each plan. Raises UserError where one is there already."""
    if output is None:
        return []
    files = [output, *(output.with_stem(f"{output.stem}-{n}") for n in range(2, solutions + 1))]
    for file in files:
        if os.path.lexists(file):
            raise UserError(f"{file}: exists; remove it or choose another output")
    if not output.absolute().parent.is_dir():
        raise UserError(f"{output.absolute().parent}: no such directory; create it first")
    return files


def _write(found: Sequence[Plan], files: Sequence[Path]) -> None:
    """Each plan in its file, written beside it and renamed."""
    from builder import plan as plans

    partial = [x.with_name(f".{x.name}.partial-{os.getpid()}") for x in files[: len(found)]]
    try:
        for one, temporary in zip(found, partial, strict=False):
            plans.write(one, temporary)
        for temporary, file in zip(partial, files, strict=False):
            temporary.rename(file)
    finally:
        for temporary in partial:
            temporary.unlink(missing_ok=True)


def _notes(proposals: Sequence[Proposal], conditions: Conditions, solutions: int) -> list[str]:
    notes = []
    if len(proposals) < solutions:
        notes.append(
            f"{len(proposals)} plans meet the targets at that difference, {solutions} were asked for"
        )
    for number, proposal in enumerate(proposals, start=1):
        which = f"plan {number}: " if solutions > 1 else ""
        if proposal.gap:
            notes.append(
                f"{which}time ran out; a plan up to {proposal.gap:.1%} better may exist (--time-limit)"
            )
        if conditions.capacity is not None and proposal.figures.bytes > conditions.capacity:
            notes.append(
                f"{which}{proposal.figures.bytes / 1e9:.1f} GB do not fit into the GPU's "
                f"{conditions.capacity / 1e9:.1f} GB; raise --tp or lower --batch or --context"
            )
        for group in proposal.groups:
            if group.confirmed is False:
                notes.append(
                    f"{which}group {group.first}-{group.last}: its members depend on one another more than "
                    f"blocks usually do ({group.dependency:.3f}, median {group.typical:.3f})"
                )
    return notes


def _text(
    proposals: Sequence[Proposal], conditions: Conditions, files: Sequence[str], notes: Sequence[str]
) -> str:
    lines = [f"times are {conditions.costs.source}", ""]
    for number, proposal in enumerate(proposals):
        if len(proposals) > 1:
            lines.append(f"plan {number + 1}")
        lines += [*_changes(proposal), "", *_figures(proposal, conditions), ""]
    lines += [f"note: {note}" for note in notes]
    lines += [f"{file}: written" for file in files]
    return "\n".join(lines).rstrip()


def _changes(proposal: Proposal) -> list[str]:
    """What the plan does, a line for each kind of change and each group."""
    from builder.plan import format_numbers

    plan = proposal.plan
    rows = [
        ("drop attention", format_numbers(plan.drop_attention)),
        ("drop FFN", format_numbers(plan.drop_ffn)),
    ]
    for heads in sorted({n for _, n in plan.kv_heads}):
        layers = tuple(i for i, n in plan.kv_heads if n == heads)
        rows.append((f"{heads} KV heads", format_numbers(layers)))
    for width in sorted({len(x) for _, x in plan.ffn_channels}):
        layers = tuple(i for i, x in plan.ffn_channels if len(x) == width)
        rows.append((f"FFN width {width:,}", format_numbers(layers)))
    for group in proposal.groups:
        depends = "" if group.dependency is None else f", dependency {group.dependency:.3f}"
        usual = "" if group.typical is None else f" (model's median {group.typical:.3f})"
        what = f"{group.first}-{group.last}: {group.members} FFNs, width {group.width:,}{depends}{usual}"
        rows.append(("fuse", what))
    rows = [row for row in rows if row[1]]
    return [f"{name:<22} {what}" for name, what in rows] or ["nothing to change"]


def _figures(proposal: Proposal, conditions: Conditions) -> list[str]:
    basis = "measured" if conditions.costs.measured else "estimated"
    now, then = proposal.now, proposal.figures
    rows = [
        ("ms per token", f"{now.seconds * 1e3:.3f}", f"{then.seconds * 1e3:.3f}", basis),
        ("times as fast", "1", f"{proposal.speedup:.3f}", basis),
        ("tokens/s a sequence", f"{1 / now.seconds:.1f}", f"{1 / then.seconds:.1f}", basis),
        ("GB, weights and KV", f"{now.bytes / 1e9:.3f}", f"{then.bytes / 1e9:.3f}", "estimated"),
        ("KV bytes per token", f"{now.kv_bytes_per_token:,}", f"{then.kv_bytes_per_token:,}", "counted"),
        ("all-reduces per token", f"{now.all_reduces_per_token}", f"{then.all_reduces_per_token}", "counted"),
        ("layers", f"{now.layers}", f"{then.layers}", "counted"),
        ("parameters", f"{now.parameters:,}", f"{then.parameters:,}", "counted"),
        ("KL to the model", "0", *_quality(proposal)),
    ]
    head = f"{'':<22} {'now':>16} {'planned':>16}"
    return [head, *(f"{name:<22} {a:>16} {b:>16}  {kind}" for name, a, b, kind in rows)]


def _quality(proposal: Proposal) -> tuple[str, str]:
    if proposal.kl is not None and proposal.fusing_kl is not None:
        return f"{proposal.kl:.4f}", f"estimated: scores added, {proposal.fusing_kl:.4f} of them for fusing"
    return "not known", "give --analysis, with all that is changed in it"
