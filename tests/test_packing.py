"""Documents that share a sequence: each as if it were alone, in logits, gradients and whole trainings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from distilling import ALONE, CONTEXT, SEQUENCES, arguments, fuse, invoke, message, trained, write_text

from builder import huggingface
from builder.errors import UserError
from builder.training import data, log, model, stages
from builder.training.batches import Batches
from builder.training.data import Stream

LENGTHS = ((7, 9), (16,), (1, 3, 12))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def student(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fuse(tiny_hf, tmp_path_factory.mktemp("students") / "fused")


def apart(tokens: torch.Tensor, lengths: tuple[tuple[int, ...], ...]) -> list[torch.Tensor]:
    """Each document as a batch of its own, in order."""
    return [part[None] for row, cuts in zip(tokens, lengths, strict=True) for part in row.split(list(cuts))]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("which", ["parent", "student"])
def test_packed_is_as_apart(which: str, recompute: bool, tiny_hf: Path, student: Path) -> None:
    checkpoint = huggingface.read(tiny_hf if which == "parent" else student)
    layers = range(len(checkpoint.architecture.layers))
    decoder = model.build(checkpoint, layers, ALONE, dtype=torch.float32, trained=True, recompute=recompute)
    random = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 320, (3, 16), generator=random)
    wanted = torch.randn(3, 16, 320, generator=random)

    states, logits = decoder(tokens, LENGTHS)
    (logits * wanted).sum().backward()
    packed = {name: x.grad.clone() for name, x in model.parameters(decoder).items()}
    decoder.zero_grad()
    alone = [decoder(x) for x in apart(tokens, LENGTHS)]
    beside = torch.cat([x for _, x in alone], 1)
    (beside * wanted.reshape(1, 48, 320)).sum().backward()

    torch.testing.assert_close(logits.reshape(1, 48, 320), beside, rtol=1e-5, atol=1e-5)
    for index, x in enumerate(states):
        torch.testing.assert_close(
            x.reshape(1, 48, 64), torch.cat([y[index] for y, _ in alone], 1), rtol=1e-5, atol=1e-5
        )
    for name, x in model.parameters(decoder).items():
        scale = x.grad.abs().max().item()
        torch.testing.assert_close(packed[name], x.grad, rtol=1e-5, atol=1e-5 * scale, msg=name)
    crossing = decoder(tokens)[1]  # not what a packed sequence is without its lengths
    assert (crossing[1] - logits[1]).abs().max() < 1e-5
    assert (crossing[0, 7:] - logits[0, 7:]).abs().max() > 1e-2


def test_lengths_and_what_is_learnt() -> None:
    begins = np.array([0, 5, 17, 18, 40, 41, 90, 131])
    stream = Stream(np.arange(200, dtype=np.int32), documents=begins)
    batches = Batches(stream, context=10, sequences=4, seed=0, stage=0, separate=True)
    for start in range(189):
        (lengths,), (counted,) = batches.lengths([start]), batches.counted([start]).tolist()
        belongs = [int((begins <= start + i).sum()) for i in range(11)]
        assert lengths == tuple(belongs[:10].count(x) for x in sorted(set(belongs[:10])))
        assert counted == [float(belongs[i] == belongs[i + 1]) for i in range(10)]
    together = Batches(stream, context=10, sequences=4, seed=0, stage=0)
    assert together.lengths([0, 35]) is None
    assert together.counted([0, 35]).eq(1).all()


def test_where_documents_begin(tiny_hf: Path, tmp_path: Path) -> None:
    texts = ["The quick brown fox", "jumps", "", "naïve café <|endoftext|> fox"]
    file, numbers = tmp_path / "text.jsonl", tmp_path / "ids.npy"
    file.write_text("".join(json.dumps({"text": x}) + "\n" for x in texts), encoding="utf-8")
    found = data.read(tiny_hf, [file], vocab_size=320)
    lengths = np.diff([*found.documents, len(found.ids)])
    assert len(lengths) == 4
    assert [int(x) for x in np.add.accumulate(lengths) - 1] == [
        *np.flatnonzero(found.ids == 0)[:3],
        len(found.ids) - 1,
    ]
    np.save(numbers, found.ids)  # where the token inside of the last text ends a document as well
    ends = np.flatnonzero(found.ids == 0)
    assert len(ends) == 5
    for files in ([numbers], [numbers, numbers]):
        again = data.read(tiny_hf, files, vocab_size=320)
        begins = [0, *(ends[:-1] + 1)]
        wanted = [x + n * len(found.ids) for n in range(len(files)) for x in begins]
        assert again.documents.tolist() == wanted


def test_responses_are_documents(tiny_hf: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    pairs = [{"prompt": "fox ", "response": "jumps"}, {"prompt": "a", "response": "lazy dog"}]
    file.write_text("".join(json.dumps(x) + "\n" for x in pairs), encoding="utf-8")
    found = data.read(tiny_hf, [file], vocab_size=320, supervised=True)
    assert found.documents.tolist() == [0, int(np.flatnonzero(found.ids == 0)[0]) + 1]


def test_numbers_that_nothing_ends() -> None:
    with pytest.raises(UserError, match=r"^stage 1: separate_documents: .* eos_token_id"):
        Batches(Stream(np.arange(100)), context=10, sequences=2, seed=0, stage=0, separate=True)


def test_the_first_step_like_transformers(tiny_hf: Path, student: Path, text: Path, tmp_path: Path) -> None:
    """Cosine distance and KL of the documents of each sequence, each run alone in transformers' models."""
    from transformers import AutoModelForCausalLM

    result = trained(*arguments(tiny_hf, student, text, tmp_path / "out", "--separate-documents"))
    stream = data.read(student, [text], vocab_size=320)
    batches = Batches(stream, context=CONTEXT, sequences=SEQUENCES, seed=7, stage=0, separate=True)
    starts = batches.starts(0)
    lengths = batches.lengths(starts)
    assert any(len(x) > 1 for x in lengths)
    parent, child = (
        AutoModelForCausalLM.from_pretrained(x, trust_remote_code=True).float() for x in (tiny_hf, student)
    )
    states: dict[tuple[str, int], torch.Tensor] = {}
    for name, who in (("parent", parent), ("child", child)):
        for index, layer in enumerate(who.model.layers):

            def keep(_module, _inputs, out, key=(name, index)):
                states[key] = out[0] if isinstance(out, tuple) else out

            layer.register_forward_hook(keep)
    cosine = kl = 0.0
    for part in apart(batches.tokens(starts)[:, :-1], lengths):
        with torch.no_grad():
            p, q = (x(part, use_cache=False).logits.log_softmax(-1) for x in (parent, child))
        kl += (p.exp() * (p - q)).sum().item()
        for ours, theirs in ((0, 0), (1, 1), (2, 4), (3, 5)):
            near = torch.cosine_similarity(states["child", ours], states["parent", theirs], dim=-1)
            cosine += (1 - near).sum().item() / 4
    count = SEQUENCES * CONTEXT
    assert result["first"]["kl"] == pytest.approx(kl / count, rel=1e-4)
    assert result["first"]["cosine"] == pytest.approx(cosine / count, rel=1e-4)


