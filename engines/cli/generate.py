"""generate: text from an embedded engine, without a server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from builder.errors import UserError
from builder.options import DIRECTORY, JSON, Finite, emit

if TYPE_CHECKING:
    from tokenizers import Tokenizer


# The options that are fields of engines.embedded.request.Request under the same name.
_SAMPLING = (
    click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True),
    click.option("--min-tokens", type=click.IntRange(0), default=0, help="No end before so many tokens."),
    click.option("--temperature", type=float, help="Above 0 samples; 0 is greedy. Default: greedy."),
    click.option("--top-k", type=int, help="Sample among the k likeliest tokens."),
    click.option("--top-p", type=float, help="Sample among the likeliest whose probabilities reach p."),
    click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same text."),
    click.option(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="Above 1 makes tokens of prompt and output less likely.",
    ),
    click.option(
        "--presence-penalty",
        type=float,
        default=0.0,
        help="Subtracted once where a token was in prompt or output.",
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        default=0.0,
        help="Subtracted for each time a token was in prompt or output.",
    ),
)


def _sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_SAMPLING):
        command = option(command)
    return command


@click.command()
@click.argument("engine", type=DIRECTORY)
@click.option(
    "--tokenizer", type=DIRECTORY, required=True, help="The Hugging Face directory with tokenizer.json."
)
@click.option("--prompt", required=True, help="The text to continue.")
@_sampling_options
@click.option(
    "--stop-words", multiple=True, metavar="TEXT", help="The text ends after these tokens; repeatable."
)
@click.option(
    "--bad-words",
    multiple=True,
    metavar="TEXT",
    help="Its tokens are never said; ' x' has others than 'x'. Repeatable.",
)
@click.option(
    "--hosts",
    metavar="A:N,B:N",
    help="Where ranks run, this host first. Default: all here.",
)
@click.option(
    "--step-timeout",
    type=Finite(0, min_open=True),
    default=600,
    show_default=True,
    help="Seconds without a step after which the engine is killed.",
)
@click.option("--log-probs", is_flag=True, help="With --json: the log-probability of each token.")
@JSON
def generate(
    engine: Path,
    tokenizer: Path,
    prompt: str,
    stop_words: tuple[str, ...],
    bad_words: tuple[str, ...],
    hosts: str | None,
    step_timeout: float,
    log_probs: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue a prompt with ENGINE, on as many ranks as it was built for; text streams to stdout.

    \b
    Examples:
        ffn-fusion generate engine --tokenizer model --prompt 'import ' --max-tokens 32
        ffn-fusion generate engine --tokenizer model --prompt 'Once' --temperature 0.8 --top-p 0.95 --seed 7
    """
    for name, texts in (("prompt", (prompt,)), ("stop-words", stop_words), ("bad-words", bad_words)):
        for given in texts:
            _check_text(name, given)
    if log_probs and not as_json:
        raise click.UsageError("--log-probs is for --json; add it")
    from builder import tokenizer as tokenizers
    from engines.embedded.session import EngineError, Request, Session

    text = tokenizers.TextStream(tokenizer=tokenizers.load(tokenizer))
    ends = tokenizers.end_ids(tokenizer)
    request = Request(
        input_ids=tuple(text.tokenizer.encode(prompt).ids),
        end_id=ends[0] if ends else None,
        stop_words=(*((end,) for end in ends[1:]), *_words(text.tokenizer, stop_words)),
        bad_words=_words(text.tokenizer, bad_words),
        return_log_probs=log_probs,
        **sampling,
    )
    pieces, outputs = [], []
    try:
        placed = hosts.split(",") if hosts else ()
        with Session(engine, hosts=placed, step_timeout_s=step_timeout) as session:
            for output in session.generate(request):
                outputs.append(output)
                pieces.append(text.push(output.token_ids, output.finish_reason is not None))
                if not as_json:
                    click.echo(pieces[-1], nl=False)
    except EngineError as error:
        raise UserError(f"{engine}: {error}") from error
    last = outputs[-1]
    result: dict[str, Any] = {"text": "".join(pieces), "token_ids": text.ids}
    result["finish_reason"] = last.finish_reason
    if log_probs:
        result["log_probs"] = [x for output in outputs for x in output.log_probs]
        result["cum_log_prob"] = last.cum_log_prob
    emit(result, as_json, "")


def _check_text(name: str, text: str) -> None:
    if not text:
        raise click.UsageError(f"--{name}: empty; give some text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise click.UsageError(f"--{name}: {text!r} is not UTF-8 text") from None


def _words(tokenizer: Tokenizer, texts: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    encoded = (tuple(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
    return tuple(ids for ids in encoded if ids)
