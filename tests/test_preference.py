"""Training of the exported model by others: padding, gradients, recomputation; examples/preference."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import TEXT, fused, write_llama

import ffn_fusion
from builder import export, huggingface, manifest, verification
from builder.decoder import load
from builder.training import mapping

EXAMPLE = Path(__file__).parent.parent / "examples" / "preference"
TOKENS = torch.arange(12) * 7 % 320
OTHER = torch.arange(17) * 3 % 320


@pytest.fixture(scope="module")
def exported(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exported") / "fused"
    export.write(fused(tiny_hf), tiny_hf, output)
    return output


def transformers_model(directory: Path, **options: object):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options)


def padded(side: str) -> dict[str, torch.Tensor]:
    """A batch of TOKENS, padded, and OTHER, which needs none."""
    padding = torch.zeros(len(OTHER) - len(TOKENS), dtype=torch.long)
    order = (lambda x: [padding, x]) if side == "left" else (lambda x: [x, padding])
    ids, mask = torch.cat(order(TOKENS)), torch.cat(order(torch.ones_like(TOKENS)))
    return {
        "input_ids": torch.stack([ids, OTHER]),
        "attention_mask": torch.stack([mask, torch.ones_like(mask)]),
    }


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_changes_no_logits(exported: Path, side: str, attention: str) -> None:
    model = transformers_model(exported, attn_implementation=attention)
    row, other = model(**padded(side)).logits
    found = row[-len(TOKENS) :] if side == "left" else row[: len(TOKENS)]
    torch.testing.assert_close(found, model(TOKENS[None]).logits[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other, model(OTHER[None]).logits[0], rtol=1e-5, atol=1e-5)


def test_a_padded_batch_generates_what_each_prompt_does(exported: Path) -> None:
    model = transformers_model(exported)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    both = model.generate(**padded("left"), **options)[:, -8:]
    alone = [
        model.generate(x[None], attention_mask=torch.ones(1, len(x)).long(), **options)[0, -8:]
        for x in (TOKENS, OTHER)
    ]
    assert torch.equal(both, torch.stack(alone))


def gradients(model: torch.nn.Module, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the next token's loss of TOKENS, by the weight's name."""
    model.zero_grad()
    torch.nn.functional.cross_entropy(logits[0, :-1], TOKENS[1:]).backward()
    return {name: x.grad.clone() for name, x in model.named_parameters()}


def test_gradients_are_the_decoders(exported: Path) -> None:
    model, decoder = (
        transformers_model(exported).train(),
        load(huggingface.read(exported)).requires_grad_(True),
    )
    ours = gradients(model, model(TOKENS[None]).logits)
    theirs = gradients(decoder, decoder(TOKENS[None], torch.arange(len(TOKENS))[None]))
    names = [name for name in theirs if ".qkv." not in name]
    assert {"layers.2.ffn.down.weight", "layers.2.ffn_norm.weight", "layers.3.ffn.up.weight"} <= set(names)
    for name in names:
        assert theirs[name].abs().max() > 0, name
        torch.testing.assert_close(ours[huggingface.hf_name(name)], theirs[name], rtol=1e-4, atol=1e-6)


def test_activation_checkpointing_changes_no_gradient(exported: Path) -> None:
    model = transformers_model(exported).train()
    plain = gradients(model, model(TOKENS[None], use_cache=False).logits)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    runs = []
    for layer in model.model.layers:
        assert layer.gradient_checkpointing
        layer.register_forward_pre_hook(lambda *x: runs.append(1))
        (layer.mlp or layer.self_attn).register_forward_pre_hook(lambda *x: runs.append(1))
    found = gradients(model, model(TOKENS[None], use_cache=False).logits)
    assert len(runs) == 3 * len(model.model.layers), "the FFN of each layer runs again, its hooks do not"
    for name, x in plain.items():
        torch.testing.assert_close(found[name], x, rtol=1e-6, atol=1e-8)


def test_the_loss_of_a_part_is_divided_by_the_whole_steps_tokens(exported: Path) -> None:
    model = transformers_model(exported)
    rows = torch.stack([OTHER, OTHER.flip(0)])
    whole = model(rows, labels=rows).loss
    count = 2 * (len(OTHER) - 1)
    parts = [model(x[None], labels=x[None], num_items_in_batch=count).loss for x in rows]
    torch.testing.assert_close(sum(parts), whole)


# The example


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE / script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLE.parent.parent)},
        capture_output=True,
        text=True,
        timeout=180,
    )


