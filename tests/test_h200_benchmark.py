"""The GPU benchmark's code on the CPU: that all parts run, share weights as they say, and tell the truth."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.h200 import checks, parts, stacks
from benchmarks.h200.__main__ import run_part, write
from benchmarks.h200.gpu import Rates, Settings, times
from benchmarks.h200.parts import AllReduce
from benchmarks.h200.verdicts import show, verdicts
from builder.config import Config

ROOT = Path(__file__).resolve().parent.parent
CPU = Settings(device=torch.device("cpu"), quick=True)
GROUPS = [(4, 6)]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    file = tmp_path_factory.mktemp("h200") / "results" / "h200.json"
    command = [sys.executable, "-m", "benchmarks.h200", "--device", "cpu", "--quick", "-o", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    read = json.loads(file.read_text())
    assert done.stdout == show(read) + "\n"
    return read


def test_every_part_has_figures(result: dict) -> None:
    assert not [name for name, part in result["parts"].items() if "failed" in part or "ended" in part]
    batches = {"batch 1", "batch 2"}
    for name in ("decode 8B", "49B, rank of 8", "253B, rank of 8"):
        assert batches <= set(result["parts"][name])
    stack = result["parts"]["FFN stacks"]
    assert all(batches <= set(row) for name, row in stack.items() if name != "seconds")
    assert {name.split()[0] for name in stack if name != "seconds"} == {"bf16", "fp8"}
    kinds = ("parent", "attention dropped", "fused")
    assert set(result["parts"]["decode 8B"]["batch 1"]) == {*kinds, *(f"{k}, sums" for k in kinds)}
    assert set(stack["bf16 64x96x2"]["batch 1"]) == {"sequential", "sequential, sums", "fused", "fused, sums"}
    rank = result["parts"]["49B, rank of 8"]
    assert rank["all_reduce"]["modelled"] is True
    assert (rank["batch 1"]["sequential"]["all_reduces"], rank["batch 1"]["fused"]["all_reduces"]) == (12, 10)


def test_the_result_names_the_machine_and_the_rates(result: dict) -> None:
    assert result["hardware"]["device"] == "cpu"
    assert result["hardware"]["torch"] == torch.__version__
    assert result["rates"]["copy_bytes_per_s"] > 0
    assert set(result["targets"]["met"]) == {"share", "ratio"}


def test_a_fused_model_is_its_members_side_by_side() -> None:
    """Gate and up of the members are rows of the fused ones, whose memory they are; all else is shared."""
    architecture = stacks.without_attention(parts.tiny(), range(4, 8))
    whole = stacks.random_model(stacks.fused(architecture, GROUPS), CPU)
    sequence = stacks.sequential(whole, architecture, GROUPS)
    assert [len(x) for x in stacks.fused_members(8, GROUPS)] == [1, 1, 1, 1, 3, 1]
    assert [x.intermediate_size for x in whole.architecture.layers] == [192] * 4 + [576, 192]
    wide = whole.decoder.layers[4].ffn
    members = [sequence.decoder.layers[i].ffn for i in (4, 5, 6)]
    for name in ("gate", "up"):
        joined = torch.cat([getattr(m, name).weight for m in members])
        assert torch.equal(joined, getattr(wide, name).weight)
        assert getattr(members[0], name).weight.data_ptr() == getattr(wide, name).weight.data_ptr()
    assert members[0].down.weight.shape == (64, 192)
    assert sequence.decoder.layers[0].attention is whole.decoder.layers[0].attention
    assert sequence.decoder.layers[7].ffn is whole.decoder.layers[5].ffn
    assert sequence.flops(3) == whole.flops(3) == 3 * architecture.flops_per_token()
    norms = 2 * 64 * 2  # two norms fewer, in 2 bytes
    assert sequence.decoder.layers[5].ffn_norm is whole.decoder.layers[4].ffn_norm
    assert sequence.weight_bytes() - whole.weight_bytes() == norms


def test_a_parent_has_attention_where_the_child_has_none() -> None:
    parent = parts.tiny()
    bare = stacks.without_attention(parent, range(4, 8))
    child = stacks.random_model(bare, CPU)
    made = stacks.variant(child, parent, range(8))
    assert made.decoder.layers[5].attention is not None
    assert made.decoder.layers[5].ffn is child.decoder.layers[5].ffn
    assert all(x.device.type == "cpu" for x in made.decoder.parameters())


def test_steps_compute_what_the_decoder_computes() -> None:
    """The driver of compiled layers against the engine's own module."""
    from engines.embedded.model import Decode

    model = stacks.random_model(parts.tiny(), CPU)
    cache = stacks.new_pool(parts.tiny(), 2, 128, CPU)
    for x in cache:
        x.normal_()
    context, step = 128, stacks.Steps(CPU, vector=False)
    with torch.no_grad():
        got = step.decode(model, [x.clone() for x in cache], 2, context)()
        whole = Decode(parts.tiny(), stacks.numbers(None), lambda x: x)
        whole.load_state_dict(model.decoder.state_dict())
        whole.rope_frequencies = model.decoder.rope_frequencies
        positions = torch.full((2,), context - 1)
        wanted = whole(torch.zeros(2, dtype=torch.int64), positions, torch.arange(4).view(2, 2), cache)
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)