def test_stages_say_it_for_themselves(tiny_hf: Path, student: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "stages.yaml"
    file.write_text(
        "stages: [{tokens: 128, context: 16, separate_documents: true}, {tokens: 128, context: 16}]"
    )
    first, second = stages.read(file, {"batch_tokens": 64, "learning_rate": 1e-3})
    assert (first.separate_documents, second.separate_documents) == (True, False)
    models = ("--parent", tiny_hf, "--student", student, "--data", text, "--batch-tokens", 64)
    trained(*models, "--stages", file, "-o", tmp_path / "out", "--keep-checkpoints")
    entries = log.read(tmp_path / "out.jsonl")
    assert [x.stage for x in entries] == [1, 1, 2, 2]
    record = json.loads((tmp_path / "out" / "ffn-fusion.json").read_text())["distilled"]
    assert [x["separate_documents"] for x in record["stages"]] == [True, False]
    again = (
        *models,
        "--stages",
        file,
        "-o",
        tmp_path / "more",
        "--checkpoint-dir",
        tmp_path / "out.training",
    )
    told = message(invoke(*again, "--separate-documents"))
    assert "stages was" in told
    assert "'separate_documents': False" in told
    file.write_text("stages: [{tokens: 5, context: 8, separate_documents: maybe}]")
    with pytest.raises(UserError, match="stage 1: separate_documents: 'maybe' is neither true nor false"):
        stages.read(file, {"batch_tokens": 64, "learning_rate": 1e-3})