def command(*arguments: object) -> str:
    result = CliRunner().invoke(ffn_fusion.main, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def write_pairs(file: Path, count: int) -> Path:
    """Text of the tokenizer's own; the rejected answer is the chosen one backwards."""
    words = [x for text in TEXT[:2] for x in text.split()]
    lines = []
    for n in range(count):
        turned = words[n % 7 :] + words[: n % 7]
        chosen, rejected = turned[3:8], turned[7:2:-1]
        texts = (" ".join(turned[: 2 + n % 2]), " " + " ".join(chosen), " " + " ".join(rejected))
        lines.append(json.dumps(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))))
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_dpo_of_a_fused_model(tmp_path: Path) -> None:
    parent, student, output = (tmp_path / x for x in ("parent", "fused", "aligned"))
    write_llama(parent, dtype="bfloat16")
    command("fuse", parent, "--drop-attention", "2-5", "-o", student)
    pairs, text = write_pairs(tmp_path / "pairs.jsonl", 24), tmp_path / "text.txt"
    text.write_text(" ".join(TEXT))
    options = ("--held-out", pairs, "--learning-rate", 1e-3, "--accumulate", 2, "--batch", 4, "--json")
    result = run("dpo.py", student, "--pairs", pairs, *options, "-o", output)
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert found["pairs"] == found["given"] == 24
    assert found["before"]["rewards/margins"] == 0
    assert found["after"]["rewards/margins"] > 0.05
    assert found["after"]["rewards/accuracies"] > 0.7
    assert found["after"]["loss"] < found["before"]["loss"] == pytest.approx(0.6931, abs=1e-4)

    record, first = manifest.read(output), manifest.read(student)
    assert record
    assert first
    source = huggingface.read(student)
    kept = {x: first[x] for x in ("source", "plan", "layers")}
    assert {x: record[x] for x in kept} == kept
    assert record["preference"]["from"] == source.digest
    assert (output / "config.json").read_bytes() == (student / "config.json").read_bytes()
    assert (output / "tokenizer.json").read_bytes() == (student / "tokenizer.json").read_bytes()
    assert sorted(x.name for x in output.iterdir()) == sorted(x.name for x in student.iterdir())
    assert not list(tmp_path.glob(".aligned*"))
    assert not verification.verify(output).problems
    trained = huggingface.read(output)
    assert trained.dtype == "bfloat16"
    assert mapping.read(parent, output).pairs == ((0, 0), (1, 1), (2, 4), (3, 5))  # what distill reads
    tokens, positions = TOKENS[None], torch.arange(len(TOKENS))[None]
    logits = load(trained, torch.float32)(tokens, positions)
    assert (logits - load(source, torch.float32)(tokens, positions)).abs().max() > 1e-2
    model = transformers_model(output, dtype=torch.float32)
    torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-4, atol=1e-4)
    for arguments in (
        ("inspect", output),
        ("evaluate", output, "--parent", parent, "--data", text, "--length", 32, "--samples", 4),
        ("convert", output, "-o", tmp_path / "checkpoint"),
        ("verify", tmp_path / "checkpoint"),
    ):
        command(*arguments)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", 'line 2 has no "prompt" of type string'),
        ('{"prompt": "a", "chosen": "b"}', 'line 2 has no "rejected" of type string'),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', 'line 2: "chosen" and "rejected" are the same'),
    ],
)
def test_pairs_that_are_none(exported: Path, tmp_path: Path, line: str, message: str) -> None:
    file = write_pairs(tmp_path / "pairs.jsonl", 1)
    file.write_text(file.read_text() + line)
    check_refused(exported, tmp_path, ("--pairs", file), f"{file}: {message}")


def check_refused(model: Path, tmp_path: Path, options: tuple[object, ...], message: str) -> None:
    result = run("dpo.py", model, *options, "-o", tmp_path / "aligned")
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*aligned*"))


def test_what_else_is_refused(exported: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 2)
    check_refused(exported, tmp_path, ("--pairs", tmp_path / "none.jsonl"), "none.jsonl: cannot be read")
    check_refused(exported, tmp_path, ("--pairs", pairs, "--max-length", 257), "the model has 256 positions")
    (tmp_path / "there").mkdir()
    result = run("dpo.py", exported, "--pairs", pairs, "-o", tmp_path / "there")
    assert result.returncode == 1
    assert "there: exists; remove it" in result.stderr


def test_pairs_of_the_demo(tmp_path: Path) -> None:
    for name in ("one", "two"):
        result = run("demo_pairs.py", "--train", 40, "--held-out", 10, "-o", tmp_path / name)
        assert result.returncode == 0, result.stderr
    files = sorted(x.name for x in (tmp_path / "one").iterdir())
    assert files == ["held-out.jsonl", "held-out.txt", "train.jsonl"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    lines = {x: (tmp_path / "one" / x).read_text().splitlines() for x in files if x.endswith("l")}
    assert {name: len(x) for name, x in lines.items()} == {"held-out.jsonl": 10, "train.jsonl": 40}
    for pair in map(json.loads, lines["train.jsonl"] + lines["held-out.jsonl"]):
        assert pair["chosen"] != pair["rejected"]
        assert sorted(pair["chosen"].split()) == sorted(pair["rejected"].split())
        assert re.sub(r"\S+", "", pair["chosen"]) == re.sub(r"\S+", "", pair["rejected"])
