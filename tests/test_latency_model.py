"""The estimates: published speeds met, an independent count of bytes never beaten, and the right trends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from benchmarks.latency_fit import ANCHORS, SETTING, fit, llama
from builder import huggingface, trtllm
from builder.architecture import FFN, Architecture, Attention, Layer, Linear
from builder.checkpoint import tensor_shapes
from builder.cli.estimate import estimate
from builder.errors import UserError
from builder.search import gpu, latency
from builder.search.gpu import GPUS
from builder.search.roofline import CONSTANTS, Roofline, estimated
from builder.search.setting import Setting
from ffn_fusion import OneLineErrors

NEMOTRON = Path(__file__).parent / "data" / "nemotron_super_49b_config.json"
SMALL = llama(layers=32, hidden=4096, heads=32, width=14336)
MODELS = {anchor.name: anchor.architecture() for anchor in ANCHORS}
LARGE, MIDDLE = MODELS["Llama-3.1-405B"], MODELS["Llama-3.3-70B"]


def run(*arguments: object) -> Result:
    group = OneLineErrors(commands={"estimate": estimate})
    return CliRunner().invoke(group, ["estimate", *map(str, arguments)])


def answer(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def config(tmp_path: Path, values: dict[str, Any]) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    return file


def seconds(architecture: Architecture, setting: Setting) -> float:
    return latency.step_seconds(architecture, estimated(architecture, setting))


def dropped(architecture: Architecture, first: int, last: int, fused: bool) -> Architecture:
    """Layers first..last without attention, all but the last of them as one FFN if asked."""
    layers = list(architecture.layers)
    bare = [replace(x, attention=None) for x in layers[first : last + 1]]
    if fused:
        width = sum(x.intermediate_size for x in bare[:-1])
        members = tuple(m for x in bare[:-1] for m in x.members)
        bare[:-1] = [Layer(attention=None, ffn=FFN(intermediate_size=width), members=members)]
    return replace(architecture, layers=(*layers[:first], *bare, *layers[last + 1 :]))


def ascends(values: Sequence[float]) -> bool:
    return all(a <= b for a, b in pairwise(values)) and values[0] < values[-1]


@pytest.mark.parametrize("anchor", ANCHORS, ids=lambda x: x.name)
def test_published_speeds_are_met(anchor: Any, tmp_path: Path) -> None:
    arguments = ["--gpu", "h100", "--tp", "8", "--batch", "1", "--context", "2048", "--dtype", "fp8"]
    said = answer(config(tmp_path, anchor.config), *arguments)
    assert said["tokens_per_s"] == pytest.approx(anchor.tokens_per_s, rel=0.01)
    assert said["basis"] == "estimated"
    assert said["ms_per_token"] == pytest.approx(1e3 / said["tokens_per_s"])


def test_the_shipped_constants_are_the_fit() -> None:
    fitted = fit(replace(CONSTANTS, issue_s=40e-6, kernels_s=10e-6))
    assert fitted.issue_s == pytest.approx(CONSTANTS.issue_s, abs=0.06e-6)
    assert fitted.kernels_s == pytest.approx(CONSTANTS.kernels_s, abs=0.06e-6)
    assert replace(fitted, issue_s=0, kernels_s=0) == replace(CONSTANTS, issue_s=0, kernels_s=0)


def test_all_constants_are_possible() -> None:
    values = asdict(CONSTANTS)
    assert all(0 < x < 1 for x in values.values())


@pytest.mark.parametrize("tp_size", [1, 2, 8, 16])
def test_parts_are_as_the_document_says(tp_size: int) -> None:
    """The formulas of docs/latency-model.md, written once more for one attention and one FFN of 405B."""
    setting = Setting(gpu=GPUS["h100"], tp_size=tp_size, batch=4, context=8192, kv_dtype="bfloat16")
    costs = estimated(LARGE, setting)
    read = 0.9 * 3.35e12
    message, local, nodes = 4 * 16384 * 2, min(tp_size, 8), max(1, tp_size // 8)
    reduce = 0.0
    if local > 1:
        reduce += 1e-6 * local + 2 * (local - 1) / local * message / (0.8 * 450e9)
    if nodes > 1:
        reduce += 2 * 10e-6 + (message / 8) / (0.8 * 50e9)
    kv = 128 * max(1, 8 // tp_size)
    matrices = 16384 * (2 * 16384 // tp_size + 2 * kv)
    cache = 4 * 8192 * 2 * kv * 2
    attention = max(CONSTANTS.issue_s, (matrices + cache) / read + CONSTANTS.kernels_s) + reduce
    ffn = max(CONSTANTS.issue_s, 3 * 16384 * 53248 / tp_size / read + CONSTANTS.kernels_s) + reduce
    assert costs.attention(Attention(num_key_value_heads=8)) == pytest.approx(attention, rel=1e-9)
    assert costs.ffn(FFN(intermediate_size=53248)) == pytest.approx(ffn, rel=1e-9)
    assert costs.attention(None) == costs.ffn(None) == 0.0
    assert not costs.measured
    assert costs.source.startswith("estimated for H100, TP ")


@pytest.mark.parametrize(
    ("batch", "tp_size", "dtype"), [*product([1, 8, 64], [1, 4, 8], ["fp8", "bfloat16"])]
)
def test_no_estimate_beats_the_memory(batch: int, tp_size: int, dtype: str) -> None:
    """Every byte of the shard's tensors, named one by one, and of the cache has to be read."""
    fused = dropped(MIDDLE, 40, 60, fused=True)
    size = {"fp8": 1, "bfloat16": 2}[dtype]
    for name, card in GPUS.items():
        setting = Setting(gpu=card, tp_size=tp_size, batch=batch, dtype=dtype)
        shapes = tensor_shapes(fused.shard(tp_size))
        weights = sum(
            int(np.prod(shape)) * (size if shape_name.startswith("layers.") and len(shape) > 1 else 2)
            for shape_name, shape in shapes.items()
            if shape_name != "embedding.weight"
        )
        local_heads = max(1, 8 // tp_size)
        attentions = sum(x.attention is not None for x in fused.layers)
        cache = batch * 2048 * attentions * 2 * local_heads * 128 * size
        peak = {"h100": 3.35e12, "h200": 4.8e12}[name]
        assert seconds(fused, setting) > (weights + cache) / peak


def test_a_step_taken_apart_is_the_step() -> None:
    for setting in (
        SETTING,
        replace(SETTING, tp_size=16, batch=32, context=65536),
        replace(SETTING, pp_size=2),
    ):
        costs = Roofline(architecture=LARGE, setting=setting)
        model = dropped(LARGE, 60, 80, fused=True)
        work = costs.step(model)
        assert work.total == pytest.approx(latency.step_seconds(model, costs), rel=1e-12)
        assert all(value >= 0 for value in asdict(work).values())


@pytest.mark.parametrize("batch", [1, 2, 8, 32, 64])
@pytest.mark.parametrize("architecture", [LARGE, MIDDLE], ids=["405B", "70B"])
def test_fusing_is_faster(architecture: Architecture, batch: int) -> None:
    setting = replace(SETTING, batch=batch)
    whole = seconds(architecture, setting)
    apart = seconds(dropped(architecture, 40, 60, fused=False), setting)
    fused = seconds(dropped(architecture, 40, 60, fused=True), setting)
    assert fused < apart < whole
    # 19 FFNs fewer save at least their all-reduces and what their kernels cost besides.
    assert apart - fused > 19 * (8e-6 + CONSTANTS.kernels_s) * 0.999


def test_more_ranks_are_faster_until_all_reduces_weigh_more() -> None:
    by_tp = [seconds(MIDDLE, replace(SETTING, tp_size=tp, dtype="bfloat16")) for tp in (1, 2, 4, 8)]
    assert ascends(by_tp[::-1])
    costs = {tp: Roofline(architecture=LARGE, setting=replace(SETTING, tp_size=tp)) for tp in (4, 8, 16)}
    reduces = [costs[tp].step(LARGE).all_reduce for tp in (4, 8, 16)]
    assert ascends(reduces)
    assert reduces[2] > 2 * reduces[1], "two nodes are joined by less than NVLink"


def test_a_small_model_gains_nothing_from_more_ranks(tmp_path: Path) -> None:
    small = huggingface.read_architecture(config(tmp_path, SMALL))
    by_tp = {tp: seconds(small, replace(SETTING, tp_size=tp)) for tp in (1, 2, 4, 8)}
    assert by_tp[8] > by_tp[4], "all-reduces dominate"
    assert by_tp[2] < by_tp[1]


@pytest.mark.parametrize("name", ["batch", "context"])
def test_a_step_grows_with_batch_and_context(name: str) -> None:
    values = [1, 16, 2048, 65536, 1 << 20] if name == "context" else [1, 2, 8, 64, 512]
    for architecture in (LARGE, MIDDLE):
        assert ascends([seconds(architecture, replace(SETTING, **{name: value})) for value in values])


def test_the_first_token_takes_longer_with_the_prompt_and_never_less_than_its_flops() -> None:
    costs = Roofline(architecture=MIDDLE, setting=SETTING)
    times = [costs.first_token(MIDDLE, prompt).total for prompt in (1, 128, 1024, 8192, 65536)]
    assert ascends(times)
    lm_head = 2 * MIDDLE.vocab_size * MIDDLE.hidden_size
    for prompt, time in zip((1024, 8192, 65536), times[2:], strict=True):
        flops = (MIDDLE.flops_per_token() - lm_head) * prompt
        assert time > flops / (8 * 1979e12)
        assert time < 20 * flops / (8 * 1979e12)


def test_h200_is_faster_where_memory_bounds() -> None:
    faster = replace(SETTING, gpu=GPUS["h200"])
    assert seconds(LARGE, faster) < 0.9 * seconds(LARGE, SETTING)
    for batch, tp_size in product((1, 64), (1, 8)):
        both = [seconds(MIDDLE, replace(s, batch=batch, tp_size=tp_size)) for s in (SETTING, faster)]
        assert both[1] < both[0]


def test_pipeline_stages_share_memory_and_not_time() -> None:
    one, two = (replace(SETTING, pp_size=pp) for pp in (1, 2))
    assert two.num_nodes == 2
    assert seconds(LARGE, two) == pytest.approx(seconds(LARGE, one), rel=0.01)
    assert seconds(LARGE, two) > seconds(LARGE, one)
    halves = latency.gpu_bytes(LARGE, two) / latency.gpu_bytes(LARGE, one)
    assert 0.5 < halves < 0.54  # with the embedding or lm_head
    assert not latency.fits(LARGE, replace(SETTING, dtype="bfloat16"))
    assert latency.fits(LARGE, replace(two, dtype="bfloat16"))


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("tied", [False, True])
def test_weight_bytes_are_those_of_a_checkpoint(
    tp_size: int, pp_size: int, tied: bool, tmp_path: Path
) -> None:
    """`convert --dry-run` lays out every rank's file to the byte."""
    small = {**SMALL, "num_hidden_layers": 6, "tie_word_embeddings": tied}
    declared = huggingface.declared(config(tmp_path, small))
    shown = trtllm.preview(declared, declared, tp_size=tp_size, pp_size=pp_size)
    setting = Setting(gpu=GPUS["h100"], tp_size=tp_size, pp_size=pp_size, dtype="bfloat16")
    ours = latency.memory(declared.architecture, setting)
    stored = max(shown.rank_bytes)
    if tied and tp_size == pp_size == 1:
        assert ours.weights <= stored * 1.001
    else:
        assert ours.weights == pytest.approx(stored, rel=1e-3)
    assert ours.kv_cache == 2048 * 2 * (6 // pp_size) * (8 // tp_size) * 128 * 2


@pytest.mark.parametrize("setting", [SETTING, replace(SETTING, tp_size=1), replace(SETTING, batch=32)])
def test_blocks_in_parallel_save_their_all_reduces(setting: Setting) -> None:
    """Of four blocks and of three, each kind of part keeps one all-reduce: 2 x (3 + 2) are saved."""
    windows = replace(MIDDLE, parallel=((38, 41), (71, 73)))
    costs = Roofline(architecture=MIDDLE, setting=setting)
    message, tp_size = setting.batch * 8192 * 2, setting.tp_size
    one = 1e-6 * tp_size + 2 * (tp_size - 1) / tp_size * message / (0.8 * 450e9) if tp_size > 1 else 0.0
    saved = latency.step_seconds(MIDDLE, costs) - latency.step_seconds(windows, costs)
    assert saved == pytest.approx(10 * one, rel=1e-9, abs=1e-12)
    assert costs.step(windows).total == pytest.approx(latency.step_seconds(windows, costs), rel=1e-12)
    assert costs.step(windows).all_reduce == pytest.approx(150 * one, rel=1e-9)


def test_matrices_in_the_place_of_parts_are_priced() -> None:
    costs = estimated(LARGE, SETTING)
    expected = max(CONSTANTS.issue_s, 16384 * 2048 / (0.9 * 3.35e12) + CONSTANTS.kernels_s)
    for seconds_of in (costs.attention(Linear()), costs.ffn(Linear())):
        assert seconds_of == pytest.approx(expected + 8e-6, rel=0.01)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="tp_size: 7 does not divide num_attention_heads 64"):
        estimated(MIDDLE, replace(SETTING, tp_size=7))
    with pytest.raises(UserError, match="gpu: 'b200' is not known; choose one of h100, h200"):
        gpu.named("b200")
    with pytest.raises(UserError, match="nodes: 3 does not divide"):
        replace(SETTING, nodes=3)
    with pytest.raises(UserError, match="unevenly"):
        Setting(gpu=GPUS["h100"], tp_size=8, pp_size=3, nodes=2)
    with pytest.raises(UserError, match="dtype: 'int4' is not one of fp8, int8, bfloat16"):
        replace(SETTING, dtype="int4")
    with pytest.raises(UserError, match="batch: 0"):
        replace(SETTING, batch=0)


def test_the_command_says_what_is_predicted(tmp_path: Path) -> None:
    result = run(config(tmp_path, ANCHORS[1].config))
    assert result.exit_code == 0, result.output
    assert "estimated for H100, TP 8, batch 1, context 2048, fp8" in result.stdout
    assert "measured" not in result.stdout
    assert "does not fit" not in result.stdout
    said = answer(config(tmp_path, ANCHORS[1].config))
    assert sum(said["breakdown_ms"].values()) == pytest.approx(said["ms_per_token"])
    assert said["tokens_per_s_batch"] == said["tokens_per_s"]
    assert said["fits"] is True
    assert said["unchanged"] is None
    assert said["ttft_ms"] > said["ms_per_token"]
    assert 8e9 < said["gpu_weight_bytes"] < 12e9


def test_the_command_applies_a_plan(tmp_path: Path) -> None:
    said = answer(config(tmp_path, ANCHORS[1].config), "--drop-attention", "40-60", "--batch", 4)
    before = answer(config(tmp_path, ANCHORS[1].config), "--batch", 4)
    assert said["unchanged"]["ms_per_token"] == pytest.approx(before["ms_per_token"])
    assert said["unchanged"]["speedup"] == pytest.approx(before["ms_per_token"] / said["ms_per_token"])
    assert said["unchanged"]["speedup"] > 1.1
    expected = seconds(dropped(MIDDLE, 40, 60, fused=True), replace(SETTING, batch=4))
    assert said["ms_per_token"] == pytest.approx(expected * 1e3)
    assert said["tokens_per_s_batch"] == pytest.approx(4 * said["tokens_per_s"])
    side_by_side = answer(config(tmp_path, ANCHORS[1].config), "--parallel-blocks", "38-41")
    assert side_by_side["unchanged"]["ms_per_token"] - side_by_side["ms_per_token"] == pytest.approx(
        6 * 8e-3, rel=0.01
    )
    text = run(config(tmp_path, ANCHORS[1].config), "--drop-attention", "40-60").stdout
    assert "times faster, estimated" in text


def test_the_command_takes_a_real_nas_model_and_a_model_directory(tiny_hf: Path) -> None:
    plain = answer(NEMOTRON)
    fused = answer(NEMOTRON, "--group", "42-50", "--group", "53-69")
    assert fused["unchanged"]["ms_per_token"] == pytest.approx(plain["ms_per_token"])
    assert fused["ms_per_token"] < 0.95 * plain["ms_per_token"]
    assert answer(tiny_hf, "--tp", 2, "--drop-attention", "2-5")["unchanged"]["speedup"] > 1


def test_a_model_that_does_not_fit_is_named(tmp_path: Path) -> None:
    file = config(tmp_path, ANCHORS[0].config)
    result = run(file, "--dtype", "bfloat16")
    assert result.exit_code == 0
    assert "does not fit: " in result.stdout
    assert "an H100 has 80,000,000,000" in result.stdout
    said = answer(file, "--dtype", "bfloat16")
    assert said["fits"] is False
    assert f"{said['gpu_bytes'] + said['gpu_runtime_bytes']:,} bytes" in result.stdout
    two_nodes = answer(file, "--dtype", "bfloat16", "--tp", 16)
    assert two_nodes["fits"] is True
    assert two_nodes["nodes"] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--gpu", "b200"], 2, ["b200", "h100", "h200"]),
        (["--tp", "3"], 1, ["tp_size: 3", "num_attention_heads 64"]),
        (["--nodes", "3"], 1, ["nodes: 3"]),
        (["--pp", "81"], 1, ["pp_size: 81", "80 layers"]),
        (["--dtype", "int4"], 2, ["int4", "bfloat16"]),
        (["--batch", "0"], 2, ["batch"]),
        (["--drop-attention", "90"], 1, ["90"]),
        (["--group", "1-2", "--no-fuse"], 2, ["contradict"]),
        (["--norm", "last"], 2, ["--norm"]),
        (["--parallel-blocks", "4"], 1, ["parallel", "FIRST-LAST"]),
    ],
)
def test_wrong_use_is_refused(arguments: list[str], code: int, words: list[str], tmp_path: Path) -> None:
    result = run(config(tmp_path, ANCHORS[1].config), *arguments)
    assert result.exit_code == code, result.output
    for word in words:
        assert word in result.output


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    result = run(tmp_path / "none")
    assert result.exit_code == 1
    assert "none: no such model directory or config.json" in result.output


def test_the_command_imports_no_torch(tmp_path: Path) -> None:
    file = config(tmp_path, ANCHORS[1].config)
    code = (
        "import sys; from builder.cli.estimate import estimate\n"
        "assert not {'numpy', 'torch'} & set(sys.modules)\n"
        f"try: estimate([{str(file)!r}])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
