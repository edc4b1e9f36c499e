"""Train a small parent model from scratch: an ordinary Llama with a tokenizer of its own."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.errors import UserError
from builder.storage import output_directory, write_json
from builder.training import corpus

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

FORMAT = 1
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the model; its digest names the cache entry. Batches count sequences."""

    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 512
    num_hidden_layers: int = 16
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    max_position_embeddings: int = 1024
    steps: int = 700
    warmup_steps: int = 50
    batch_size: int = 8
    sequence_length: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 0

    def digest(self) -> str:
        """Of the recipe and the corpus it is applied to."""
        content = json.dumps({**asdict(self), "format": FORMAT, "corpus": corpus.digest()}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


DEFAULT = Recipe()


def cache_directory() -> Path:
    """The user's cache directory for trained parents."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "ffn-fusion"


def train_parent(cache: Path | None = None, recipe: Recipe = DEFAULT) -> Path:
    """The model directory of `recipe`, trained if the cache has none; a progress bar shows the loss."""
    cache = cache or cache_directory()
    directory = cache / f"parent-{recipe.digest()}"
    if directory.is_dir():
        return directory
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("transformers is missing; pip install 'ffn-fusion[transformers]'") from None
    cache.mkdir(parents=True, exist_ok=True)
    with output_directory(directory) as partial:
        tokenizer = train_tokenizer(recipe.vocab_size)
        model = train_model(recipe, token_stream(tokenizer), LossBar)
        save(model, tokenizer, partial)
    return directory


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE of the training text; any text can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.training_text()[::4], trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer) -> torch.Tensor:
    """The training text as one row of token ids, documents ended by END_OF_TEXT."""
    import torch

    end = tokenizer.encode(END_OF_TEXT).ids
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(corpus.training_text()):
        ids += encoding.ids + end
    return torch.tensor(ids)


def train_model(recipe: Recipe, stream: torch.Tensor, progress: Callable[[int], Any]) -> Any:
    """A LlamaForCausalLM trained on random windows of `stream`: AdamW, warm-up and cosine decay."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_hidden_layers,
            num_attention_heads=recipe.num_attention_heads,
            num_key_value_heads=recipe.num_key_value_heads,
            max_position_embeddings=recipe.max_position_embeddings,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, recipe))
    generator = torch.Generator().manual_seed(recipe.seed)
    window = torch.arange(recipe.sequence_length)
    with progress(recipe.steps) as report:
        for _ in range(recipe.steps):
            last = len(stream) - recipe.sequence_length
            starts = torch.randint(last, (recipe.batch_size, 1), generator=generator)
            batch = stream[starts + window]
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            report(loss.item())
    model.config.use_cache = True
    return model.eval()


def _learning_rate(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2


class LossBar:
    """A bar on stderr with the smoothed loss; call it with each step's loss."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(
            *columns, TextColumn("loss {task.fields[loss]}"), console=Console(file=sys.stderr)
        )
        self.task = self.progress.add_task("", total=steps, loss="")
        self.smooth: float | None = None

    def __enter__(self) -> Callable[[float], None]:
        self.progress.start()
        return self.report

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def report(self, loss: float) -> None:
        self.smooth = loss if self.smooth is None else 0.95 * self.smooth + 0.05 * loss
        self.progress.update(self.task, advance=1, loss=f"{self.smooth:.3f}")


def save(model: Any, tokenizer: Tokenizer, directory: Path) -> None:
    """An ordinary Hugging Face directory."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / "tokenizer_config.json", config)
