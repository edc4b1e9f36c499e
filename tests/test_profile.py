"""Measured tables: exact differences from a made-up machine, reading, refusing, one real measurement."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from builder import huggingface
from builder.architecture import FFN, Attention, Linear
from builder.cli.estimate import estimate
from builder.errors import UserError
from builder.search import measured
from builder.search.latency import step_seconds
from engines import profiling
from engines.cli.profile import profile
from engines.profiling import BASE, Part, Wanted, base_layers, differences, engine_architecture, ladder
from ffn_fusion import OneLineErrors

WIDTHS = (64, 96, 256, 1024)
SECONDS = (11e-6, 20e-6, 30e-6, 111e-6)


def run(*arguments: object) -> Result:
    group = OneLineErrors(commands={"estimate": estimate, "profile": profile})
    return CliRunner().invoke(group, list(map(str, arguments)))


@pytest.fixture
def table(tiny_hf: Path, tmp_path: Path) -> Path:
    """A table for the tiny model, its figures made up."""
    a, file = huggingface.read_architecture(tiny_hf), tmp_path / "table.json"
    made_up = measured.Table(
        model="made up",
        hidden_size=a.hidden_size,
        num_attention_heads=a.num_attention_heads,
        head_dim=a.head_dim,
        vocab_size=a.vocab_size,
        tp_size=2,
        batch=4,
        context=128,
        dtype="float32",
        quant=None,
        device="cpu",
        outside=500e-6,
        attention=((1, 40e-6), (2, 50e-6)),
        ffn=tuple(zip(WIDTHS, SECONDS, strict=True)),
        noise=1e-6,
        hardware={"cpu": "made up"},
        versions={},
        method={},
    )
    measured.write(made_up, file)
    assert measured.read(file).table == made_up
    assert [x.name for x in tmp_path.iterdir()] == [file.name]
    return file


def test_widths_between_measured_ones_lie_on_lines(table: Path) -> None:
    costs = measured.read(table)
    for width in range(64, 1025, 8):
        expected = np.interp(width, WIDTHS, SECONDS)
        assert costs.ffn(FFN(intermediate_size=width)) == pytest.approx(float(expected), rel=1e-12)
    assert costs.attention(Attention(num_key_value_heads=1)) == 40e-6
    assert costs.attention(None) == costs.ffn(None) == 0.0
    assert costs.outside() == 500e-6
    assert costs.measured
    assert costs.source == f"measured: {table}"
    assert costs.widest == 1024


def test_what_was_not_measured_is_refused(table: Path, tiny_hf: Path) -> None:
    costs = measured.read(table)
    for width in (63, 1025):
        with pytest.raises(UserError, match=f"width {width} was not measured, only 64 to 1024"):
            costs.ffn(FFN(intermediate_size=width))
    with pytest.raises(UserError, match="4 KV heads was not measured, only 1, 2"):
        costs.attention(Attention(num_key_value_heads=4))
    for refused in (lambda: costs.attention(Linear()), lambda: costs.ffn(Linear())):
        with pytest.raises(UserError, match="a matrix in the place of"):
            refused()
    architecture = huggingface.read_architecture(tiny_hf)
    costs.check(architecture, tp_size=2, batch=4, context=128)
    for wrong in ({"tp_size": 1}, {"batch": 1}, {"context": 2048}):
        name, value = next(iter(wrong.items()))
        with pytest.raises(UserError, match=f"measured with {name} .*, not {value}"):
            costs.check(architecture, **wrong)
    with pytest.raises(UserError, match="measured for vocab_size 320, the model has 640"):
        costs.check(replace(architecture, vocab_size=640))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2 is not 1"),
        ({"more": 1}, "key 'more'"),
        ({"outside": -1}, "outside -1 is not a time"),
        ({"outside": "soon"}, "outside 'soon' is not a time"),
        ({"tp_size": 0}, "tp_size 0"),
        ({"hidden_size": "64"}, "hidden_size '64'"),
        ({"ffn": [[96, 1e-6], [64, 1e-6]]}, "ffn is not in ascending order"),
        ({"ffn": {"96": 1e-6}}, "ffn is not a list"),
        ({"attention": [[2, 0]]}, "attention is not a list"),
    ],
)
def test_broken_tables_are_refused_by_key(table: Path, change: dict[str, Any], words: str) -> None:
    table.write_text(json.dumps({**json.loads(table.read_text()), **change}))
    with pytest.raises(UserError, match=words):
        measured.read(table)


def test_estimate_takes_a_table(table: Path, tiny_hf: Path) -> None:
    result = run("estimate", tiny_hf, "--profile", table, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["basis"] == "measured"
    assert said["ms_per_token"] == pytest.approx(1e3 * (500e-6 + 6 * (50e-6 + 20e-6)))
    assert said["tokens_per_s_batch"] == pytest.approx(4 * said["tokens_per_s"])
    assert (said["batch"], said["tp_size"], said["context"]) == (4, 2, 128)
    assert "ttft_ms" not in said
    assert "gpu_bytes" not in said
    text = run("estimate", tiny_hf, "--profile", table, "--drop-attention", "1-5", "--tp", 2).stdout
    assert f"measured: {table}" in text
    assert "times faster, measured" in text
    assert "estimated" not in text
    # 0 whole, 1-4 fused to 384, 5 alone
    fused = 500e-6 + 50e-6 + 2 * 20e-6 + float(np.interp(384, WIDTHS, SECONDS))
    assert f"{fused * 1e3:.3f} ms" in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--tp", "1"], 1, "measured with tp_size 2, not 1"),
        (["--context", "64"], 1, "measured with context 128, not 64"),
        (["--gpu", "h200"], 2, "--gpu is for estimates"),
        (["--pp", "2"], 2, "--pp is for estimates"),
        (["--prompt", "9"], 2, "--prompt is for estimates"),
        (["--kv-heads", "1=1", "--drop-attention", "2-5", "--group", "2-5"], 0, "times faster"),
    ],
)
def test_estimate_refuses_what_a_table_is_not_of(
    arguments: list[str], code: int, words: str, table: Path, tiny_hf: Path
) -> None:
    result = run("estimate", tiny_hf, "--profile", table, *arguments)
    assert result.exit_code == code, result.output
    assert words in result.output


def test_estimate_refuses_a_table_that_is_none(tmp_path: Path, tiny_hf: Path) -> None:
    result = run("estimate", tiny_hf, "--profile", tmp_path / "none.json")
    assert result.exit_code == 1
    assert "none.json: missing" in result.output


def step_of(architecture: Any, drift: float = 0.0) -> float:
    """A machine whose parts cost exactly this much."""
    total = 300e-6 + drift
    for layer in architecture.layers:
        total += 7e-6 * layer.num_key_value_heads + 10e-6 * bool(layer.attention)
        total += 0.2e-6 * layer.intermediate_size + 5e-6 * bool(layer.ffn)
    return total


def test_differences_are_what_the_parts_cost(tiny_hf: Path) -> None:
    architecture = huggingface.read_architecture(tiny_hf)
    wanted = Wanted(kv_heads=(1, 2, 4), widths=(32, 96, 512), copies=5, context=64)
    results = [
        {
            part: step_of(engine_architecture(architecture, wanted, part), drift)
            for part in (BASE, *wanted.parts)
        }
        for drift in (0.0, 90e-6, -20e-6)  # the machine is slower in some rounds, and no part's fault
    ]
    found = differences(results, wanted)
    for heads in wanted.kv_heads:
        assert found.parts["attention", heads] == pytest.approx(7e-6 * heads + 10e-6)
    for width in wanted.widths:
        assert found.parts["ffn", width] == pytest.approx(0.2e-6 * width + 5e-6)
    assert found.outside == pytest.approx(300e-6)
    assert found.noise < 1e-12


def test_noise_that_hides_a_part_is_an_error() -> None:
    wanted = Wanted(kv_heads=(2,), widths=(96,), copies=2, context=64)
    parts: dict[Part, float] = {BASE: 100e-6, ("attention", 2): 99e-6, ("ffn", 96): 120e-6}
    with pytest.raises(UserError, match=r"attention 2: measured as -0.5 us, .*--copies 2 and --rounds 5"):
        differences([parts], wanted)


def test_the_ladder_has_the_models_widths_and_reaches_the_widest() -> None:
    assert ladder([96], 400, 1) == (6, 24, 48, 96, 192, 384, 400)
    assert ladder([14336], 4 * 14336, 8) == (896, 3584, 7168, 14336, 28672, 57344)
    assert all(width % 8 == 0 for width in ladder([90, 300], 1000, 8))
    assert ladder([96, 384], 200, 1)[-1] == 200


def test_requests_that_cannot_be_measured_are_refused() -> None:
    with pytest.raises(UserError, match="context: 10 is too short for 32 steps"):
        Wanted(kv_heads=(2,), widths=(96,), context=10)
    with pytest.raises(UserError, match="at least one"):
        Wanted(kv_heads=(), widths=(96,))
    with pytest.raises(UserError, match="copies: 0"):
        Wanted(kv_heads=(2,), widths=(96,), copies=0)


def test_an_engine_of_parts_is_built_and_timed(tmp_path: Path) -> None:
    """The real thing, once: two FFNs more than the base, and steps of the whole batch."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    architecture = huggingface.read_architecture(tmp_path / "config.json")
    wanted = Wanted(kv_heads=(2,), widths=(64, 96), batch=3, context=40, dtype="float32", copies=2, steps=16)
    manifest = profiling.build(architecture, wanted, ("ffn", 96), tmp_path / "engine")
    layers = manifest.architecture.layers
    assert [x.num_key_value_heads for x in layers] == [2, 0, 0]
    assert [x.intermediate_size for x in layers] == [96, 96, 96]
    assert manifest.max_batch_size == 3
    assert sorted(x.name for x in tmp_path.iterdir()) == ["config.json", "engine"]
    start = time.perf_counter()
    seconds = profiling.decode_seconds(tmp_path / "engine", wanted)
    assert 0 < seconds < (time.perf_counter() - start) / wanted.steps


