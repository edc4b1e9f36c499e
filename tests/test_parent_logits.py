"""Stored logits of the parent: their buckets, and trainings from them beside trainings with the parent."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_llama
from distilling import (
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
    write_text,
)

from builder.training import buckets, distillation, identity, log, loss
from builder.training.buckets import Format

KL_ALONE = ("--cosine-weight", 0)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def student(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fuse(tiny_hf, tmp_path_factory.mktemp("students") / "fused")


@pytest.fixture(scope="module")
def beside(tiny_hf: Path, student: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The curve with the parent beside."""
    output = tmp_path_factory.mktemp("beside") / "out"
    return curve(Path(trained(*arguments(tiny_hf, student, text, output, *KL_ALONE))["log"]))


@pytest.fixture(scope="module")
def stored(
    tiny_hf: Path, student: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict]:
    """16 tokens of each place, and what their training told."""
    directory = tmp_path_factory.mktemp("stored")
    more = (*KL_ALONE, "--parent-logits", directory / "logits", "--top-k", 16)
    return directory / "logits", trained(*arguments(tiny_hf, student, text, directory / "out", *more))


# Buckets


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 4


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_of_buckets_bounds_the_whole(temperature: float) -> None:
    """By hand in float64: at most that of the whole, more with each bucket, the same with all of them."""
    parent, child = logits(3, 5, 40), logits(3, 5, 40, seed=1)
    p, q = ((x.double() / temperature).softmax(-1).numpy() for x in (parent, child))
    whole = temperature**2 * (p * np.log(p / q)).sum()
    assert loss.divergence(child, parent, temperature).item() == pytest.approx(whole, rel=1e-5)
    told = []
    for k in (1, 4, 16, 39, 40):
        found = buckets.likeliest(parent, k, temperature)
        chosen = np.argsort(-p, -1)[..., :k]
        assert (np.sort(chosen, -1) == found.ids.numpy()).all()
        a, b = (np.take_along_axis(x, chosen, -1) for x in (p, q))
        by_hand = (a * np.log(a / b)).sum()
        if k < 40:
            rest_a, rest_b = 1 - a.sum(-1), 1 - b.sum(-1)
            by_hand += (rest_a * np.log(rest_a / rest_b)).sum()
        told.append(loss.bucket_divergence(child, found, temperature).item())
        assert told[-1] == pytest.approx(temperature**2 * by_hand, rel=1e-4)
    assert all(a <= b * (1 + 1e-5) for a, b in pairwise(told))
    assert told[0] < 0.9 * whole
    assert told[-1] == pytest.approx(whole, rel=1e-5)


def test_gradients_of_buckets() -> None:
    """q - p of each token with a bucket; the others share what is missing as they share their bucket."""
    parent, child = logits(7, 40), logits(7, 40, seed=1).requires_grad_()
    found = buckets.likeliest(parent, 5)
    loss.bucket_divergence(child, found).backward()
    p, q = parent.softmax(-1), child.detach().softmax(-1)
    inside = torch.zeros(7, 40).scatter(-1, found.ids, 1.0).bool()
    rest_p, rest_q = ((x * ~inside).sum(-1, keepdim=True) for x in (p, q))
    wanted = torch.where(inside, q - p, q - rest_p * q / rest_q)
    torch.testing.assert_close(child.grad, wanted, rtol=1e-4, atol=1e-6)
    every = logits(7, 40, seed=1).requires_grad_()
    loss.bucket_divergence(every, buckets.likeliest(parent, 40)).backward()
    torch.testing.assert_close(every.grad, q - p, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("vocab_size", "k"), [(320, 320), (65_536, 7), (65_537, 7), (200_000, 64)])