def test_layers_are_compiled_once_for_their_kind() -> None:
    """Attention or not, whatever the width unless products are sums; a batch of 1 is a kind of its own."""
    from torch._dynamo.utils import counters

    bare = stacks.without_attention(parts.tiny(), range(4, 8))
    whole = stacks.random_model(stacks.fused(bare, GROUPS), CPU)
    models = (whole, stacks.sequential(whole, bare, GROUPS))
    pool = stacks.new_pool(bare, 4, 128, CPU)
    for vector, batches, most in ((False, (1, 2, 3, 4), 8), (True, (1,), 5)):
        steps, before = stacks.Steps(CPU, vector), counters["stats"]["unique_graphs"]
        with torch.no_grad():
            for batch in batches:
                for model in models:
                    steps.decode(model, pool, batch, 128)()
        assert counters["stats"]["unique_graphs"] - before <= most


def test_shapes_are_the_published_ones() -> None:
    """Parameters of a rank of 8, and what fusing takes away."""
    for name, groups, fewer in (
        ("super-49b", [(42, 50), (53, 69)], 24),
        ("ultra-253b", [(66, 73), (74, 85), (86, 100), (101, 114)], 45),
    ):
        whole = Config(parts.CONFIGS / f"nemotron-{name}.json").architecture()
        fused = stacks.fused(whole.shard(8), groups)
        assert whole.all_reduces_per_token(8) - fused.all_reduces_per_token(8) == fewer


def test_floors() -> None:
    rates = Rates(bytes_per_s=1e12, flops_per_s={"bfloat16": 1e15})
    assert rates.floor_s(2e12, 1e15, "bfloat16") == 2
    assert rates.floor_s(1e12, 3e15, "fp8") == 3  # a GPU without FP8 rates
    each = AllReduce(ranks=8, latency_s=1e-5, bytes_per_s=450e9)
    assert each.seconds(450_000) == pytest.approx(1e-5 + 1.75e-6)


def test_variants_take_turns_from_both_ends() -> None:
    order: list[str] = []
    settings = replace(CPU, quick=True)
    found = times({n: lambda n=n: order.append(n) for n in "abc"}, settings)  # type: ignore[misc]
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"
    assert {name: len(x) for name, x in found.items()} == dict.fromkeys("abc", settings.rounds)


def test_verdicts() -> None:
    row = {"us": 100.0, "floor_us": 80.0, "share": 0.8}
    decode = {
        "attention dropped": row,
        "fused": {**row, "us": 110.0},
        "fused, sums": {**row, "share": 0.9, "us": 90.0},
    }
    rank = {
        "sequential": {**row, "with_all_reduces_us": 200.0},
        "fused": {**row, "with_all_reduces_us": 210.0},
    }
    told = verdicts({"decode 8B": {"batch 1": decode}, "49B": {"batch 4": rank}, "x": {"failed": "y"}})
    assert told["sequential_over_fused"] == {"decode 8B, batch 1": 1.1111, "49B, batch 4": 0.9524}
    assert told["slower_when_fused"] == ["49B, batch 4"]
    assert told["met"] == {"share": True, "ratio": False}
    assert verdicts({})["met"] == {"share": False, "ratio": False}


def test_a_part_that_fails_keeps_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def part():
        yield "batch 1", 1
        raise RuntimeError("out of memory\nmore")

    saved: list[dict] = []
    found = run_part(part, 60, lambda x: saved.append(dict(x)))
    assert (found["batch 1"], found["failed"]) == (1, "RuntimeError: out of memory")
    assert saved[0] == {"batch 1": 1}
    write(tmp_path / "new" / "r.json", found)
    assert [x.name for x in (tmp_path / "new").iterdir()] == ["r.json"]
    assert "out of memory" in capsys.readouterr().err


def test_a_part_ends_with_its_time() -> None:
    found = run_part(lambda: iter([("a", 1), ("b", 2)]), 1e-9, lambda x: None)
    assert (found["a"], found["ended"], "b" in found) == (1, "after its 0 s", False)
    assert run_part(lambda: iter([("a", 1)]), 0, lambda x: None)["ended"] == "before it began"


def test_checks_but_the_build_pass_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a built engine is tests/test_engine.py."""
    monkeypatch.setattr(checks, "CHECKS", checks.CHECKS[:-1])
    found = dict(checks.check(CPU))
    assert len(found) == 5
    assert [n for n, x in found.items() if not x.get("passed")] == ["graphs give what calls give"]
    assert found["graphs give what calls give"] == {"skipped": "no CUDA graphs on the CPU"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_no_gpu_is_one_line() -> None:
    command = [sys.executable, "-m", "benchmarks.h200"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "finds no usable GPU; give --device cpu --quick" in done.stderr
