"""From a model to measured latency on a node of H100 or H200: see README.md beside this file.

python examples/h100_node/run.py --model llama-3.1-70b --tp 8 -o WORK
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import click
import evidence
from preconditions import check_choice, check_machine, memory_problems
from recipe import KINDS, PORTS_APART, Choice, cost, engine_stages, prompts, pytorch_stages, triton_stages
from shapes import SHAPES
from stages import Runner, Stage

from builder.errors import UserError
from engines import hardware

GPUS = 8
GPU_BYTES = 81559 << 20  # of an H100, where none is here to ask
SPARE = 0.05  # of GPU memory, where two servers share what is there by estimates
PATH = click.Path(path_type=Path)


@click.command()
@click.option("--model", required=True, help=f"A directory, a config.json, or {', '.join(SHAPES)}.")
@click.option("--tp", "tp_size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--path", type=click.Choice(["engine", "pytorch", "both"]), default="both", show_default=True)
@click.option("--quant", type=click.Choice(["fp8"]), help="FP8 weights and KV cache; --path engine only.")
@click.option("--calib", type=PATH, multiple=True, help="Text for FP8. Default: a small one built in.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of random weights.")
@click.option("--drop-attention", metavar="LAYERS", help="In the place of the shape's.")
@click.option("--group", "groups", multiple=True, metavar="FIRST-LAST", help="In the place of the shape's.")
@click.option("--max-batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--max-seq-len", type=click.IntRange(4), default=4096, show_default=True)
@click.option("--workers", type=click.IntRange(1), help="Engine ranks built at once. Default: all.")
@click.option("--concurrency", default="1,32", show_default=True, help="Clients at once, a list.")
@click.option(
    "--http-port",
    type=click.IntRange(1, 65535 - PORTS_APART - 2),
    default=8000,
    show_default=True,
    help=f"Of the baseline's server; the fused one's is {PORTS_APART} higher.",
)
@click.option("--until", metavar="STAGE", help="Stop after this stage.")
@click.option("--dry-run", is_flag=True, help="Print the commands and what they need; runs anywhere.")
@click.option("--json", "as_json", is_flag=True, help="The dry run as JSON.")
@click.option("-o", "--output", "work", type=PATH, required=True, help="The directory to work in.")
def main(
    model: str,
    path: str,
    seed: int,
    until: str | None,
    dry_run: bool,
    as_json: bool,
    work: Path,
    **given: Any,
) -> None:
    """Measure a model against its fused form; a second call goes on where the first one stopped."""
    if given["quant"] and path != "engine":
        raise click.UsageError("--quant fp8 makes engines; give --path engine")
    if given["calib"] and not given["quant"]:
        raise click.UsageError("--calib is for --quant fp8")
    choice = choose(model, seed, work.absolute(), given)
    stages, left_out = plan(choice, path, until)
    check_choice(choice, stages)
    if dry_run:
        show(choice, stages, left_out, as_json)
        return
    run(choice, stages, left_out)


def choose(model: str, seed: int, work: Path, given: dict[str, Any]) -> Choice:
    """The model by name or path, with its own layers and groups where none were given."""
    shape = SHAPES.get(model)
    source = shape.config if shape else Path(model).absolute()
    if not source.exists():
        raise UserError(f"--model {model}: no such file or directory; shapes are {', '.join(SHAPES)}")
    if shape and not given["drop_attention"] and not given["groups"]:
        given = {**given, "drop_attention": shape.drop_attention, "groups": shape.groups}
    random = source.is_file()
    return Choice(model=source, seed=seed if random else None, work=work, **given)


def plan(choice: Choice, path: str, until: str | None) -> tuple[list[Stage], dict[str, str]]:
    """The stages in order, and those that this machine has no room for, with the reason."""
    costs = {kind: cost(choice, kind, engine=path != "pytorch") for kind in KINDS}
    gpus, memory = _gpus()
    stages: list[Stage] = []
    left_out: dict[str, str] = {}
    for name, of_path in (("engine", engine_stages), ("pytorch", pytorch_stages)):
        if path not in (name, "both"):
            continue
        stages += of_path(choice, costs)
        triton = triton_stages(choice, name, costs, gpus, memory)
        needed = triton[-1].needs["gpu"]
        if needed > (1 - SPARE) * memory:
            left_out[triton[-1].name] = (
                f"both servers need {needed / 1e9:.1f} GB of each GPU, it has {memory / 1e9:.1f} and "
                f"{SPARE:.0%} should stay free; "
                "compare-latency needs both at once: lower --max-batch-size or --max-seq-len, give "
                "--path engine --quant fp8, or use larger GPUs"
            )
            triton = triton[:-1]
        stages += triton
    stages = list({stage.name: stage for stage in stages}.values())  # both paths write the fused model
    return _until(stages, until), left_out


def _until(stages: list[Stage], until: str | None) -> list[Stage]:
    names = [stage.name for stage in stages]
    if until is None:
        return stages
    if until not in names:
        raise click.UsageError(f"--until {until}: no such stage; they are {', '.join(names)}")
    return stages[: names.index(until) + 1]


def _gpus() -> tuple[tuple[int, ...], int]:
    """Numbers of the GPUs and the memory of the smallest; those of a node where there are none."""
    found = hardware.gpus()
    if not found:
        return tuple(range(GPUS)), GPU_BYTES
    return tuple(gpu.index for gpu in found), min(gpu.total_memory for gpu in found)


def show(choice: Choice, stages: list[Stage], left_out: dict[str, str], as_json: bool) -> None:
    """Every command with the bytes it needs."""
    disk = sum(stage.needs.get("disk", 0) for stage in stages)
    if as_json:
        listed = [{"name": s.name, "command": list(s.command), "needs": s.needs} for s in stages]
        click.echo(json.dumps({"stages": listed, "left_out": left_out, "disk": disk}, indent=2))
        return
    for stage in stages:
        needs = ", ".join(f"{size / 1e9:.1f} GB {_WHAT[what]}" for what, size in stage.needs.items())
        click.echo(f"{stage.name}{': ' if needs else ''}{needs}\n    {stage.line}")
    for name, reason in left_out.items():
        click.echo(f"{name}: left out: {reason}")
    weights = "its own weights" if choice.seed is None else f"random weights of seed {choice.seed}"
    click.echo(f"{choice.model}, {weights}: {disk / 1e9:.1f} GB of disk in all")
    click.echo(
        "GPU memory: weights and KV cache counted, activations estimated, 2.1 GB assumed for the runtime; "
        "host memory estimated."
    )
    if not hardware.gpus():
        click.echo(f"No GPU here: counted for {GPUS} of {GPU_BYTES / 1e9:.1f} GB each, as an H100 has them.")
    for problem in memory_problems(stages, _gpus()[1]):
        click.echo(f"does not fit here: {problem}")


_WHAT = {"disk": "of disk", "gpu": "of each GPU", "host": "of host memory"}


def run(choice: Choice, stages: list[Stage], left_out: dict[str, str]) -> None:
    """Run the stages, and pack the evidence whether they went well or not."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))  # the stage ends as well
    runner = Runner(choice.work)
    missing = [stage for stage in stages if not runner.is_done(stage)]
    needed, free = sum(s.needs.get("disk", 0) for s in missing), shutil.disk_usage(choice.work).free
    if needed > free:
        raise UserError(
            f"{choice.work}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free; use another disk"
        )
    for problem in memory_problems(missing, _gpus()[1]):
        raise UserError(problem)
    check_machine(choice, missing)
    for name, reason in left_out.items():
        click.echo(f"{name}: left out: {reason}")
    with runner.alone():
        choice.prompts.write_text(prompts(choice), encoding="utf-8")
        try:
            runner.run(stages, left_out)
        finally:
            packed = evidence.pack(choice.work, vars(choice))
            click.echo(f"{packed}: {packed.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        click.echo("error: " + " ".join(str(error).split()), err=True)
        sys.exit(1)