def test_what_is_written_is_read(vocab_size: int, k: int, dtype: str, tmp_path: Path) -> None:
    kind = Format(vocab_size=vocab_size, top_k=k, dtype=dtype)
    found = buckets.likeliest(logits(3, 4, vocab_size), k)
    tensors = kind.encode(found)
    assert sum(x.nbytes for x in tensors.values()) == 3 * 4 * kind.token_bytes
    buckets.save(tensors, tmp_path / "x.safetensors")
    assert [x.name for x in tmp_path.iterdir()] == ["x.safetensors"]
    again = kind.decode(buckets.load(tmp_path / "x.safetensors", [2, 0]))
    assert torch.equal(again.ids, found.ids[[2, 0]])
    tolerance = 2**-10 if dtype == "float16" else 5e-5  # sums over the vocabulary in float32
    torch.testing.assert_close(again.log_probs, found.log_probs[[2, 0]], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(again.log_probs.exp().sum(-1), torch.ones(2, 4))


def test_bytes_of_a_token() -> None:
    assert Format(vocab_size=128_256, top_k=64, dtype="float16").token_bytes == 64 * 4 + 4 + 4
    assert Format(vocab_size=32_000, top_k=64, dtype="float16").token_bytes == 64 * 4 + 4


# Trainings


def test_all_of_the_vocabulary_is_as_the_parent_beside(
    beside: list[float], tiny_hf: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    more = (*KL_ALONE, "--parent-logits", tmp_path / "logits", "--top-k", 320)
    exact = trained(*arguments(tiny_hf, student, text, tmp_path / "a", *more, "--log-probs", "float32"))
    assert curve(Path(exact["log"])) == pytest.approx(beside, rel=1e-5)
    shutil.rmtree(tmp_path / "logits")
    rounded = trained(*arguments(tiny_hf, student, text, tmp_path / "b", *more))
    assert curve(Path(rounded["log"])) == pytest.approx(beside, rel=1e-3)
    record = json.loads((tmp_path / "b" / "ffn-fusion.json").read_text())["distilled"]
    assert record["parent_logits"] == {"top_k": 320, "log_probs": "float16"}


def test_some_of_the_vocabulary(
    stored: tuple[Path, dict], beside: list[float], tiny_hf: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    directory, result = stored
    token_bytes = 16 * 4 + 4
    assert result["parent_logits"] == {
        "directory": str(directory),
        "top_k": 16,
        "steps": STEPS,
        "computed": STEPS,
        "bytes": STEPS * SEQUENCES * CONTEXT * token_bytes,
        "bytes_per_token": token_bytes,
    }
    files = list((directory / "stage-1").glob("step-*.safetensors"))
    assert len(files) == STEPS
    size = sum(x.stat().st_size for x in files)
    assert result["parent_logits"]["bytes"] < size < 1.2 * result["parent_logits"]["bytes"]
    kls = curve(Path(result["log"]))
    assert 0.1 * beside[0] < kls[0] < beside[0]
    assert len(kls) == STEPS


def test_computed_once(
    stored: tuple[Path, dict],
    tiny_hf: Path,
    student: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another learning rate and another student take what is there; more steps are added to it."""
    directory = tmp_path / "logits"
    shutil.copytree(stored[0], directory)
    more = (*KL_ALONE, "--parent-logits", directory, "--top-k", 16)
    longer = ("--tokens", (STEPS + 2) * SEQUENCES * CONTEXT)
    result = trained(*arguments(tiny_hf, student, text, tmp_path / "longer", *more, *longer))
    assert (result["parent_logits"]["steps"], result["parent_logits"]["computed"]) == (STEPS + 2, 2)

    def none(*_: object) -> None:
        pytest.fail("the parent is not needed")

    monkeypatch.setattr(distillation, "build_parent", none)
    faster = ("--learning-rate", 2e-3)
    result = trained(*arguments(tiny_hf, student, text, tmp_path / "faster", *more, *faster))
    assert result["parent_logits"]["computed"] == 0
    assert result["first"]["kl"] == pytest.approx(stored[1]["first"]["kl"], rel=1e-6)
    other = fuse(tiny_hf, tmp_path / "other", "--drop-attention", "3-5")
    result = trained(*arguments(tiny_hf, other, text, tmp_path / "o", *more, "--micro-batch", 2))
    assert result["parent_logits"]["computed"] == 0


def test_two_ranks_share_the_work(
    stored: tuple[Path, dict], tiny_hf: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    """Five steps on two ranks: the last is computed by one for both to go on."""
    more = (*KL_ALONE, "--parent-logits", tmp_path / "logits", "--top-k", 16)
    shorter = ("--tokens", 5 * SEQUENCES * CONTEXT)
    two = torchrun(tmp_path, 2, arguments(tiny_hf, student, text, tmp_path / "two", *more, *shorter))
    assert two.returncode == 0, two.stderr
    result = json.loads(two.stdout)
    assert (result["ranks"], result["parent_logits"]["computed"]) == (2, 5)
    for name in [f"step-{n}.safetensors" for n in range(1, 6)]:
        ours, theirs = (
            buckets.load(x / "stage-1" / name, [0, 1, 2, 3]) for x in (tmp_path / "logits", stored[0])
        )
        assert (ours["ids"] == theirs["ids"]).all()
        np.testing.assert_allclose(ours["rest"], theirs["rest"], rtol=1e-4, atol=1e-4)
    one = trained(*arguments(tiny_hf, student, text, tmp_path / "one", *more, *shorter))
    assert one["parent_logits"]["computed"] == 0
    assert curve(Path(result["log"])) == pytest.approx(curve(Path(one["log"])), rel=1e-5)


def test_killed_while_they_are_computed(
    stored: tuple[Path, dict], tiny_hf: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    more = (*KL_ALONE, "--parent-logits", tmp_path / "logits", "--top-k", 16)
    many = ("--tokens", 400 * SEQUENCES * CONTEXT)
    process = subprocess.Popen(
        [sys.executable, "-c", SHIM, *arguments(tiny_hf, student, text, tmp_path / "out", *more, *many)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[1],
    )
    third = tmp_path / "logits" / "stage-1" / "step-3.safetensors"
    deadline = time.monotonic() + 100
    while process.poll() is None and not third.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    there = len(list(third.parent.glob("step-*")))
    assert 3 <= there < 400
    (third.parent / ".step-400.safetensors").write_bytes(b"half of it")
    result = trained(*arguments(tiny_hf, student, text, tmp_path / "out2", *more))
    assert result["parent_logits"]["computed"] == max(0, STEPS - there)
    assert curve(Path(result["log"])) == pytest.approx(curve(Path(stored[1]["log"])), rel=1e-5)


def test_documents_apart_and_a_temperature(tiny_hf: Path, student: Path, text: Path, tmp_path: Path) -> None:
    """All buckets in float32, so that the parent beside tells the same."""
    more = (*KL_ALONE, "--separate-documents", "--temperature", 2.0, "--tokens", 2 * SEQUENCES * CONTEXT)
    keep = ("--parent-logits", tmp_path / "logits", "--top-k", 320, "--log-probs", "float32")
    a, b = (
        curve(Path(trained(*arguments(tiny_hf, student, text, tmp_path / name, *more, *kept))["log"]))
        for name, kept in (("a", keep), ("b", ()))
    )
    assert a == pytest.approx(b, rel=1e-5)


# What is refused


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        (("--seed", 8), "seed was 7 when its logits were computed, now it is 8"),
        (("--context", 32), "context was 16"),
        (("--batch-tokens", 128), "sequences was 4"),
        (("--temperature", 2.0), "temperature was 1.0"),
        (("--separate-documents",), "separate_documents was False"),
        (("--top-k", 8), "top_k was 16"),
        (("--log-probs", "float32"), "log_probs was 'float16'"),
        (("--bf16",), "bf16 was False"),
    ],
)
def test_logits_of_another_training(
    changed: tuple[object, ...],
    wanted: str,
    stored: tuple[Path, dict],
    tiny_hf: Path,
    student: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    more = (*KL_ALONE, "--parent-logits", stored[0], "--top-k", 16, *changed)
    told = message(invoke(*arguments(tiny_hf, student, text, tmp_path / "o", *more)))
    assert wanted in told
    assert "another --parent-logits" in told
    assert not (tmp_path / "o").exists()


def test_logits_of_other_data_and_another_parent(
    stored: tuple[Path, dict], tiny_hf: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    more = (*KL_ALONE, "--parent-logits", stored[0], "--top-k", 16)
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "text.jsonl").write_text("".join(reversed(lines)), encoding="utf-8")
    given = arguments(tiny_hf, student, tmp_path / "text.jsonl", tmp_path / "o", *more)
    assert "data was" in message(invoke(*given))
    retrained = write_llama(tmp_path / "retrained", seed=5)  # the same shapes
    given = arguments(retrained, student, text, tmp_path / "o", *more)
    assert "parent_weights was" in message(invoke(*given))


def test_what_is_not_stored(tiny_hf: Path, student: Path, text: Path, tmp_path: Path) -> None:
    there = ("--parent-logits", tmp_path / "logits")
    for more, wanted in (
        ((), "stage 1: cosine 1.0 needs the parent's hidden states"),
        ((*KL_ALONE, "--top-k", 321), "top_k: 321 is not between 1 and vocab_size 320"),
        (("--loss", "pretrain"), "no stage learns from the parent; leave out --parent-logits"),
    ):
        told = message(invoke(*arguments(tiny_hf, student, text, tmp_path / "o", *there, *more)))
        assert wanted in told
    assert not (tmp_path / "logits").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "stage-1").mkdir()
    (tmp_path / "photos" / "stage-1" / "cat.png").touch()
    more = (*KL_ALONE, "--parent-logits", tmp_path / "photos")
    assert "not empty" in message(invoke(*arguments(tiny_hf, student, text, tmp_path / "o", *more)))
    result = invoke(*arguments(tiny_hf, student, text, tmp_path / "o", "--top-k", 8))
    assert (result.exit_code, "--parent-logits" in result.output) == (2, True)


def test_broken_and_busy(
    stored: tuple[Path, dict], tiny_hf: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "logits"
    shutil.copytree(stored[0], directory)
    more = (*KL_ALONE, "--parent-logits", directory, "--top-k", 16)
    given = arguments(tiny_hf, student, text, tmp_path / "o", *more)
    file = directory / "stage-1" / "step-2.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    told = message(invoke(*given))
    assert str(file) in told
    assert "remove it, then give the same command again" in told
    file.unlink()
    with identity.locked(directory, "computes logits"):
        assert "another process computes logits in it" in message(invoke(*given))
    result = trained(*given)
    assert (result["parent_logits"]["computed"], result["resumed_at"]) == (1, None)
    assert file.read_bytes() == whole


def test_a_full_disk(
    tiny_hf: Path, student: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = (*KL_ALONE, "--parent-logits", tmp_path / "logits", "--top-k", 320)
    given = arguments(tiny_hf, student, text, tmp_path / "o", *more)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        told = message(invoke(*given))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "step-1.safetensors" in told
    assert "make room, then give the same command again" in told
    assert [x.name for x in (tmp_path / "logits" / "stage-1").iterdir()] == ["logits.json"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    needed = STEPS * SEQUENCES * CONTEXT * 320 * 4
    told = message(invoke(*given))
    assert f"need {needed:,} bytes, 1280 a token, 1 are free; give a smaller --top-k" in told


def test_what_is_needed_is_said(
    stored: tuple[Path, dict], tiny_hf: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    more = (*KL_ALONE, "--parent-logits", tmp_path / "logits", "--top-k", 16)
    result = invoke(*arguments(tiny_hf, student, text, tmp_path / "out", *more))
    assert result.exit_code == 0, result.exception
    assert f"the parent's logits need {6 * 64 * 68:,} bytes, 68 a token" in result.stderr
    assert "top 16, 68 bytes a token, 26,112 bytes; 6 of 6 steps computed now" in result.stdout
    assert log.read(tmp_path / "out.jsonl")[0].cosine is None


def test_an_error_of_one_rank_is_told_by_all(
    tiny_hf: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    """Rank 1 alone cannot write: rank 0 says so, and none waits for the other."""
    dying = (
        "import os\n"
        "from builder.training import buckets\n"
        "kept = buckets.save\n"
        "def save(tensors, file):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise OSError(28, 'No space left on device')\n"
        "    kept(tensors, file)\n"
        "buckets.save = save\n"
    )
    more = (*KL_ALONE, "--parent-logits", tmp_path / "logits", "--top-k", 16)
    died = torchrun(tmp_path, 2, arguments(tiny_hf, student, text, tmp_path / "out", *more), before=dying)
    assert died.returncode == 1
    told = f"{tmp_path / 'logits' / 'stage-1' / 'step-2.safetensors'}: No space left on device; make room"
    assert told in died.stderr
    assert (tmp_path / "logits" / "stage-1" / "step-1.safetensors").is_file()
