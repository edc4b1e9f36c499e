"""fuse: a smaller model as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from builder.cli.source import random_facts, random_text, read_model
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
)

if TYPE_CHECKING:
    from builder.checkpoint import Checkpoint
    from builder.plan import Plan


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
    source, parent = team.together(lambda: read_model(model, random))
    child = team.together(lambda: _changed(parent, plan, random is not None and options["no_fuse"]))
    mapping = manifest.layer_mapping(child.architecture, len(parent.architecture.layers))
    made_up = team.together(lambda: random_facts(model, random))
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
        emit({**result, **made_up}, as_json, text + random_text(made_up))


def _changed(parent: Checkpoint, plan: Plan, as_it_is: bool) -> Checkpoint:
    child = plan.apply(parent)
    if child.architecture == parent.architecture and not as_it_is:
        raise UserError("fuse: nothing to drop and no run to fuse; name layers with --drop-attention")
    return child