def test_the_command_tabulates_what_the_engines_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but engines: the command asks for them, has them timed in turns, and writes the table."""
    config, output = tmp_path / "config.json", tmp_path / "table.json"
    config.write_text(json.dumps(CONFIG))
    built: dict[Path, Any] = {}
    timed: list[str] = []

    def build(architecture: Any, wanted: Wanted, part: Part, engine: Path) -> Any:
        built[engine] = engine_architecture(architecture, wanted, part)
        return SimpleNamespace(dtype="float32", hardware={"cpu": "made up"})

    def decode_seconds(engine: Path, wanted: Wanted) -> float:
        timed.append(engine.name)
        return step_of(built[engine])

    monkeypatch.setattr(profiling, "build", build)
    monkeypatch.setattr(profiling, "decode_seconds", decode_seconds)
    sizes = ("--kv-heads", "1,2", "--max-width", 4096, "--batch", 2, "--context", 64, "--tp", 2)
    result = run("profile", config, *sizes, "--rounds", 2, "-o", output, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"output": str(output), **json.loads(output.read_text())}
    assert timed[: len(timed) // 2] * 2 == timed
    assert timed[:3] == ["base-0", "attention-1", "attention-2"]
    assert "round 2 of 2" in result.stderr
    assert "warning" not in result.stderr
    costs = measured.read(output)
    for width in (128, 500, 2048, 4096):
        assert costs.ffn(FFN(intermediate_size=width)) == pytest.approx(0.2e-6 * width + 5e-6)
    architecture = huggingface.read_architecture(config)
    costs.check(architecture, tp_size=2, batch=2, context=64)
    assert step_seconds(architecture, costs) == pytest.approx(step_of(architecture))
    seen: list[str] = []

    def noisy_seconds(engine: Path, wanted: Wanted) -> float:
        seen.append(engine.name)
        late = engine.name == "ffn-4096" and seen.count(engine.name) == 2
        return step_of(built[engine]) + 900e-6 * late

    monkeypatch.setattr(profiling, "decode_seconds", noisy_seconds)
    noisy = run("profile", config, *sizes, "--copies", 8, "--rounds", 2, "-o", tmp_path / "noisy.json")
    assert noisy.exit_code == 0, noisy.output
    assert "warning: rounds differ" in noisy.stderr
    monkeypatch.setattr(profiling, "decode_seconds", lambda e, w: step_of(built[e]))
    text = run("profile", config, *sizes, "-o", tmp_path / "again.json").stdout
    assert "measured on this machine's cpu, TP 2, batch 2, context 64, float32" in text
    assert "attention, 2 KV heads           24.0" in text


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "float32",
    "hidden_act": "silu",
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 2048,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--context", "1000"], 1, ["max_seq_len", "max_position_embeddings 256"]),
        (["--tp", "3"], 1, ["tp_size: 3"]),
        (["--kv-heads", "3"], 1, ["num_key_value_heads 3"]),
        (["--context", "8"], 1, ["context: 8 is too short"]),
        (["--widths", "9", "--max-width", "9"], 2, ["--max-width"]),
        (["--quant", "fp8", "--context", "64"], 1, ["fp8"]),
    ],
)
def test_the_command_refuses(arguments: list[str], code: int, words: list[str], tmp_path: Path) -> None:
    config, output = tmp_path / "config.json", tmp_path / "table.json"
    config.write_text(json.dumps(CONFIG))
    result = run("profile", config, *arguments, "-o", output)
    assert result.exit_code == code, result.output
    for word in words:
        assert word in result.output
    assert not output.exists()


def test_the_command_looks_at_the_output_first(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    result = run("profile", config, "-o", config)
    assert result.exit_code == 1
    assert "config.json: exists" in result.output
    result = run("profile", config, "-o", tmp_path / "no" / "table.json")
    assert result.exit_code == 1
    assert "no such directory" in result.output


def test_the_base_is_as_large_as_the_model_but_not_larger_than_needed(tiny_hf: Path) -> None:
    architecture = huggingface.read_architecture(tiny_hf)  # 6 layers of 2 KV heads and width 96
    wanted = Wanted(kv_heads=(1, 2), widths=(24, 96, 384), context=64)
    assert base_layers(architecture, wanted) == 6
    wide = replace(wanted, widths=(24, 1_000_000, 2_000_000))  # 384 MB a layer
    many = replace(
        architecture, layers=engine_architecture(architecture, replace(wide, layers=99), BASE).layers
    )
    assert base_layers(many, wide) == 3
