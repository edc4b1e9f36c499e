"""What is kept of a parent's logits: its likeliest tokens, and all others together.

A file holds the buckets of some sequences, [sequences, context] each, as safetensors:

    ids        [.., k]      uint16   the lower 16 bits of the tokens, which ascend
    pages      [.., pages]  uint32   how many of them are below 65,536, below 131,072, ...
    log_probs  [.., k]      float16 or float32, in nats
    rest       [..]         float32  that of all other tokens together; absent where there are none
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PAGE = 1 << 16
LEAST = -6e4  # a log-probability that float16 holds


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Tokens [.., k] of int64, and log-probabilities [.., k + 1]: the last is that of all other tokens.

    Where k is vocab_size there are no others, and no last. The probabilities sum to one.
    """

    ids: Tensor
    log_probs: Tensor

    def to(self, device: torch.device) -> Buckets:
        """The same elsewhere."""
        return Buckets(ids=self.ids.to(device), log_probs=self.log_probs.to(device))


def in_buckets(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Of log-probabilities [.., vocab_size] those of `ids` [.., k], then that of all others together."""
    chosen = log_probs.gather(-1, ids)
    if ids.shape[-1] == log_probs.shape[-1]:
        return chosen
    rest = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat((chosen, rest), -1)


def likeliest(logits: Tensor, k: int, temperature: float = 1.0) -> Buckets:
    """The k likeliest tokens of logits [.., vocab_size] divided by `temperature`, and the rest."""
    log_probs = F.log_softmax(logits.float() / temperature, -1)
    ids = log_probs.topk(k, -1).indices.sort(-1).values
    return Buckets(ids=ids, log_probs=in_buckets(log_probs, ids))


@dataclass(frozen=True, kw_only=True)
class Format:
    """How buckets lie in a file: `dtype` is that of the tokens' log-probabilities."""

    vocab_size: int
    top_k: int
    dtype: str

    @property
    def pages(self) -> int:
        return (self.vocab_size - 1) // PAGE

    @property
    def token_bytes(self) -> int:
        """Of one place of a sequence."""
        rest = 4 if self.top_k < self.vocab_size else 0
        return self.top_k * (2 + np.dtype(self.dtype).itemsize) + self.pages * 4 + rest

    def encode(self, buckets: Buckets) -> dict[str, np.ndarray]:
        """The tensors of a file."""
        ids, log_probs = buckets.ids.cpu().numpy(), buckets.log_probs.cpu().numpy()
        tensors = {
            "ids": (ids % PAGE).astype(np.uint16),
            "log_probs": log_probs[..., : self.top_k].clip(LEAST).astype(self.dtype),
        }
        if self.pages:
            below = [(ids < page * PAGE).sum(-1) for page in range(1, self.pages + 1)]
            tensors["pages"] = np.stack(below, -1).astype(np.uint32)
        if self.top_k < self.vocab_size:
            tensors["rest"] = log_probs[..., self.top_k].astype(np.float32)
        return tensors

    def decode(self, tensors: dict[str, np.ndarray]) -> Buckets:
        """What was encoded; rounded log-probabilities are shifted so that they sum to one again."""
        ids = torch.from_numpy(tensors["ids"].astype(np.int64))
        for page in range(self.pages):
            below = torch.from_numpy(tensors["pages"][..., page : page + 1].astype(np.int64))
            ids += PAGE * (torch.arange(self.top_k) >= below)
        log_probs = torch.from_numpy(tensors["log_probs"].astype(np.float32))
        if "rest" in tensors:
            log_probs = torch.cat((log_probs, torch.from_numpy(tensors["rest"])[..., None]), -1)
        return Buckets(ids=ids, log_probs=F.log_softmax(log_probs, -1))


def save(tensors: dict[str, np.ndarray], file: Path) -> None:
    """Write a file under another name, then rename it. Raises OSError, and leaves nothing then."""
    from safetensors.numpy import save as to_bytes

    partial = file.with_name(f".{file.name}")
    try:
        with partial.open("wb") as stream:
            stream.write(to_bytes(tensors))
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)


def load(file: Path, rows: list[int]) -> dict[str, np.ndarray]:
    """Those sequences of a file alone. Raises OSError, and SafetensorError where it is none."""
    from safetensors import safe_open

    with safe_open(file, "np") as stored:
        cuts = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
        return {name: np.concatenate([x[i : i + 1] for i in rows]) for name, x in cuts.items()}
