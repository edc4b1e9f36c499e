"""The deploy command."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from builder.errors import UserError
from builder.options import DIRECTORY, JSON, emit


@click.command()
@click.argument("source", type=DIRECTORY)
@click.option("-o", "--output", type=DIRECTORY, help="The model repository to write.")
@click.option("--tokenizer", type=DIRECTORY, help="The Hugging Face directory that holds tokenizer.json.")
@click.option("--serve", is_flag=True, help="Serve in the foreground until interrupted.")
@click.option("--write-only", is_flag=True, help="Write the repository without trying it.")
@click.option(
    "--http-port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one."
)
@JSON
def deploy(
    source: Path,
    output: Path | None,
    tokenizer: Path | None,
    serve: bool,
    write_only: bool,
    http_port: int,
    as_json: bool,
) -> None:
    """Write a Triton model repository for SOURCE, an engine, and try it: one token must come back.

    SOURCE may also be a repository written before; then --serve serves it as it is.

    \b
    Examples:
        ffn-fusion deploy engine --tokenizer model -o repository
        ffn-fusion deploy repository --serve
        curl -d '{"text_input": "def", "max_tokens": 8}' localhost:8000/v2/models/ensemble/generate
    """
    from triton_repo.server import Server

    if serve and write_only:
        raise click.UsageError("--serve and --write-only contradict each other")
    repository = _repository(source, output, tokenizer)
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


def _repository(source: Path, output: Path | None, tokenizer: Path | None) -> Path:
    """The repository to serve: SOURCE itself, or one written from the engine SOURCE."""
    if (source / "ensemble" / "config.pbtxt").is_file():
        if output or tokenizer:
            raise click.UsageError("SOURCE is a repository already; leave out --output and --tokenizer")
        return source
    from builder.storage import read_json

    if not (source / "config.json").is_file():
        raise UserError(
            f"{source}: neither an engine nor a model repository; make an engine with build-engine"
        )
    if "model_type" in read_json(source / "config.json"):
        raise UserError(
            f"{source}: a Hugging Face directory; make an engine of it with convert and build-engine"
        )
    if output is None or tokenizer is None:
        raise click.UsageError("an engine needs --tokenizer DIR and -o REPOSITORY")
    from triton_repo.repository import write_repository

    write_repository(source, tokenizer, output)
    return output
