"""The engine's commands: build-engine, generate."""

from __future__ import annotations

import time
from pathlib import Path

import click

from builder.errors import UserError
from builder.options import DIRECTORY, JSON, emit


@click.command("build-engine")
@click.argument("checkpoint", type=DIRECTORY)
@click.option(
    "--backend",
    type=click.Choice(["embedded", "tensorrt-llm"]),
    default="embedded",
    show_default=True,
    help="embedded runs on CPUs; tensorrt-llm needs TensorRT-LLM and an H100 or H200.",
)
@click.option(
    "--max-batch-size", type=click.IntRange(1), default=4, show_default=True, help="Requests at once."
)
@click.option(
    "--max-input-len", type=click.IntRange(1), help="Tokens of a prompt. Default: half of --max-seq-len."
)
@click.option(
    "--max-seq-len", type=click.IntRange(4), help="Prompt and output together. Default: the model's limit."
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Weights and KV cache; auto is the checkpoint's.",
)
@click.option("-o", "--output", type=DIRECTORY, required=True, help="The engine directory.")
@JSON
def build_engine(
    checkpoint: Path,
    backend: str,
    max_batch_size: int,
    max_input_len: int | None,
    max_seq_len: int | None,
    dtype: str,
    output: Path,
    as_json: bool,
) -> None:
    """Compile CHECKPOINT, a TensorRT-LLM checkpoint directory, into an engine.

    \b
    Example:
        build-engine checkpoint --max-batch-size 8 --max-seq-len 2048 -o engine
    """
    if backend == "tensorrt-llm":
        from engines import trtllm

        trtllm.build(checkpoint)
    from engines.embedded.compilation import build

    start = time.monotonic()
    manifest = build(
        checkpoint,
        output,
        max_batch_size=max_batch_size,
        max_input_len=max_input_len,
        max_seq_len=max_seq_len,
        dtype=None if dtype == "auto" else dtype,
        progress=lambda line: click.echo(line, err=True),
    )
    seconds = round(time.monotonic() - start, 1)
    limits = {n: getattr(manifest, n) for n in ("max_batch_size", "max_input_len", "max_seq_len")}
    result = {"engine": str(output), "backend": manifest.backend, "tp_size": manifest.tp_size, **limits}
    text = (
        f"{output}: {manifest.backend} engine, TP {manifest.tp_size}, {manifest.dtype}, built in {seconds} s"
    )
    emit({**result, "dtype": manifest.dtype, "seconds": seconds}, as_json, text)


@click.command()
@click.argument("engine", type=DIRECTORY)
@click.option(
    "--tokenizer", type=DIRECTORY, required=True, help="The Hugging Face directory with tokenizer.json."
)
@click.option("--prompt", required=True, help="The text to continue.")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--temperature", type=float, help="Above 0 samples; 0 is greedy. Default: greedy.")
@click.option("--top-k", type=int, help="Sample among the k likeliest tokens.")
@click.option("--top-p", type=float, help="Sample among the likeliest tokens whose probabilities reach p.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same text.")
@JSON
def generate(
    engine: Path,
    tokenizer: Path,
    prompt: str,
    max_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Continue a prompt with ENGINE, on as many ranks as it was built for; text streams to stdout.

    \b
    Example:
        ffn-fusion generate engine --tokenizer model --prompt 'import ' --max-tokens 32
    """
    from builder import tokenizer as tokenizers
    from engines.embedded.session import EngineError, Request, Session

    text = tokenizers.TextStream(tokenizer=tokenizers.load(tokenizer))
    ends = tokenizers.end_ids(tokenizer)
    request = Request(
        input_ids=tuple(text.tokenizer.encode(prompt).ids),
        max_tokens=max_tokens,
        end_id=ends[0] if ends else None,
        stop_words=tuple((end,) for end in ends[1:]),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    pieces, reason = [], None
    try:
        with Session(engine) as session:
            for output in session.generate(request):
                reason = output.finish_reason
                pieces.append(text.push(output.token_ids, reason is not None))
                if not as_json:
                    click.echo(pieces[-1], nl=False)
    except EngineError as error:
        raise UserError(f"{engine}: {error}") from error
    result = {"text": "".join(pieces), "token_ids": text.ids, "finish_reason": reason}
    emit(result, as_json, "")


COMMANDS = (build_engine, generate)
