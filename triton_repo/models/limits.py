"""What a text model refuses before it works on a request: unknown fields, and texts that cannot fit."""

import difflib
import json

import triton_python_backend_utils as pb_utils

# Of Triton itself; any other key of a JSON body that is no input comes here as a parameter.
TRITONS = ("id", "sequence_id", "sequence_start", "sequence_end", "priority", "timeout")
SWITCHES = ("triton_", "binary_data_output")  # beginnings
MAX_WORDS = 256  # of one list
FREE_BYTES = 1 << 16  # of a prompt, whatever the tokenizer


def refusal(text: str, code: int | None = None):
    """A response with an error: HTTP 400, gRPC INVALID_ARGUMENT."""
    error = pb_utils.TritonError(text, pb_utils.TritonError.INVALID_ARG if code is None else code)
    return pb_utils.InferenceResponse(error=error)


def known_fields(config: dict) -> list[str]:
    """The parameter `fields` of a model's configuration: what a client may send."""
    return [name for name in config["parameters"]["fields"]["string_value"].split(",") if name]


def check_fields(request, known: list[str]) -> None:
    """Raise ValueError for a field that is not among those that a model sees; no `known` ones allow all."""
    if not known:
        return
    for name in json.loads(request.parameters() or "{}"):
        if name in TRITONS or name.startswith(SWITCHES):
            continue
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else "; leave it out"
        raise ValueError(f"{name}: no such field{hint}")


def check_words(name: str, words: list) -> None:
    """Raise ValueError for a list that would slow every step down."""
    if len(words) > MAX_WORDS:
        raise ValueError(f"{name}: {len(words)} words, at most {MAX_WORDS} are taken")


class PromptLimit:
    """The bytes that `max_input_len` tokens of a tokenizer can hold at most; 0 tokens is no limit.

    A token of a vocabulary covers no more bytes of text than its own name has. A normalizer may shorten the
    text first, so four times as much is let through where there is one.
    """

    def __init__(self, tokenizer, max_input_len: int) -> None:
        longest = max(len(token.encode()) for token in tokenizer.get_vocab())
        factor = 1 if tokenizer.normalizer is None else 4
        self.tokens = max_input_len
        self.bytes = max(FREE_BYTES, factor * longest * max_input_len)

    def check(self, text: bytes, name: str) -> None:
        """Raise ValueError before a text is cut into tokens that cannot fit."""
        if self.tokens and len(text) > self.bytes:
            raise ValueError(
                f"{name}: {len(text)} bytes, more than the engine's max_input_len of {self.tokens} tokens "
                f"can hold ({self.bytes}); shorten it"
            )
