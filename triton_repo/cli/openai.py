"""The serve-openai command."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from builder.options import DIRECTORY, JSON, Finite, emit
from triton_repo.cli.serving_options import check_host
from triton_repo.openai import launch


@click.command("serve-openai")
@click.argument("address")
@click.option(
    "--tokenizer", type=DIRECTORY, required=True, help="The Hugging Face directory that the engine came from."
)
@click.option("--host", default=launch.HOST, show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=launch.PORT,
    show_default=True,
    help="0 takes a free one.",
)
@click.option("--model-name", help="For clients. Default: the name of the tokenizer's directory.")
@click.option(
    "--max-seq-len",
    type=click.IntRange(2),
    help="Tokens of prompt and answer. Default: what Triton tells.",
)
@click.option(
    "--timeout", type=Finite(0, min_open=True), default=3600, show_default=True, help="Seconds for a request."
)
@click.option(
    "--grace",
    type=Finite(0),
    default=launch.GRACE_S,
    show_default=True,
    help="Seconds that running requests get when told to end.",
)
@JSON
def serve_openai(
    address: str,
    tokenizer: Path,
    host: str,
    port: int,
    model_name: str | None,
    max_seq_len: int | None,
    timeout: float,
    grace: float,
    as_json: bool,
) -> None:
    """Serve OpenAI's completions and chat API in front of a Triton server.

    ADDRESS is host:port of Triton's gRPC: of `deploy --serve` the port after --http-port. Chat needs a
    chat template in the tokenizer's directory.

    \b
    Examples:
        ffn-fusion deploy repository --serve &
        ffn-fusion serve-openai 127.0.0.1:8001 --tokenizer model
        curl localhost:9000/v1/completions -d '{"model": "model", "prompt": "def", "max_tokens": 8}'
    """
    launch.check()
    check_host(host)
    from triton_repo.openai.serve import Settings, serve

    settings = Settings(
        address=address,
        tokenizer=tokenizer,
        host=host,
        port=port,
        model_name=model_name,
        max_seq_len=max_seq_len,
        timeout_s=timeout,
        grace_s=grace,
    )
    serve(settings, lambda url: _say(url, as_json))


def _say(url: str, as_json: bool) -> None:
    emit({"url": url}, as_json, f"serving OpenAI's API on {url}")
    sys.stdout.flush()
