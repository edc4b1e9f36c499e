"""evaluate: its figures against transformers and scipy, its memory, and wrong use."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import TEXT, write_llama, write_tokenizer
from test_parallel_blocks import by_hand

from builder import evaluation, huggingface
from builder.errors import UserError
from builder.evaluation import Scores, estimate, score, summarize
from builder.plan import Plan
from builder.text import read_samples
from ffn_fusion import main

SAMPLES, LENGTH = 7, 24


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text("\n".join(TEXT), encoding="utf-8")
    return file


def samples_of(model: Path, data: Path) -> torch.Tensor:
    return read_samples(model, [data], SAMPLES, LENGTH, huggingface.read_architecture(model), seed=5)


def evaluated(model: Path, data: Path, *options: object) -> dict:
    settings = ("--samples", SAMPLES, "--length", LENGTH, "--seed", 5, "--batch", 3)
    result = run("evaluate", model, "--data", data, *settings, "--json", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@torch.no_grad()
def log_probs(model: Path, tokens: torch.Tensor) -> np.ndarray:
    """Of transformers, in float64 [count, length, vocab_size]."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True).double()
    return loaded(tokens).logits.log_softmax(-1).numpy()


def expected(told: np.ndarray, parent: np.ndarray, tokens: torch.Tensor) -> dict[str, float]:
    p, q, places = parent[:, :-1], told[:, :-1], tokens[:, 1:].numpy()
    rows, columns = np.indices(places.shape)
    return {
        "perplexity": math.exp(-q[rows, columns, places].mean()),
        "parent_perplexity": math.exp(-p[rows, columns, places].mean()),
        "kl": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "top1": float((p.argmax(-1) == q.argmax(-1)).mean()),
    }


def test_a_model_alone(tiny_hf: Path, data: Path) -> None:
    told = evaluated(tiny_hf, data)
    tokens = samples_of(tiny_hf, data)
    truth = log_probs(tiny_hf, tokens)
    wanted = expected(truth, truth, tokens)["perplexity"]
    assert told["perplexity"]["value"] == pytest.approx(wanted, rel=1e-5)
    assert told["perplexity"]["low"] < wanted < told["perplexity"]["high"]
    assert [told[name] for name in ("parent", "parent_perplexity", "kl", "top1", "plan")] == [None] * 5
    assert told["data"] == {"files": [str(data)], "samples": SAMPLES, "length": LENGTH, "seed": 5}


def test_a_fused_directory_beside_its_parent(tiny_hf: Path, data: Path, tmp_path: Path) -> None:
    """The written model and the plan that makes it have the same figures, those of transformers."""
    fused = tmp_path / "fused"
    options = ("--drop-attention", "2-5")
    assert run("fuse", tiny_hf, *options, "-o", fused).exit_code == 0
    tokens = samples_of(tiny_hf, data)
    wanted = expected(log_probs(fused, tokens), log_probs(tiny_hf, tokens), tokens)
    assert wanted["kl"] > 0.01
    written = evaluated(fused, data, "--parent", tiny_hf)
    planned = evaluated(tiny_hf, data, *options)
    assert (written["layers"], planned["layers"]) == (4, 4)
    assert (written["parent"], planned["parent"]) == (str(tiny_hf), str(tiny_hf))
    for told in (written, planned):
        for name, value in wanted.items():
            assert told[name]["value"] == pytest.approx(value, rel=1e-4), name
            assert told[name]["low"] <= value <= told[name]["high"], name


