"""distill: its curve and weights against transformers, over ranks and kills, and wrong use."""

from __future__ import annotations

import json
import math
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import write_llama
from distilling import (
    ALONE,
    CONTEXT,
    SEQUENCES,
    SHIM,
    STEPS,
    arguments,
    curve,
    fuse,
    invoke,
    message,
    torchrun,
    trained,
    weights,
    write_text,
)

from builder import huggingface, manifest, verification
from builder.errors import UserError
from builder.training import data, distillation, log, loss, mapping, saving, stages
from builder.training.batches import Batches
from builder.training.data import Stream
from builder.training.schedule import learning_rate
from builder.training.stages import Stage
from builder.training.trainer import Settings
from ffn_fusion import main


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def student(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 0 and 1 whole, 2-4 in one FFN, 5's FFN."""
    return fuse(tiny_hf, tmp_path_factory.mktemp("students") / "fused")


# The whole against transformers


def by_hand(parent_dir: Path, student_dir: Path, text: Path, steps: int) -> tuple[list[dict], dict]:
    """Losses and weights of a plain loop over transformers' own models and AdamW."""
    from transformers import AutoModelForCausalLM

    parent, child = (
        AutoModelForCausalLM.from_pretrained(x, trust_remote_code=True).float()
        for x in (parent_dir, student_dir)
    )
    states: dict[str, dict[int, torch.Tensor]] = {"parent": {}, "child": {}}
    for name, model in (("parent", parent), ("child", child)):
        for index, layer in enumerate(model.model.layers):

            def keep(_module, _inputs, out, name=name, index=index):
                states[name][index] = out[0] if isinstance(out, tuple) else out

            layer.register_forward_hook(keep)
    stream = data.read(student_dir, [text], vocab_size=320)
    batches = Batches(stream, context=CONTEXT, sequences=SEQUENCES, seed=7, stage=0)
    optimizer = torch.optim.AdamW(child.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    told = []
    for step in range(steps):
        tokens = batches.tokens(batches.starts(step))[:, :-1]
        with torch.no_grad():
            truth = parent(tokens, use_cache=False).logits
        logits = child(tokens, use_cache=False).logits
        distances = [
            1 - torch.cosine_similarity(states["child"][s], states["parent"][p], dim=-1).mean()
            for s, p in ((0, 0), (1, 1), (2, 4), (3, 5))
        ]
        p = truth.softmax(-1)
        kl = (p * (p.log() - logits.softmax(-1).log())).sum(-1).mean()
        cosine = sum(distances) / 4
        (cosine + kl).backward()
        norm = torch.nn.utils.clip_grad_norm_(child.parameters(), 1.0)
        told.append({"cosine": cosine.item(), "kl": kl.item(), "grad_norm": norm.item()})
        rising, last = math.ceil(0.3 * STEPS), STEPS - 1
        share = (1 + math.cos(math.pi * (step - rising) / (last - rising))) / 2
        rate = (step + 1) / rising if step < rising else 0.1 + 0.9 * share
        optimizer.param_groups[0]["lr"] = 1e-3 * rate
        optimizer.step()
        optimizer.zero_grad()
    return told, {n: x.detach().numpy() for n, x in child.named_parameters()}


@pytest.fixture(scope="module")
def reference(
    tiny_hf: Path, student: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict]:
    """A training that nothing disturbed."""
    output = tmp_path_factory.mktemp("reference") / "out"
    return output, trained(*arguments(tiny_hf, student, text, output))


def test_like_a_plain_loop_over_transformers(
    reference: tuple[Path, dict], tiny_hf: Path, student: Path, text: Path
) -> None:
    output, result = reference
    told, expected = by_hand(tiny_hf, student, text, STEPS)
    entries = log.read(Path(result["log"]))
    assert [x.step for x in entries] == [1, 2, 3, 4, 5, 6]
    for entry, wanted in zip(entries, told, strict=True):
        for name, value in wanted.items():
            assert getattr(entry, name) == pytest.approx(value, rel=1e-4), (entry.step, name)
        assert entry.loss == pytest.approx(wanted["cosine"] + wanted["kl"], rel=1e-4)
    before = weights(student)
    for name, x in weights(output).items():
        np.testing.assert_allclose(x, expected[huggingface.hf_name(name)], atol=2e-4, err_msg=name)
        assert np.abs(x - before[name]).max() > 1e-4, name


def test_the_output_is_a_model_like_any_other(
    reference: tuple[Path, dict], tiny_hf: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    output, result = reference
    assert result["layer_pairs"] == [[0, 0], [1, 1], [2, 4], [3, 5]]
    assert (result["steps"], result["tokens"], result["ranks"]) == (6, 384, 1)
    assert not Path(f"{output}.training").exists()
    before, after = (json.loads((x / "config.json").read_text()) for x in (student, output))
    assert after == before
    records = [manifest.read(x) or {} for x in (student, output)]
    for key in ("source", "layers", "plan"):
        assert records[1][key] == records[0][key]
    assert records[1]["distilled"]["from"] == huggingface.read(student).digest
    for command in (["inspect", output], ["verify", output], ["evaluate", output, "--data", text]):
        told = CliRunner().invoke(main, [str(x) for x in command])
        assert told.exit_code == 0, told.output
    again = trained(*arguments(tiny_hf, output, text, tmp_path / "again"))
    assert again["first"]["kl"] < result["first"]["kl"]


def test_it_learns(tiny_hf: Path, student: Path, text: Path, tmp_path: Path) -> None:
    more = ("--tokens", 60 * SEQUENCES * CONTEXT, "--plot", tmp_path / "curve.png")
    result = trained(*arguments(tiny_hf, student, text, tmp_path / "out", *more))
    assert result["last"]["kl"] < 0.6 * result["first"]["kl"]
    assert result["last"]["cosine"] < 0.8 * result["first"]["cosine"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


# Terms, schedule, data, stages


def test_terms() -> None:
    random = np.random.default_rng(0)
    x, y = random.standard_normal((2, 2, 3, 5, 8))  # two pairs of layers, [3, 5, 8] each
    distance = 1 - (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    told = loss.cosine_distance([torch.tensor(a) for a in x], [torch.tensor(a) for a in y])
    assert told.item() == pytest.approx(distance.mean(0).sum(), rel=1e-5)

    def softmax(z: np.ndarray) -> np.ndarray:
        return np.exp(z) / np.exp(z).sum(-1, keepdims=True)

    student, parent = random.standard_normal((2, 3, 5, 8)) * 3
    q, p = softmax(student / 2), softmax(parent / 2)
    told = loss.divergence(torch.tensor(student), torch.tensor(parent), 2.0)
    assert told.item() == pytest.approx(4 * (p * np.log(p / q)).sum(), rel=1e-5)
    targets, counted = random.integers(8, size=(3, 5)), random.integers(2, size=(3, 5))
    rows, columns = np.indices((3, 5))
    wanted = -(np.log(softmax(student))[rows, columns, targets] * counted).sum()
    told = loss.next_token(torch.tensor(student), torch.tensor(targets), torch.tensor(counted).float())
    assert told.item() == pytest.approx(wanted, rel=1e-5)


def test_learning_rate() -> None:
    rates = [learning_rate(i, 100, peak=2.0, warmup=0.1, final=0.25) for i in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.5)
    middle = [(rates[10 + i] - 1.25) + (rates[99 - i] - 1.25) for i in range(45)]
    assert middle == pytest.approx([0] * 45, abs=1e-9)  # a cosine is odd about its middle
    assert learning_rate(0, 1, peak=2.0, warmup=0.0, final=0.1) == 2.0


def test_order_is_of_seed_and_step_alone() -> None:
    stream = Stream(np.arange(1000, dtype=np.int32))
    batches = Batches(stream, context=10, sequences=7, seed=3, stage=0)
    forwards = [batches.starts(step) for step in range(40)]
    fresh = Batches(stream, context=10, sequences=7, seed=3, stage=0)
    assert [fresh.starts(step) for step in reversed(range(40))] == forwards[::-1]
    places = [x for starts in forwards for x in starts]
    first, second = places[:99], places[99:198]
    for epoch in (first, second):  # each sequence once, side by side
        assert np.unique(np.diff(sorted(epoch))).tolist() == [10]
    assert first[0] % 10 != second[0] % 10
    assert max(places) + 11 <= 1000
    assert batches.tokens(places[:2]).tolist() == [list(range(x, x + 11)) for x in places[:2]]
    assert Batches(stream, context=10, sequences=7, seed=4, stage=0).starts(0) != forwards[0]


def test_documents_are_packed(tiny_hf: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    texts = ["The quick brown fox", "jumps", "naïve café"]
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": x}) + "\n" for x in texts), encoding="utf-8")
    encoder = AutoTokenizer.from_pretrained(tiny_hf)
    wanted = [i for x in texts for i in [*encoder(x)["input_ids"], 0]]
    found = data.read(tiny_hf, [file], vocab_size=320)
    assert found.ids.tolist() == wanted
    np.save(tmp_path / "ids.npy", np.array(wanted, np.uint16))
    assert data.read(tiny_hf, [tmp_path / "ids.npy"], vocab_size=320).ids.tolist() == wanted
    with pytest.raises(UserError, match="outside vocab_size 100"):
        data.read(tiny_hf, [tmp_path / "ids.npy"], vocab_size=100)


def test_responses_alone_are_learnt(tiny_hf: Path, student: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pairs = [{"prompt": f"fox {i} ", "response": "the lazy dog"} for i in range(40)]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(x) + "\n" for x in pairs), encoding="utf-8")
    result = trained(*arguments(tiny_hf, student, file, tmp_path / "out", "--loss", "supervised"))
    assert (result["first"]["cosine"], result["first"]["kl"]) == (None, None)
    encoder = AutoTokenizer.from_pretrained(tiny_hf)
    ids, learnt = [], []
    for pair in pairs:
        asked, told = (encoder(pair[x])["input_ids"] for x in ("prompt", "response"))
        ids += [*asked, *told, 0]
        learnt += [0] * len(asked) + [1] * (len(told) + 1)
    starts = Batches(Stream(np.array(ids)), context=CONTEXT, sequences=SEQUENCES, seed=7, stage=0).starts(0)
    model = AutoModelForCausalLM.from_pretrained(student, trust_remote_code=True)
    total = count = 0.0
    for start in starts:
        places = range(start, start + CONTEXT)
        with torch.no_grad():
            logits = model(torch.tensor([[ids[i] for i in places]]), use_cache=False).logits[0]
        for row, i in zip(logits.log_softmax(-1), places, strict=True):
            total -= learnt[i + 1] * row[ids[i + 1]].item()
            count += learnt[i + 1]
    assert 0 < count < SEQUENCES * CONTEXT
    assert result["first"]["loss"] == pytest.approx(total / count, rel=1e-5)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "x"}\n')
    given = arguments(tiny_hf, student, bad, tmp_path / "no", "--loss", "supervised")
    assert '"prompt" and "response"' in message(invoke(*given))


def test_stages_one_after_the_other(tiny_hf: Path, student: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "stages.yaml"
    file.write_text(
        "stages:\n"
        "- {tokens: 1.28e2, context: 16}\n"
        "- {tokens: 128, context: 32, learning_rate: 5e-4, kl: 0, warmup: 0}\n"
        "- {tokens: 100, context: 16, loss: pretrain}\n"
    )
    models = ("--parent", tiny_hf, "--student", student, "--data", text, "-o", tmp_path / "out")
    result = trained(*models, "--stages", file, "--batch-tokens", 64, "--learning-rate", 1e-3, "--warmup", 0)
    entries = log.read(Path(result["log"]))
    assert [(x.stage, x.tokens) for x in entries] == [
        (1, 64),
        (1, 128),
        (2, 192),
        (2, 256),
        (3, 320),
        (3, 384),
    ]
    assert [x.learning_rate for x in entries] == pytest.approx([1e-3, 1e-4, 5e-4, 5e-5, 1e-3, 1e-4])
    terms = [(x.cosine is None, x.kl is None, x.lm is None) for x in entries[::2]]
    assert terms == [(False, False, True), (False, True, True), (True, True, False)]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("stages: []", "write `stages"),
        ("steps: 3", "write `stages"),
        ("stages: [{tokens: 5}]", "stage 1: has no context"),
        ("stages: [{tokens: 54e9, context: 8192, learnrate: 1}]", "stage 1: key 'learnrate' is unknown"),
        ("stages: [{tokens: many, context: 8}]", "stage 1: tokens: 'many' is not a number"),
        ("stages: [{tokens: 5, context: 2.5}]", "stage 1: context: 2.5 is not a whole number"),
        ("stages: [{tokens: 5, context: 8}, {tokens: 0, context: 8}]", "stage 2: tokens: 0 is not positive"),
        ("stages: [{tokens: 5, context: 8, loss: mse}]", "loss: 'mse' is not one of"),
        ("stages: [{tokens: 5, context: 8, cosine: 0, kl: 0}]", "weigh no loss"),
        ("stages: [{tokens: 5, context: 128}]", "batch_tokens: 64 holds no sequence of context 128"),
        ("stages: [{tokens: 5, context: 8, data: x}]", "data: 'x' is not a list"),
        ("stages: [", "not valid YAML"),
    ],
)
def test_stages_that_are_none(content: str, wanted: str, tmp_path: Path) -> None:
    file = tmp_path / "stages.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=r"stages\.yaml") as caught:
        stages.read(file, {"batch_tokens": 64, "learning_rate": 1e-3})
    assert wanted in str(caught.value)


def test_large_stages_are_read(tmp_path: Path) -> None:
    file = tmp_path / "stages.yaml"
    file.write_text("stages: [{tokens: 54e9, context: 8192}, {tokens: 0.8e9, context: 131072}]")
    first, second = stages.read(file, {"batch_tokens": 1 << 20, "learning_rate": 1e-4})
    assert (first.tokens, first.sequences, first.steps) == (54_000_000_000, 128, 51499)
    assert (second.sequences, second.steps) == (8, 763)
    assert stages.at((first, second), 51499) == (1, 0)


# Layers of the one and the other


def test_layers_that_are_gone_have_no_pair(tiny_hf: Path, tmp_path: Path) -> None:
    options = ("--drop-attention", "1-4", "--drop-ffn", "2", "--group", "1-3")
    couple = mapping.read(tiny_hf, fuse(tiny_hf, tmp_path / "fused", *options))
    assert couple.pairs == ((0, 0), (1, 3), (2, 4), (3, 5))
    assert couple.student.architecture.layers[1].members == (1, 3)
    assert mapping.last_members([0, None, 2], 3, 3, "x") == ((0, 0), (2, 2))  # nothing for layer 1


@pytest.mark.parametrize("layers", [None, [0, 1], [0, 1, 4], [0, 1, "2"]])
def test_a_mapping_of_other_models(layers: object) -> None:
    with pytest.raises(UserError, match=r"^x: layers"):
        mapping.last_members(layers, 3, 3, "x")


# Ways to compute the same


def test_recomputing_changes_nothing(
    reference: tuple[Path, dict], tiny_hf: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    more = ("--activation-checkpointing", "--micro-batch", 4)
    result = trained(*arguments(tiny_hf, student, text, tmp_path / "out", *more))
    assert curve(Path(result["log"])) == pytest.approx(curve(Path(reference[1]["log"])), rel=1e-5)


def test_bfloat16_is_near(
    reference: tuple[Path, dict], tiny_hf: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    result = trained(*arguments(tiny_hf, student, text, tmp_path / "out", "--bf16"))
    told, wanted = curve(Path(result["log"])), curve(Path(reference[1]["log"]))
    assert told != wanted
    assert told == pytest.approx(wanted, rel=0.05)


def test_tied_and_in_bfloat16(text: Path, tmp_path: Path) -> None:
    parent = write_llama(tmp_path / "parent", tie_word_embeddings=True, dtype="bfloat16")
    child = fuse(parent, tmp_path / "child")
    trained(*arguments(parent, child, text, tmp_path / "out", "--keep-checkpoints", "--weight-decay", 0.1))
    found = huggingface.read(tmp_path / "out")
    assert found.architecture.tie_word_embeddings
    assert "lm_head.weight" not in found.tensors
    assert found.dtype == "bfloat16"
    assert [x.name for x in (tmp_path / "out.training").glob("step-*")] == ["step-6"]


def test_two_ranks_are_as_one(
    reference: tuple[Path, dict], tiny_hf: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    """The first steps on one rank, then from its checkpoint on two; and all on two."""
    output, one = reference
    wanted = curve(Path(one["log"]))
    two = torchrun(tmp_path, 2, arguments(tiny_hf, student, text, tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    result = json.loads(two.stdout)
    assert result["ranks"] == 2
    assert curve(Path(result["log"])) == pytest.approx(wanted, rel=1e-5)
    expected = weights(output)
    for name, x in weights(tmp_path / "two").items():
        np.testing.assert_allclose(x, expected[name], atol=1e-4, err_msg=name)


def test_one_goes_on_where_two_stopped(
    reference: tuple[Path, dict], tiny_hf: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    given = arguments(tiny_hf, student, text, tmp_path / "out", "--checkpoint-every", 2)
    die = (
        "from builder.training import trainer\n"
        "kept = trainer.Trainer.step\n"
        "def step(self, stage, done, batches):\n"
        "    if done == 5:\n"
        "        raise SystemExit(9)\n"
        "    return kept(self, stage, done, batches)\n"
        "trainer.Trainer.step = step\n"
    )
    died = torchrun(tmp_path, 2, given, before=die)
    assert died.returncode == 1
    assert [x.name for x in (tmp_path / "out.training").glob("step-*")] == ["step-4"]
    result = trained(*given)
    assert (result["resumed_at"], result["ranks"]) == (4, 1)
    assert curve(Path(result["log"])) == pytest.approx(curve(Path(reference[1]["log"])), rel=1e-5)


# Kills and full disks


def test_killed_again_and_again(tiny_hf: Path, student: Path, text: Path, tmp_path: Path) -> None:
    """Whenever SIGKILL comes, the same command goes on to the same curve and the same weights."""
    more = ("--tokens", 24 * SEQUENCES * CONTEXT, "--checkpoint-every", 2)
    whole = trained(*arguments(tiny_hf, student, text, tmp_path / "whole", *more))
    given = arguments(tiny_hf, student, text, tmp_path / "out", *more)
    working = tmp_path / "out.training"
    kills = 0
    for wanted in (1, 6, 13):
        process = subprocess.Popen(
            [sys.executable, "-c", SHIM, *given],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parents[1],
        )
        deadline = time.monotonic() + 100
        while process.poll() is None and time.monotonic() < deadline:
            entries = log.read(working / "log.jsonl")
            if entries and entries[-1].step >= wanted:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    assert kills == 3
    result = trained(*given)
    assert result["resumed_at"] >= 12
    told = log.read(Path(result["log"]))
    assert [x.step for x in told] == list(range(1, 25))
    assert [x.loss for x in told] == pytest.approx(curve(Path(whole["log"])), rel=1e-5)
    expected = weights(tmp_path / "whole")
    for name, x in weights(tmp_path / "out").items():
        np.testing.assert_allclose(x, expected[name], atol=1e-4, err_msg=name)
    assert verification.verify(tmp_path / "out") is not None


def state(value: float) -> dict[str, torch.Tensor]:
    return {"weights.a": torch.full((400, 400), value), "exp_avg.a": torch.full((400, 400), value)}


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    checkpoints = saving.Checkpoints(tmp_path / "kept", ALONE)
    with checkpoints.held({"seed": 1}):
        checkpoints.save(3, state(1.5))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(UserError, match="step-3 is kept; make room") as caught:
                checkpoints.save(4, state(2.5))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(caught.value)
        assert [x.name for x in checkpoints.directory.iterdir() if "step" in x.name] == ["step-3"]
        found = state(0.0)
        checkpoints.load(3, found)
        assert all(torch.equal(x, torch.full((400, 400), 1.5)) for x in found.values())


def test_too_little_space_is_seen_before(
    tiny_hf: Path, student: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    told = message(invoke(*arguments(tiny_hf, student, text, tmp_path / "out")))
    assert "a checkpoint needs" in told
    assert "1 are free" in told


def test_a_loss_that_is_no_number_stops(tiny_hf: Path, student: Path, text: Path, tmp_path: Path) -> None:
    more = ("--learning-rate", 1e30, "--checkpoint-every", 1)
    told = message(invoke(*arguments(tiny_hf, student, text, tmp_path / "out", *more)))
    assert told.startswith("step 2: loss nan")
    assert "step-1 is kept" in told
    assert (tmp_path / "out.training" / "step-1").is_dir()
    assert not (tmp_path / "out").exists()


def test_another_training_is_refused(tiny_hf: Path, student: Path, text: Path, tmp_path: Path) -> None:
    checkpoints = saving.Checkpoints(tmp_path / "kept", ALONE)
    with checkpoints.held({"seed": 1}), pytest.raises(UserError, match="another process trains in it"):  # noqa: SIM117
        with saving.Checkpoints(tmp_path / "kept", ALONE).held({"seed": 1}):
            pass
    with checkpoints.held({"seed": 3}):  # nothing was trained yet
        pass
    with checkpoints.held({"seed": 1}):
        checkpoints.save(3, state(1.5))
    with (
        pytest.raises(UserError, match="seed was 1 when this training began, now it is 2"),
        checkpoints.held({"seed": 2}),
    ):
        pass
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    more = ("--checkpoint-dir", tmp_path / "photos")
    assert "not empty" in message(invoke(*arguments(tiny_hf, student, text, tmp_path / "out", *more)))


# Wrong use


def test_models_that_do_not_fit(tiny_hf: Path, student: Path, text: Path, tmp_path: Path) -> None:
    wide = write_llama(tmp_path / "wide", hidden_size=128)
    assert "hidden_size 64, the parent has 128" in message(
        invoke(*arguments(wide, student, text, tmp_path / "o"))
    )
    more = write_llama(tmp_path / "more", vocab_size=384)
    assert "vocab_size 320, the parent has 384" in message(
        invoke(*arguments(more, student, text, tmp_path / "o"))
    )
    other = write_llama(tmp_path / "other", intermediate_size=64)
    assert "give the very directory" in message(invoke(*arguments(other, student, text, tmp_path / "o")))
    plain = message(invoke(*arguments(tiny_hf, tiny_hf, text, tmp_path / "o")))
    assert "does not say which layers" in plain
    speaks = tmp_path / "speaks"
    shutil.copytree(student, speaks)
    words = json.loads((speaks / "tokenizer.json").read_text())
    vocab = words["model"]["vocab"]
    names = sorted(vocab, key=vocab.get)[5:7]
    vocab[names[0]], vocab[names[1]] = vocab[names[1]], vocab[names[0]]
    (speaks / "tokenizer.json").write_text(json.dumps(words))
    assert "has other tokens" in message(invoke(*arguments(tiny_hf, speaks, text, tmp_path / "o")))


def test_data_and_stages_that_do_not_fit(tiny_hf: Path, student: Path, text: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    told = message(invoke(*arguments(tiny_hf, student, short, tmp_path / "o")))
    assert "one step takes 4; give more text" in told
    assert "missing.txt: cannot be read" in message(
        invoke(*arguments(tiny_hf, student, tmp_path / "missing.txt", tmp_path / "o"))
    )
    long = arguments(tiny_hf, student, text, tmp_path / "o", "--context", 512, "--batch-tokens", 512)
    assert "context 512 is longer than max_position_embeddings 256" in message(invoke(*long))
    with pytest.raises(
        UserError, match="3 sequences of 8 tokens do not divide over 2 ranks; give batch_tokens 32"
    ):
        stages.check((Stage(tokens=8, context=8, batch_tokens=24, learning_rate=1.0),), 64, 2)
    (tmp_path / "there").mkdir()
    assert "exists" in message(invoke(*arguments(tiny_hf, student, text, tmp_path / "there")))


def test_wrong_use(tiny_hf: Path, student: Path, text: Path, tmp_path: Path) -> None:
    models = ("--parent", tiny_hf, "--student", student, "-o", tmp_path / "o")
    for given, wanted in (
        ((*models, "--data", text), "--tokens and --context, or --stages"),
        ((*models, "--data", text, "--stages", "x", "--tokens", 5), "leave out --tokens"),
        ((*models, "--tokens", 64, "--context", 16), "has no data"),
        (("--student", student, "-o", "o"), "--parent"),
        ((*models, "--warmup", 2), "--warmup"),
    ):
        result = invoke(*given)
        assert (result.exit_code, wanted in result.output) == (2, True), result.output


def test_help_needs_no_torch() -> None:
    code = "import sys; from builder.cli.distill import distill; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
    result = invoke("--help")
    assert (result.exit_code, "cosine distance" in result.output) == (0, True)


def test_a_job_is_called_without_the_command(
    tiny_hf: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    stage = Stage(tokens=64, context=16, batch_tokens=64, learning_rate=1e-3, data=(str(text),))
    result = distillation.distill(
        distillation.Job(
            parent=tiny_hf,
            student=student,
            output=tmp_path / "out",
            stages=(stage,),
            settings=Settings(),
            checkpoint_dir=tmp_path / "work",
            log=tmp_path / "log.jsonl",
        )
    )
    assert result["steps"] == 1
