"""The embedded engine: equal to the reference decoder, alone, in a crowd and over ranks; and its end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from builder import decoder, trtllm
from builder.errors import UserError
from engines import manifest
from engines.embedded.collectives import Alone
from engines.embedded.compilation import build
from engines.embedded.runtime import Runtime
from engines.embedded.session import Request, Session
from engines.manifest import Manifest

ROOT = Path(__file__).resolve().parent.parent
PROMPT = tuple(range(5, 75))  # longer than one span of 64 positions

LOGITS_SCRIPT = """
import sys
from pathlib import Path
import torch
from engines.embedded.collectives import MPIRanks
from engines.embedded.runtime import Runtime
ranks = MPIRanks()
halves = torch.tensor([1.0, 1 / 256]).to(torch.bfloat16)
own = halves[ranks.rank : ranks.rank + 1]
total = torch.ops.ffn_fusion.all_reduce(own)
assert torch.equal(total, halves.float().sum().to(torch.bfloat16)[None]), total
runtime = Runtime(Path(sys.argv[1]), ranks)
prompt = tuple(range(5, 75))
results = [
    runtime.prefill(2, (6, 7), prompt),
    runtime.prefill(0, (1,), prompt[:1]),
    runtime.decode((2, 0), (7, 9), (70, 1)),
]
if ranks.rank == 0:
    torch.save(results, sys.argv[2])
