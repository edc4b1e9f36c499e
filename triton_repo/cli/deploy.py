"""The deploy command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from builder.errors import UserError
from builder.options import DIRECTORY, JSON, emit
from triton_repo.cli.deploy_options import deploy_options, flag_of, gpu_options, split

if TYPE_CHECKING:
    from triton_repo.deployment import Deployment


@click.command()
@click.argument("source", type=DIRECTORY)
@click.option("-o", "--output", type=DIRECTORY, help="The model repository to write.")
@click.option("--tokenizer", type=DIRECTORY, help="The Hugging Face directory that holds tokenizer.json.")
@click.option("--serve", is_flag=True, help="Serve in the foreground until interrupted.")
@click.option("--write-only", is_flag=True, help="Write the repository without trying it.")
@click.option(
    "--http-port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="gRPC and metrics take the next two; 0 takes free ones.",
)
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
        curl -d '{"text_input": "def", "max_tokens": 8}' localhost:8000/v2/models/ensemble/generate
        ffn-fusion deploy engine --tokenizer model -o repository --manifests start   # of TensorRT-LLM
    """
    if serve and write_only:
        raise click.UsageError("--serve and --write-only contradict each other")
    how, start = split(options)
    repository, deployment = _repository(source, output, tokenizer, how)
    if deployment is None:
        if start:
            raise click.UsageError(f"{flag_of(next(iter(start)))} is for GPU engines")
        _serve_embedded(repository, serve, write_only, http_port, as_json)
        return
    if http_port == 0:
        raise click.UsageError("--http-port 0 is for embedded engines; give the port of the GPU server")
    _emit_start(deployment, start, http_port, as_json)
    if serve:
        from triton_repo.container import serve as serve_container

        serve_container(deployment, http_port, lambda line: click.echo(line, err=True))


def _serve_embedded(repository: Path, serve: bool, write_only: bool, http_port: int, as_json: bool) -> None:
    from triton_repo.server import Server

    if write_only:
        emit({"repository": str(repository), "tried": False}, as_json, f"{repository}: written, not tried")
        return
    with Server(repository, http_port=http_port if serve else 0) as server:
        if serve:
            url = f"{server.url}/v2/models/ensemble/generate"
            emit(
                {"repository": str(repository), "url": server.url}, as_json, f"serving {repository} on {url}"
            )
            sys.stdout.flush()
            server.wait()
    if not serve:
        text = f"{repository}: served a token; now: ffn-fusion deploy {repository} --serve"
        emit({"repository": str(repository), "tried": True}, as_json, text)


def _emit_start(deployment: Deployment, start: dict[str, Any], http_port: int, as_json: bool) -> None:
    """How to start a GPU repository; --manifests writes it as files."""
    from triton_repo.launch import files, images

    place = {"http_port": http_port, "gpus_per_node": start.get("gpus_per_node", 8)}
    written = []
    if "manifests" in start:
        written = files.write(deployment, start["manifests"], **place, claim=start.get("claim", "models"))
    elif "claim" in start:
        raise click.UsageError("--claim needs --manifests DIR")
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
    }
    text = [f"{deployment.repository}: {deployment.flavour} flavour, written, not tried"]
    if image.by_default:
        text.append(
            f"{image.name} is the newest, with TensorRT-LLM {image.tensorrt_llm}; the directory was checked "
            f"for {deployment.tensorrt_llm or 'none'}"
        )
    text += [line for where, command in lines.items() for line in ("", f"{where}:", command)]
    text += ["", *map(str, written)] if written else []
    emit(result, as_json, "\n".join(text))
    sys.stdout.flush()


def _repository(
    source: Path, output: Path | None, tokenizer: Path | None, how: dict[str, Any]
) -> tuple[Path, Deployment | None]:
    """The repository to serve, SOURCE itself or one written from the engine SOURCE; its GPU deployment."""
    from triton_repo import repository

    if any((source / name / "config.pbtxt").is_file() for name in ("ensemble", "tensorrt_llm")):
        if output or tokenizer or how:
            given = "--output and --tokenizer" if output or tokenizer else flag_of(next(iter(how)))
            raise click.UsageError(f"SOURCE is a repository already; leave out {given}")
        return source, repository.read_deployment(source)
    from builder.storage import read_json

    if not (source / "config.json").is_file() and not (source / "llm.yaml").is_file():
        raise UserError(
            f"{source}: neither an engine nor a model repository; make an engine with build-engine"
        )
    if (source / "config.json").is_file() and "model_type" in read_json(source / "config.json"):
        raise UserError(
            f"{source}: a Hugging Face directory; make an engine of it: convert and build-engine, or "
            "build-engine --backend tensorrt-llm for the PyTorch backend"
        )
    if output is None:
        raise click.UsageError("an engine needs -o REPOSITORY")
    return output, repository.write_repository(
        source, tokenizer, output, deploy_options(how) if how else None
    )
