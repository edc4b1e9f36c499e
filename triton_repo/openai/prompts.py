"""What a request says, as the model's tokens, and how long an answer may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from builder import tokenizer as tokenizers
from triton_repo.openai import fields
from triton_repo.openai.chat_template import ChatTemplate
from triton_repo.openai.errors import ApiError, refuse
from triton_repo.openai.requests import ChatRequest, CompletionRequest


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of the engine, in tokens; None where the server does not tell."""

    max_input_len: int | None = None
    max_seq_len: int | None = None


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """`text` is what was asked, or None where the client sent `ids`."""

    ids: tuple[int, ...]
    text: str | None


class Prompts:
    """The tokenizer of a Hugging Face directory at work. Raises UserError where it has none."""

    def __init__(self, directory: Path, limits: Limits) -> None:
        self.tokenizer = tokenizers.load(directory)
        self.template = ChatTemplate(directory)
        self.end_ids = tuple(tokenizers.end_ids(directory))
        self.limits = limits

    def of(self, request: CompletionRequest | ChatRequest) -> Prompt:
        """Raises ApiError naming the field that cannot be a prompt, or is too long."""
        if isinstance(request, ChatRequest):
            return self._chat(request)
        if isinstance(request.prompt, str):
            return self._text("prompt", request.prompt, special=True)
        size = self.tokenizer.get_vocab_size()
        wrong = [token for token in request.prompt if token >= size]
        if wrong:
            raise refuse("prompt", f"token {wrong[0]} is not below the vocabulary's {size}", "invalid_value")
        return self._fitting("prompt", Prompt(ids=request.prompt, text=None))

    def max_tokens(self, prompt: Prompt, asked: int | None) -> int:
        """How many tokens to make: as asked, else what fits. Raises ApiError where that is too many."""
        longest = self.limits.max_seq_len
        if longest is None:
            if asked is None:
                raise refuse(
                    "max_tokens", "missing; the server does not tell how many tokens fit", "invalid_value"
                )
            return asked
        left = longest - len(prompt.ids)
        if left < (asked or 1):
            raise _too_long(
                "max_tokens" if asked else "prompt",
                f"{asked or 1} tokens after {len(prompt.ids)} of the prompt; {longest} fit in all",
            )
        return asked or left

    def _chat(self, request: ChatRequest) -> Prompt:
        """A template writes its special tokens itself."""
        text = self.template.render(
            request.messages,
            add_generation_prompt=request.add_generation_prompt,
            variables=request.variables,
        )
        return self._text("messages", fields.text("messages", text), special=False)

    def _text(self, param: str, text: str, *, special: bool) -> Prompt:
        ids = self._encode(text, special)
        if not ids:
            raise refuse(param, "no token in it", "invalid_value")
        return self._fitting(param, Prompt(ids=ids, text=text))

    def _fitting(self, param: str, prompt: Prompt) -> Prompt:
        longest = self.limits.max_input_len
        if longest is not None and len(prompt.ids) > longest:
            raise _too_long(param, f"{len(prompt.ids)} tokens; the engine takes {longest}")
        return prompt

    def shown(self, prompt: Prompt) -> str:
        """The prompt for its reader, special tokens included."""
        return self._decode(prompt.ids) if prompt.text is None else prompt.text

    def as_text(self, prompt: Prompt) -> str:
        """A text that the server turns into these very tokens, adding special tokens by itself.

        Raises ApiError where there is none.
        """
        text = self.shown(prompt)
        begin = self.template.special_tokens.get("bos_token", "")
        for candidate in (text, text.removeprefix(begin)):
            if candidate and self._encode(candidate, special=True) == prompt.ids:
                return candidate
        raise ApiError(
            400, "prompt: this server takes text, and no text becomes exactly these tokens", param="prompt"
        )

    def _encode(self, text: str, special: bool) -> tuple[int, ...]:
        """As a batch: `encode` would hold Python's lock, for a second a megabyte, and with it all streams."""
        return tuple(self.tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


def _too_long(param: str, message: str) -> ApiError:
    return refuse(param, message, "context_length_exceeded")
