"""The chat template of a tokenizer: messages to a prompt, as transformers renders it.

A template is the model's data, not code to trust: it runs in Jinja's immutable sandbox.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from builder.errors import UserError
from builder.storage import read_json
from triton_repo.openai.errors import ApiError

if TYPE_CHECKING:
    from jinja2.parser import Parser

CONFIG = "tokenizer_config.json"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """The template of a Hugging Face directory.

    Of chat_template.jinja, else of `chat_template` in tokenizer_config.json: a text, or a list of named ones
    of which `default` is taken. Raises UserError where a file cannot be read or a template is none.
    """

    def __init__(self, directory: Path) -> None:
        config = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
        self.special_tokens = {name: _content(config[name]) for name in _NAMED if config.get(name)}
        self._template = _compile(directory, config)

    def render(
        self,
        messages: tuple[dict[str, str], ...],
        *,
        add_generation_prompt: bool = True,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """The prompt. Raises ApiError where there is no template, or it refuses the messages."""
        if self._template is None:
            raise ApiError(
                400,
                "messages: the tokenizer has no chat template; use /v1/completions, or add "
                "chat_template.jinja to its directory",
                param="messages",
                code="no_chat_template",
            )
        given = {**self.special_tokens, **(variables or {}), "messages": [dict(m) for m in messages]}
        try:
            return self._template.render(
                given, tools=None, documents=None, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise ApiError(
                400, f"messages: the chat template refuses them: {error}", param="messages"
            ) from None


def _content(token: Any) -> str:
    """A token of tokenizer_config.json: a text, or an object with one."""
    return str(token["content"] if isinstance(token, dict) else token)


def _compile(directory: Path, config: dict[str, Any]) -> Template | None:
    file = directory / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    where = file if file.is_file() else directory / CONFIG
    if isinstance(source, list):
        source = {one["name"]: one["template"] for one in source}.get("default")
    if source is None:
        return None
    try:
        return _environment().from_string(source)
    except (TemplateError, TypeError) as error:
        raise UserError(f"{where}: its chat template cannot be read: {error}; copy the file again") from None


def _environment() -> ImmutableSandboxedEnvironment:
    """What transformers offers to templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the HTML escapes of Jinja's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; its text stays as it is."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
