"""The two ways clients speak to TensorRT-LLM's models: what a field is called, and what streamed text is."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from builder.errors import UserError
from triton_repo.flavours import llmapi
from triton_repo.tensors import SAMPLING, WORDS


def stream_id() -> str:
    """An id for one streamed request: by it postprocessing knows what came before a piece."""
    return f"stream-{uuid.uuid4().hex}"


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """`sampling` maps our names (those of the engine flavour) to this dialect's and their Triton types.

    `cumulative`: a streamed response holds the whole text so far, not what is new.
    """

    name: str
    model: str
    max_tokens: str
    stream: str
    sampling: Mapping[str, tuple[str, str]]
    cumulative: bool

    def body(self, prompt: str, max_tokens: int, stream: bool, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON of a generate request. Raises UserError for sampling that the dialect does not know."""
        if stream and sampling.get("num_return_sequences", 1) > 1:
            raise UserError("num_return_sequences: a stream has one sequence; ask for the whole text")
        body: dict[str, Any] = {"text_input": prompt, self.max_tokens: max_tokens}
        if stream:
            body[self.stream] = True
        for name, value in sampling.items():
            if name not in self.sampling:
                known = ", ".join(sorted(self.sampling))
                raise UserError(f"{name}: the {self.name} flavour has no such input; it has {known}")
            body[self.sampling[name][0]] = value
        return body

    def kind(self, field: str) -> str:
        """The Triton type of a field of `body`."""
        fixed = {"text_input": "STRING", self.max_tokens: "INT32", self.stream: "BOOL"}
        return fixed.get(field) or dict(self.sampling.values())[field]


ENGINE = Dialect(
    name="engine",
    model="ensemble",
    max_tokens="max_tokens",
    stream="stream",
    sampling={
        **{name: (name, kind) for name, (_, kind) in SAMPLING.items() if name != "stream"},
        **{name: (name, kind) for name, (_, kind, _) in WORDS.items()},
        "num_draft_tokens": ("num_draft_tokens", "INT32"),
    },
    cumulative=False,
)
LLMAPI = Dialect(
    name="llmapi",
    model="tensorrt_llm",
    max_tokens="sampling_param_max_tokens",
    stream="streaming",
    sampling={
        **{n: (f"sampling_param_{n}", k) for n, k in llmapi.SAMPLING.items() if n != "max_tokens"},
        "stop_words": ("sampling_param_stop", "STRING"),
    },
    cumulative=True,
)
DIALECTS = {dialect.name: dialect for dialect in (ENGINE, LLMAPI)}
