"""The tokenizer of a Hugging Face directory, and text that grows token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from builder.errors import UserError
from builder.storage import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load(directory: Path) -> Tokenizer:
    """The tokenizer of tokenizer.json. Raises UserError where there is none."""
    from tokenizers import Tokenizer

    file = directory / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{file}: missing; give the Hugging Face directory that has it")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001  (tokenizers raises nothing more precise)
        raise UserError(f"{file}: no tokenizer can be read from it: {error}; copy it again") from None


def check_same(parent: Path, model: Path) -> None:
    """Raise UserError where the directory of a parent has other tokens than its model's."""
    if load(parent).get_vocab() != load(model).get_vocab():
        raise UserError(
            f"{parent / 'tokenizer.json'}: has other tokens than {model / 'tokenizer.json'}; give the "
            "model's own parent"
        )


def end_ids(directory: Path) -> list[int]:
    """End-of-text tokens: of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        value = read_json(directory / name).get("eos_token_id") if (directory / name).is_file() else None
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if any(type(x) is not int for x in ids):
                raise UserError(f"{directory / name}: eos_token_id {value!r} is no token; correct the file")
            return ids
    return []


@dataclass(kw_only=True)
class TextStream:
    """The text of a growing list of tokens, in pieces that join to the whole text.

    A character whose bytes are not all there yet decodes to up to three replacement characters at the
    end, which wait for the next token.
    """

    tokenizer: Tokenizer
    ids: list[int] = field(default_factory=list)
    shown: int = 0

    def push(self, token_ids: Sequence[int], final: bool) -> str:
        """Take the next tokens; returns the text that they complete."""
        self.ids += token_ids
        text = self.tokenizer.decode(self.ids)
        end = len(text)
        while (
            not final
            and end > max(self.shown, len(text) - 3)
            and text[end - 1] == "\N{REPLACEMENT CHARACTER}"
        ):
            end -= 1
        piece, self.shown = text[self.shown : end], end
        return piece