"""


def generate(session: Session, request: Request) -> list[int]:
    return [token for output in session.generate(request) for token in output.token_ids]


def greedy(model: decoder.Decoder, prompt: tuple[int, ...], count: int) -> list[int]:
    """Tokens of the reference decoder without a cache."""
    ids = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([ids]), torch.arange(len(ids))[None])
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> decoder.Decoder:
    return decoder.load(trtllm.read(tiny_checkpoint).rank(0))


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    with Session(
        request.getfixturevalue("tiny_engine" if request.param == 1 else "tiny_engine_tp2")
    ) as opened:
        yield opened


@pytest.fixture(scope="module")
def logits(tiny_engine: Path) -> list[torch.Tensor]:
    """Prefill of PROMPT, prefill of its first token, one decode of both, at TP 1."""
    runtime = Runtime(tiny_engine, Alone())
    results = [
        runtime.prefill(2, (6, 7), PROMPT),
        runtime.prefill(0, (1,), PROMPT[:1]),
        runtime.decode((2, 0), (7, 9), (70, 1)),
    ]
    return [x for x in results if x is not None]


def test_logits_are_the_reference_decoders(logits: list[torch.Tensor], reference: decoder.Decoder) -> None:
    long, short = (
        reference(torch.tensor([ids]), torch.arange(len(ids))[None])[0]
        for ids in ((*PROMPT, 7), (PROMPT[0], 9))
    )
    expected = [long[69:70], short[:1], torch.stack((long[70], short[1]))]
    for got, wanted in zip(logits, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5)


def test_two_ranks_give_the_logits_of_one(
    logits: list[torch.Tensor], tiny_engine_tp2: Path, tmp_path: Path
) -> None:
    script, result = tmp_path / "logits.py", tmp_path / "logits.pt"
    script.write_text(LOGITS_SCRIPT)
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    command = [
        Path(sys.executable).with_name("mpirun"),
        "-n",
        "2",
        "--oversubscribe",
        "--bind-to",
        "none",
        *root,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, sys.executable, script, tiny_engine_tp2, result], check=True, timeout=120, env=environment
    )
    for got, wanted in zip(torch.load(result), logits, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_greedy_tokens_are_the_reference_decoders(session: Session, reference: decoder.Decoder) -> None:
    for prompt in (PROMPT, PROMPT[:1], PROMPT[10:43]):
        got = generate(session, Request(input_ids=prompt, max_tokens=30))
        assert got == greedy(reference, prompt, 30)


def test_a_crowd_gets_what_each_gets_alone(session: Session) -> None:
    requests = [
        Request(
            input_ids=PROMPT[: 1 + 9 * i],
            max_tokens=20 + i,
            temperature=1.0 if i % 2 else None,
            top_k=40 if i % 2 else None,
            seed=i,
        )
        for i in range(7)
    ]
    assert len(requests) > session.manifest.max_batch_size
    alone = [generate(session, r) for r in requests]
    together = [session.generate(r) for r in requests]
    assert [[t for output in g for t in output.token_ids] for g in together] == alone
    assert [len(tokens) for tokens in alone] == [r.max_tokens for r in requests]


def test_end_id_and_stop_words(session: Session) -> None:
    tokens = generate(session, Request(input_ids=PROMPT, max_tokens=12))
    last = max(range(12), key=lambda i: tokens.index(tokens[i]))  # the token that is new the latest
    outputs = list(session.generate(Request(input_ids=PROMPT, max_tokens=12, end_id=tokens[last])))
    assert [t for output in outputs for t in output.token_ids] == tokens[:last]
    assert [output.finish_reason for output in outputs] == [None] * last + ["end_id"]
    word = tuple(tokens[last - 1 : last + 1])
    outputs = list(session.generate(Request(input_ids=PROMPT, max_tokens=12, stop_words=(word,))))
    assert [t for output in outputs for t in output.token_ids] == tokens[: last + 1]
    assert outputs[-1].finish_reason == "stop_words"


def test_closing_cancels(session: Session) -> None:
    longest = Request(input_ids=(1,), max_tokens=159)
    running = [session.generate(longest) for _ in range(40)]
    for generation in running:
        next(generation) if generation is running[0] else None
        generation.close()
        assert list(generation) == []
    start = time.monotonic()
    assert len(generate(session, Request(input_ids=(1,), max_tokens=2))) == 2
    assert time.monotonic() - start < 2  # not behind the 6,000 tokens that nobody wants any more


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"input_ids": (1,) * 97, "max_tokens": 1}, "input_ids"),
        ({"input_ids": (1,) * 96, "max_tokens": 65}, "max_tokens"),
        ({"input_ids": (1, 320), "max_tokens": 1}, "input_ids"),
    ],
)
def test_requests_over_a_limit_are_refused(session: Session, values: dict, field: str) -> None:
    with pytest.raises(UserError, match=f"^{field}: "):
        session.generate(Request(**values))


def test_the_limits_themselves_are_served(session: Session) -> None:
    assert len(generate(session, Request(input_ids=PROMPT + PROMPT[:26], max_tokens=64))) == 64


def test_a_session_needs_no_torch() -> None:
    code = "import sys, engines.embedded.session; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def copy_with(engine: Path, copy: Path, **changes: object) -> Path:
    shutil.copytree(engine, copy)
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**values, **changes}))
    return copy


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backend": "tensorrt-llm"}, "--backend embedded"),
        ({"version": 99}, "version 99"),
        ({"colour": "red"}, "'colour'"),
        ({"compiler": {"torch": "1.0.0", "cxx": "g++"}}, "torch 1.0.0"),
        ({"hardware": {"machine": "riscv64", "features": []}}, "riscv64"),
        ({"hardware": {"machine": os.uname().machine, "features": ["avx9000"]}}, "avx9000"),
        ({"hardware": []}, r"hardware is '\[\]'"),
        ({"tp_size": "two"}, "tp_size is 'two'"),
        ({"kv_cache_blocks": True}, "kv_cache_blocks is 'True'"),
    ],
)
def test_an_engine_built_for_something_else_is_refused(
    tiny_engine: Path, tmp_path: Path, changes: dict, words: str
) -> None:
    engine = copy_with(tiny_engine, tmp_path / "engine", **changes)
    with pytest.raises(UserError, match=words):
        Session(engine)


@pytest.mark.parametrize("name", ["decode.pt2", "rank0.safetensors", "config.json"])
def test_a_missing_file_is_named(tiny_engine: Path, tmp_path: Path, name: str) -> None:
    engine = copy_with(tiny_engine, tmp_path / "engine")
    (engine / name).unlink()
    with pytest.raises(UserError, match=f"{name}.*missing"):
        Session(engine)


def test_truncated_weights_are_refused_by_the_rank(tiny_engine: Path, tmp_path: Path) -> None:
    engine = copy_with(tiny_engine, tmp_path / "engine")
    os.truncate(engine / "rank0.safetensors", 100_000)
    with pytest.raises(UserError, match=r"rank0\.safetensors"):
        Session(engine)


def test_weights_of_another_engine_are_refused(
    tiny_engine: Path, tiny_engine_tp2: Path, tmp_path: Path
) -> None:
    engine = copy_with(tiny_engine, tmp_path / "engine")
    shutil.copy(tiny_engine_tp2 / "rank0.safetensors", engine / "rank0.safetensors")
    with pytest.raises(UserError, match=r"rank0\.safetensors: tensor '\S+' is not the engine's"):
        Session(engine)


def test_a_checkpoint_is_not_an_engine(tiny_checkpoint: Path) -> None:
    with pytest.raises(UserError, match="not an engine's; give what `build-engine` wrote"):
        Session(tiny_checkpoint)


def test_the_manifest_comes_back(tiny_engine_tp2: Path, tiny_checkpoint_tp2: Path) -> None:
    read = manifest.read(tiny_engine_tp2)
    checkpoint = trtllm.read(tiny_checkpoint_tp2)
    assert (read.architecture, read.checkpoint_digest) == (checkpoint.architecture, checkpoint.digest)
    assert (read.tp_size, read.dtype, read.max_seq_len) == (2, "float32", 160)
    assert isinstance(read, Manifest)
    files = {
        "config.json",
        "decode.pt2",
        "prefill.pt2",
        "kernels.so",
        "rank0.safetensors",
        "rank1.safetensors",
    }
    assert {file.name for file in tiny_engine_tp2.iterdir()} == files


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_input_len": 0}, "max_input_len"),
        ({"max_input_len": 256}, "max_input_len"),
        ({"max_seq_len": 257}, "max_seq_len"),
        ({"max_seq_len": 3}, "max_seq_len"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_limits_that_cannot_be_built_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, limits: dict, field: str
) -> None:
    with pytest.raises(UserError, match=f"^{field}: "):
        build(tiny_checkpoint, tmp_path / "engine", **limits)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_compilation_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "broken-g++"
    compiler.write_text("#!/bin/sh\necho broken compiler >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(UserError, match="cannot compile"):
        build(tiny_checkpoint, tmp_path / "engine")
    assert list(tmp_path.iterdir()) == [compiler]


def test_no_compiler_and_an_output_that_exists(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engine").mkdir()
    with pytest.raises(UserError, match="exists"):
        build(tiny_checkpoint, tmp_path / "engine")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"^no-such-compiler: "):
        build(tiny_checkpoint, tmp_path / "other")
    assert [x.name for x in tmp_path.iterdir()] == ["engine"]


def test_an_engine_larger_than_the_memory_is_refused(
    tiny_engine_tp2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engines import hardware

    monkeypatch.setattr(hardware, "free_memory", lambda: 1 << 20)
    with pytest.raises(
        UserError, match=r"2 ranks need .* GB of memory, 0\.0 GB are free .*--kv-cache-memory"
    ):
        Session(tiny_engine_tp2)


def test_the_cache_is_bounded_by_memory(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Two attention layers of 2 KV heads of 16 float32: 512 bytes a token, 3 blocks for 160 tokens."""
    from engines.embedded import memory

    block = 64 * 512
    engine = tmp_path / "engine"
    made = build(tiny_checkpoint, engine, max_seq_len=160, max_input_len=96, kv_cache_memory=4 * block + 9)
    assert (made.kv_cache_blocks, memory.kv_cache_bytes(made)) == (4, 4 * block)
    with Session(engine) as session:  # only one of them has room at a time
        longest = [session.generate(Request(input_ids=PROMPT, max_tokens=90)) for _ in range(3)]
        texts = [[t for output in g for t in output.token_ids] for g in longest]
    assert len(texts[0]) == 90
    assert texts[0] == texts[1] == texts[2]
    with pytest.raises(UserError, match=f"give at least {3 * block}"):
        build(tiny_checkpoint, tmp_path / "no", max_seq_len=160, kv_cache_memory=3 * block - 1)
