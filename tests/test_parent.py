"""The demo's parent: a tiny recipe trained for real, cached, and an ordinary Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.training import corpus, parent
from builder.training.parent import Recipe, train_parent

TINY = Recipe(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    steps=30,
    warmup_steps=5,
    batch_size=8,
    sequence_length=32,
)


@pytest.fixture
def small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few documents of the real corpus; the rest would only take time."""
    texts = dict(list(corpus.documents().items())[:60])
    monkeypatch.setattr(corpus, "documents", lambda: texts)


def test_training(small_corpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    original = parent.LossBar.report
    monkeypatch.setattr(
        parent.LossBar, "report", lambda self, loss: (losses.append(loss), original(self, loss))
    )
    directory = train_parent(tmp_path, TINY)
    assert len(losses) == 30
    assert sum(losses[-5:]) < sum(losses[:5]) - 2

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "def naïve(x): return '日本語 🙂'  # two  spaces\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == 0

    monkeypatch.setattr(parent, "train_model", None)  # a cache hit trains nothing
    assert train_parent(tmp_path, TINY) == directory


def test_interrupted_training_leaves_nothing(
    small_corpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: object, loss: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(parent.LossBar, "report", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_parent(tmp_path, TINY)
    assert list(tmp_path.iterdir()) == []


def test_default_recipe_is_the_size_the_demo_promises() -> None:
    from builder import config

    r = parent.DEFAULT
    assert r.num_hidden_layers >= 16
    assert r.num_key_value_heads < r.num_attention_heads
    assert r.intermediate_size % config.FFN_MULTIPLE == 0
    layer = r.hidden_size * (3 * r.hidden_size + 3 * r.intermediate_size)
    assert 3e6 < r.num_hidden_layers * layer + r.vocab_size * r.hidden_size < 8e6


def test_held_out_text_was_not_trained_on() -> None:
    held_out, trained = corpus.held_out_documents(), set(corpus.training_text())
    assert len(held_out) > 20
    assert not trained & set(held_out)
    assert len(corpus.held_out_text()) > 100_000
    assert len({*corpus.prompts(8)}) == 8
