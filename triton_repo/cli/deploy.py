"""The deploy command."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from builder.errors import UserError
from builder.options import DIRECTORY, JSON, emit
from triton_repo.cli.deploy_options import deploy_options, flag_of, gpu_options, split
from triton_repo.cli.serving_options import given, run, serving_options, take

if TYPE_CHECKING:
    from triton_repo.deployment import Deployment
    from triton_repo.repository import Prepared


@click.command()
@click.argument("source", type=DIRECTORY)
@click.option("-o", "--output", type=DIRECTORY, help="The model repository to write.")
@click.option("--tokenizer", type=DIRECTORY, help="The Hugging Face directory that holds tokenizer.json.")
@click.option("--serve", is_flag=True, help="Serve until interrupted, and repair what dies.")
@click.option("--write-only", is_flag=True, help="Write the repository without trying it.")
@click.option(
    "--http-port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="gRPC and metrics take the next two; 0 takes free ones.",
)
@serving_options
@gpu_options
@JSON
def deploy(
    source: Path,
    output: Path | None,
    tokenizer: Path | None,
    serve: bool,
    write_only: bool,
    http_port: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Write a Triton model repository for SOURCE, an engine directory, and say how to start it.

    An embedded engine is tried: one token must come back. TensorRT-LLM's needs its container; the command
    that starts it there is printed, and --manifests writes it for docker, compose, Kubernetes and Slurm.

    SOURCE may also be a repository written before; then --serve serves it as it is.

    \b
    Examples:
        ffn-fusion deploy engine --tokenizer model -o repository
        ffn-fusion deploy repository --serve
        ffn-fusion deploy repository --serve --detach --openai-port 9000
        curl -d '{"text_input": "def", "max_tokens": 8}' localhost:8000/v2/models/ensemble/generate
        ffn-fusion deploy engine --tokenizer model -o repository --manifests start   # of TensorRT-LLM
    """
    if serve and write_only:
        raise click.UsageError("--serve and --write-only contradict each other")
    serving = take(options)
    if not serve and given(serving):
        raise click.UsageError(f"{given(serving)[0]} belongs to --serve")
    how, start = split(options)
    prepared, deployment = _source(source, output, tokenizer, how)
    if deployment is None:
        if start:
            raise click.UsageError(f"{flag_of(next(iter(start)))} is for GPU engines")
        if prepared is not None:
            prepared.write()
        repository = output if prepared and output else source
        if serve:
            run(repository, http_port, as_json, **serving)
        else:
            _try_embedded(repository, write_only, as_json)
        return
    if given(serving):
        raise click.UsageError(
            f"{given(serving)[0]} is for embedded engines; change what --manifests writes for others"
        )
    _check_start(deployment, start, serve, http_port)
    if prepared is not None:
        prepared.write()
    _emit_start(deployment, start, http_port, as_json)
    if serve:
        from triton_repo.container import serve as serve_container

        serve_container(deployment, http_port, lambda line: click.echo(line, err=True))


def _check_start(deployment: Deployment, start: dict[str, Any], serve: bool, http_port: int) -> None:
    """All that can be wrong with the start, before anything is written."""
    from triton_repo import container
    from triton_repo.launch import files

    if http_port == 0:
        raise click.UsageError("--http-port 0 is for embedded engines; give the port of the GPU server")
    if "claim" in start and "manifests" not in start:
        raise click.UsageError("--claim needs --manifests DIR")
    if "claim" in start and not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", start["claim"]):
        raise UserError(f"claim: {start['claim']!r} is no name in Kubernetes; use a-z, 0-9, - and .")
    place = {"http_port": http_port, "gpus_per_node": start.get("gpus_per_node", 8)}
    files.command_lines(deployment, **place)
    if "manifests" in start:
        if start["manifests"].exists():
            raise UserError(
                f"{start['manifests']}: exists; remove it or choose another --manifests directory"
            )
        files.contents(deployment, **place, claim=start.get("claim", "models"))
    if serve:
        container.check(deployment, http_port)


def _try_embedded(repository: Path, write_only: bool, as_json: bool) -> None:
    from triton_repo.server import Server

    if write_only:
        emit({"repository": str(repository), "tried": False}, as_json, f"{repository}: written, not tried")
        return
    with Server(repository):
        pass
    text = f"{repository}: served a token; now: ffn-fusion deploy {repository} --serve"
    emit({"repository": str(repository), "tried": True}, as_json, text)


def _emit_start(deployment: Deployment, start: dict[str, Any], http_port: int, as_json: bool) -> None:
    """How to start a GPU repository; --manifests writes it as files."""
    from triton_repo.launch import files, images

    place = {"http_port": http_port, "gpus_per_node": start.get("gpus_per_node", 8)}
    written = []
    if "manifests" in start:
        written = files.write(deployment, start["manifests"], **place, claim=start.get("claim", "models"))
    left_out = files.left_out(deployment) if written else {}
    lines = files.command_lines(deployment, **place)
    image = images.image_of(deployment)
    result = {
        "repository": str(deployment.repository),
        "tried": False,
        "flavour": deployment.flavour,
        "model": deployment.text_model,
        "image": image.name,
        "start": lines,
        "files": [str(file) for file in written],
        "left_out": left_out,
    }
    text = [f"{deployment.repository}: {deployment.flavour} flavour, written, not tried"]
    if image.by_default:
        text.append(
            f"{image.name} is the newest, with TensorRT-LLM {image.tensorrt_llm}; the directory was checked "
            f"for {deployment.tensorrt_llm or 'none'}"
        )
    text += [line for where, command in lines.items() for line in ("", f"{where}:", command)]
    text += ["", *map(str, written)] if written else []
    text += [f"{name} is left out: {why}" for name, why in left_out.items()]
    emit(result, as_json, "\n".join(text))
    sys.stdout.flush()


def _source(
    source: Path, output: Path | None, tokenizer: Path | None, how: dict[str, Any]
) -> tuple[Prepared | None, Deployment | None]:
    """The repository to write for the engine SOURCE, None where SOURCE is one; the deployment of a GPU's."""
    from triton_repo import repository

    if any((source / name / "config.pbtxt").is_file() for name in ("ensemble", "tensorrt_llm")):
        if output or tokenizer or how:
            given = "--output and --tokenizer" if output or tokenizer else flag_of(next(iter(how)))
            raise click.UsageError(f"SOURCE is a repository already; leave out {given}")
        return None, repository.read_deployment(source)
    _refuse_other(source)
    if output is None:
        raise click.UsageError("an engine needs -o REPOSITORY")
    if output.exists():
        raise UserError(f"{output}: exists; remove it or choose another output directory")
    prepared = repository.prepare(source, tokenizer, output, deploy_options(how) if how else None)
    return prepared, prepared.deployment


def _refuse_other(source: Path) -> None:
    """Say what a directory is that is no engine."""
    from builder.storage import read_json

    config = source / "config.json"
    if (source / "llm.yaml").is_file():
        return
    if not config.is_file():
        raise UserError(
            f"{source}: neither an engine nor a model repository; make an engine with build-engine"
        )
    values = read_json(config)
    if "model_type" in values:
        raise UserError(
            f"{source}: a Hugging Face directory; make an engine of it: convert and build-engine, or "
            "build-engine --backend tensorrt-llm for the PyTorch backend"
        )
    if "architecture" in values and "mapping" in values:
        raise UserError(f"{source}: a TensorRT-LLM checkpoint; make an engine of it with build-engine")
