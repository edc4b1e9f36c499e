"""Text that grows token by token: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_WINDOW = 16  # tokens before the new ones that are needed to decode those as in the whole text


class GrowingText:
    """The text of the tokens so far, in pieces that join to the whole; a piece costs the same at any length.

    A character whose bytes are not all there yet decodes to up to three replacement characters at the end,
    which wait for the next token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._held = 0  # characters at the window's end that wait

    def push(self, token_ids: Sequence[int], final: bool = False) -> str:
        """Take the next tokens; returns the text that they complete."""
        before = len(self._tokenizer.decode(self._window)) - self._held
        ids = [*self._window, *token_ids]
        whole = self._tokenizer.decode(ids)
        visible = whole if final else _stable(whole)
        self._window, self._held = ids[-_WINDOW:], len(whole) - len(visible)
        return visible[before:]


def _stable(text: str) -> str:
    kept = len(text)
    while kept > max(0, len(text) - 3) and text[kept - 1] == REPLACEMENT:
        kept -= 1
    return text[:kept]


class StopStrings:
    """Ends a text before the first of some strings; what may be the beginning of one waits."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._held = ""
        self.found = False

    def push(self, text: str, final: bool = False) -> str:
        """Take more text; returns what can be shown. Once `found`, no more should be pushed."""
        text = self._held + text
        places = [place for place in (text.find(string) for string in self._strings) if place >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        kept = len(text) if final else len(text) - self._beginning(text)
        self._held = text[kept:]
        return text[:kept]

    def _beginning(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop string."""
        longest = max(map(len, self._strings), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self._strings)), 0)
