"""A GPU model repository as the commands and manifests that start it see it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Flavour = Literal["engine", "llmapi"]
TEXT_MODELS: dict[Flavour, str] = {"engine": "ensemble", "llmapi": "tensorrt_llm"}


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Paths are absolute, and the same wherever the server runs: the repository's files name them.

    `tensorrt_llm` is the release that built the engine; None where none was installed when the
    directory for the PyTorch backend was written. `gpu_ids` holds the GPUs of each instance.
    `directories` are what the server reads beside the repository: engine, tokenizer or model, draft.
    """

    repository: Path
    flavour: Flavour
    tensorrt_llm: str | None
    tp_size: int
    pp_size: int
    directories: tuple[Path, ...]
    instances: int = 1
    gpu_ids: tuple[tuple[int, ...], ...] = ()
    draft: bool = False

    @property
    def world_size(self) -> int:
        """GPUs of one instance."""
        return self.tp_size * self.pp_size

    @property
    def text_model(self) -> str:
        """The model that takes text and gives text; with a draft, the one that uses it."""
        return "tensorrt_llm_bls" if self.flavour == "engine" and self.draft else TEXT_MODELS[self.flavour]
