"""The reference decoder as a model of lm-eval: multiple choice, perplexity of documents, greedy generation.

Needs the extra `lm-eval`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from builder import tokenizer
from builder.checkpoint import Checkpoint
from builder.decoder import load
from builder.errors import UserError
from builder.kv_cache import with_cache

MAX_NEW_TOKENS = 256  # of a generation whose task sets no limit, as lm-eval's own models have it


class Model(TemplateLM):
    """A checkpoint as lm-eval asks for it, all its weights in memory: in float32, on a GPU as they are.

    Prompts that are too long lose their beginning, as with lm-eval's own models.
    """

    def __init__(self, checkpoint: Checkpoint, directory: Path, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float32 if self._device.type == "cpu" else None
        self.decoder = load(checkpoint, dtype).to(self._device)
        self.encoder = tokenizer.load(directory)
        self.ends = tokenizer.end_ids(directory)
        self.positions = checkpoint.architecture.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        if not self.ends:
            raise UserError("model: has no eos_token_id, which lm-eval puts before a text without a context")
        return self.ends[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: Any) -> list[int]:
        found: list[int] = self.encoder.encode(string, add_special_tokens=add_special_tokens is not False).ids
        return found

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval has it, its bar on a terminal alone."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, not sys.stderr.isatty())
        return found

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **ignored: Any
    ) -> list[tuple[float, bool]]:
        """Of each (text, context, continuation): the continuation's log-probability, and if it is greedy."""
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))
        with counting_bar("scoring", len(order)) as progress:
            for start in range(0, len(order), self.batch):
                places = order[start : start + self.batch]
                found |= dict(zip(places, self._scored([requests[i][1:] for i in places]), strict=True))
                progress(len(places))
        return [found[i] for i in range(len(requests))]

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        kept = [(context + rest)[-(self.positions + 1) :] for context, rest in pairs]
        rows = [torch.tensor(ids[:-1]) for ids in kept]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self._device)
        positions = torch.arange(tokens.shape[1], device=self._device).expand(tokens.shape)
        logits = self.decoder(tokens, positions)
        for row, ids, (_, rest) in zip(logits, kept, pairs, strict=True):
            if len(rest) >= len(ids):
                raise UserError(
                    f"task: an answer of {len(rest)} tokens, max_position_embeddings is {self.positions}"
                )
            told = row[len(ids) - 1 - len(rest) : len(ids) - 1].float()
            wanted = torch.tensor(rest, device=self._device)
            log_probs = F.log_softmax(told, -1).gather(1, wanted[:, None])
            yield float(log_probs.sum()), bool((told.argmax(-1) == wanted).all())

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole documents, each token with as much before it as fits."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.positions, context_len=1
            )
            parts = [(None, *pair) for pair in map(make_disjoint_window, windows)]
            totals.append(sum(x for x, _ in self._loglikelihood_tokens(parts)))
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """What each prompt goes on with, up to the first of its stop strings."""
        jobs = sorted((self._job(i, *r.args) for i, r in enumerate(requests)), key=lambda x: x[0])
        groups = [list(same) for _, same in groupby(jobs, key=lambda x: x[0])]
        parts = [group[i : i + self.batch] for group in groups for i in range(0, len(group), self.batch)]
        texts: dict[int, str] = {}
        with counting_bar("generating", len(jobs)) as progress:
            for part in parts:
                (_, count, stops), _, _ = part[0]
                made = self._generate([ids for *_, ids in part], count, stops)
                texts |= {index: text for (_, index, _), text in zip(part, made, strict=True)}
                progress(len(part))
        return [texts[i] for i in range(len(texts))]

    def _job(self, index: int, prompt: str, how: dict[str, Any]) -> tuple[Any, int, list[int]]:
        """What the requests of a batch share, length, limit and stop strings; its number and its tokens."""
        if how.get("do_sample") or how.get("temperature"):
            raise UserError("task: asks for sampling; evaluate generates greedily, set do_sample: false")
        count = int(how.get("max_gen_toks", how.get("max_new_tokens", MAX_NEW_TOKENS)))
        if not 0 < count < self.positions:
            raise UserError(
                f"task: max_gen_toks {count} is not between 1 and max_position_embeddings {self.positions}"
            )
        stops = how.get("until") or []
        ids = self.tok_encode(prompt)[-(self.positions - count) :]
        kept = tuple(x for x in ([stops] if isinstance(stops, str) else stops) if x)
        return (len(ids), count, kept), index, ids

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], count: int, stops: tuple[str, ...]) -> list[str]:
        """Greedily, for prompts of one length."""
        decoder, length = with_cache(self.decoder), len(prompts[0])
        tokens = torch.tensor(prompts, device=self._device)
        positions = torch.arange(length + count, device=self._device).expand(len(prompts), -1)
        places = [(0, length), *((i, i + 1) for i in range(length, length + count - 1))]
        made: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        for start, end in places:
            tokens = decoder(tokens, positions[:, start:end])[:, -1:].argmax(-1)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if not ended[row]:
                    made[row] += [] if token in self.ends else [token]
                    ended[row] = token in self.ends or _cut(self._text(made[row]), stops)[1]
            if all(ended):
                break
        return [_cut(self._text(ids), stops)[0] for ids in made]

    def _text(self, ids: list[int]) -> str:
        text: str = self.encoder.decode(ids)
        return text


@contextmanager
def counting_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over requests on stderr, where that is a terminal; call it with how many were just done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(label, total=total)
        yield lambda count: bars.update(task, advance=count)


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there is one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)