@torch.no_grad()
def states(model: Path, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What each layer leaves, of transformers in float64 (its own list has the last one normed)."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True).double()
    found: list[torch.Tensor] = []
    for layer in loaded.model.layers:
        layer.register_forward_hook(lambda m, i, out: found.append(out[0] if isinstance(out, tuple) else out))
    loaded(tokens)
    return found


def test_hidden_states_of_each_layer(tiny_hf: Path, data: Path, tmp_path: Path) -> None:
    """A fused layer against the last of its members; by the record, by a plan, and by both in a row."""
    fused = tmp_path / "fused"
    options = ("--drop-attention", "2-5", "--drop-ffn", "1")
    assert run("fuse", tiny_hf, *options, "-o", fused).exit_code == 0
    told = evaluated(fused, data, "--parent", tiny_hf)
    tokens = samples_of(tiny_hf, data)[:, :-1]
    ours, theirs = states(fused, tokens), states(tiny_hf, tokens)
    pairs = [(0, 0), (1, 1), (2, 4), (3, 5)]
    assert [(x["layer"], x["parent_layer"]) for x in told["hidden_cosine"]] == pairs
    for (i, j), found in zip(pairs, told["hidden_cosine"], strict=True):
        wanted = float(torch.cosine_similarity(ours[i], theirs[j], dim=-1).mean())
        assert found["cosine"]["value"] == pytest.approx(wanted, abs=1e-6)
        assert found["cosine"]["low"] - 1e-6 <= wanted <= found["cosine"]["high"] + 1e-6
    assert told["hidden_cosine"][0]["cosine"]["value"] == pytest.approx(1, abs=1e-6)
    assert 0.1 < told["hidden_cosine"][3]["cosine"]["value"] < 0.999
    planned = evaluated(tiny_hf, data, *options)
    for x, y in zip(planned["hidden_cosine"], told["hidden_cosine"], strict=True):
        assert x["cosine"]["value"] == pytest.approx(y["cosine"]["value"], abs=1e-5)
    again = evaluated(fused, data, "--parent", tiny_hf, "--drop-ffn", "3")
    assert [(x["layer"], x["parent_layer"]) for x in again["hidden_cosine"]] == pairs[:3]


def test_states_inside_a_window_are_not_compared(tiny_hf: Path, data: Path) -> None:
    told = evaluated(tiny_hf, data, "--parallel-blocks", "1-3")
    assert [x["layer"] for x in told["hidden_cosine"]] == [0, 3, 4, 5]


def test_a_parent_of_another_model(tiny_hf: Path, data: Path, tmp_path: Path) -> None:
    other = write_llama(tmp_path / "other", num_hidden_layers=5)
    told = evaluated(tiny_hf, data, "--parent", other)
    assert told["hidden_cosine"] is None
    assert "does not say which layers of the parent" in told["hidden_cosine_missing"]
    text = run("evaluate", tiny_hf, "--data", data, "--parent", other, "--samples", 4).stdout
    assert "cosine of hidden states: not known; " in text


def test_blocks_in_parallel(tiny_hf: Path, data: Path, tmp_path: Path) -> None:
    told = evaluated(tiny_hf, data, "--parallel-blocks", "1-3,4-5")
    tokens = samples_of(tiny_hf, data)
    parallel = by_hand(tiny_hf, ((1, 3), (4, 5)), tokens).double().log_softmax(-1).numpy()
    wanted = expected(parallel, log_probs(tiny_hf, tokens), tokens)
    for name, value in wanted.items():
        assert told[name]["value"] == pytest.approx(value, rel=1e-4), name
    assert told["parallel_blocks"] == [[1, 3], [4, 5]]
    plan = tmp_path / "plan.yaml"
    plan.write_text("fuse: []\nparallel: [[1, 3], [4, 5]]\n")
    assert evaluated(tiny_hf, data, "--plan", plan) == told


def test_blocks_in_parallel_alone_fuse_nothing(tiny_hf: Path, data: Path, tmp_path: Path) -> None:
    apart = tmp_path / "apart"
    assert run("fuse", tiny_hf, "--drop-attention", "2-5", "--no-fuse", "-o", apart).exit_code == 0
    assert evaluated(apart, data, "--parallel-blocks", "0-1")["layers"] == 6


def test_a_model_is_its_own_equal(tiny_hf: Path, data: Path) -> None:
    told = evaluated(tiny_hf, data, "--parent", tiny_hf)
    assert told["kl"] == {"value": 0, "low": 0, "high": 0}
    assert told["top1"] == {"value": 1, "low": 1, "high": 1}
    assert told["perplexity"] == told["parent_perplexity"]


def test_the_text_has_the_figures(tiny_hf: Path, data: Path) -> None:
    result = run("evaluate", tiny_hf, "--data", data, "--drop-ffn", "3", "--samples", 3, "--length", 16)
    assert result.exit_code == 0, result.output
    shown = ("6 layers", "perplexity  ", "KL(parent || model)", "same likeliest token", "3 samples of 16")
    assert [words for words in shown if words not in result.stdout] == []


def test_one_sample_has_no_interval(tiny_hf: Path, data: Path) -> None:
    result = run("evaluate", tiny_hf, "--data", data, "--samples", 1, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["perplexity"]
    assert (told["low"], told["high"]) == (None, None)
    result = run("evaluate", tiny_hf, "--data", data, "--samples", 1)
    assert "[" not in result.stdout


def test_intervals_are_scipys() -> None:
    from scipy import stats

    values = torch.tensor(np.random.default_rng(1).gamma(2.0, 1.5, 40))
    told = estimate(values)
    drawn = stats.bootstrap(
        (values.numpy(),),
        np.mean,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(2),
    )
    width = drawn.confidence_interval.high - drawn.confidence_interval.low
    assert told.value == pytest.approx(float(values.mean()))
    assert told.low == pytest.approx(drawn.confidence_interval.low, abs=0.05 * width)
    assert told.high == pytest.approx(drawn.confidence_interval.high, abs=0.05 * width)
    assert estimate(values) == told


def test_perplexity_is_of_the_mean_loss() -> None:
    scores = Scores(places=4, loss=torch.tensor([4.0, 8.0, 6.0], dtype=torch.float64))
    found = summarize(scores)
    assert found.perplexity.value == pytest.approx(math.exp(1.5))
    assert math.e <= found.perplexity.low <= found.perplexity.value <= found.perplexity.high <= math.exp(2)


def test_logits_of_one_sample_are_in_memory(tiny_hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = huggingface.read(tiny_hf)
    child = Plan(drop_attention=(3,), fuse=()).apply(checkpoint)
    tokens = torch.randint(0, 320, (5, 12), generator=torch.Generator().manual_seed(2))
    seen: list[tuple[int, ...]] = []
    linear = evaluation.F.linear

    def watched(x: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
        out = linear(x, *rest)
        seen.append(tuple(out.shape))
        return out

    done: list[int] = []
    monkeypatch.setattr(evaluation.F, "linear", watched)
    scores = score(child, tokens, checkpoint, batch=2, progress=done.append)
    assert [shape for shape in seen if shape[-1] == 320] == [(11, 320)] * 10
    assert sum(done) == sum(
        x.num_bytes for c in (child, checkpoint) for n, x in c.tensors.items() if n.startswith("layers.")
    )
    apart = score(child, tokens, checkpoint, batch=5)
    for name in ("loss", "parent_loss", "kl", "agreed"):
        torch.testing.assert_close(getattr(scores, name), getattr(apart, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--data", "NONE"), 1, "none.txt: cannot be read"),
        (("--data", "DATA", "--length", 257), 1, "length: 257 is beyond the model's max_position"),
        (("--data", "SHORT", "--length", 200), 1, "give more text or a smaller --length"),
        (("--data", "DATA", "--drop-attention", "9"), 1, "drop_attention: layer 9 does not exist"),
        (("--data", "DATA", "--parallel-blocks", "4-6"), 1, "parallel: 4-6 is no window"),
        (("--data", "DATA", "--norm", "last"), 2, "--norm says how to fuse"),
        (("--data", "DATA", "--plan", "p", "--drop-ffn", "1"), 2, "--plan says it all"),
        (("--data", "DATA", "--plan", "p", "--parallel-blocks", "1-2"), 2, "write --parallel-blocks into it"),
        (("--data", "DATA", "--parent", "NONE"), 1, "none.txt"),
        (("--data", "DATA", "--samples", 0), 2, "--samples"),
        ((), 2, "--data"),
    ],
)
def test_wrong_use(tiny_hf: Path, data: Path, tmp_path: Path, options: tuple, code: int, words: str) -> None:
    names = {"DATA": data, "NONE": tmp_path / "none.txt", "SHORT": tmp_path / "short.txt"}
    names["SHORT"].write_text("too short")
    result = run("evaluate", tiny_hf, *(names.get(x, x) for x in options))
    assert result.exit_code == code, result.output
    assert words in result.stderr


def test_a_parent_of_another_vocabulary_is_refused(tiny_hf: Path, data: Path, tmp_path: Path) -> None:
    other = write_llama(tmp_path / "other", vocab_size=336)
    result = run("evaluate", tiny_hf, "--data", data, "--parent", other)
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1), result.output
    assert "parent: vocab_size 336, the model has 320" in result.stderr


def test_a_parent_of_another_tokenizer_is_refused(tiny_hf: Path, data: Path, tmp_path: Path) -> None:
    other = write_llama(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[5:7]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = run("evaluate", tiny_hf, "--data", data, "--parent", other)
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1), result.output
    assert "has other tokens than" in result.stderr
    write_tokenizer(other)
    assert run("evaluate", tiny_hf, "--data", data, "--parent", other, "--samples", 2).exit_code == 0


def test_scores_of_unlike_vocabularies_are_refused(tiny_hf: Path, tmp_path: Path) -> None:
    other = huggingface.read(write_llama(tmp_path / "other", vocab_size=336))
    with pytest.raises(UserError, match="vocab_size 336, the model has 320"):
        score(huggingface.read(tiny_hf), torch.zeros(1, 4, dtype=torch.int64), other)


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from builder.cli.evaluate import evaluate\n"
        "try: evaluate(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--parallel-blocks" in result.stdout


def test_text_with_half_a_surrogate_pair_is_named(tiny_hf: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "good"}\n{"text": "\\ud800 bad"}\n')
    with pytest.raises(UserError, match=r"text\.jsonl: line 2 has half a surrogate pair"):
        samples_of(tiny_hf, file)


def test_a_loss_beyond_any_perplexity_is_an_error() -> None:
    with pytest.raises(UserError, match="a loss of 800 nats per token"):
        summarize(Scores(places=2, loss=torch.tensor([1600.0, 1600.0])))
