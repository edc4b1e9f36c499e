"""Every command through the real entry point: results, exit codes, one line of error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from standin import StandIn

from ffn_fusion import main

FUSED_49B = Path(__file__).parent / "data" / "nemotron_super_49b_config.json"
CONFIG_49B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def assert_fails(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    if code == 1:
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[-1]


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; import ffn_fusion\n"
        "try: ffn_fusion.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'tritonclient', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for command in (
        "build-engine",
        "compare-latency",
        "convert",
        "demo",
        "analyze",
        "deploy",
        "distill",
        "doctor",
        "estimate",
        "evaluate",
        "fuse",
        "generate",
        "plan",
        "profile",
    ):
        assert command in result.stdout


def test_convert_imports_no_torch(tiny_hf: Path, tmp_path: Path) -> None:
    code = (
        "import sys, ffn_fusion\n"
        f"try: ffn_fusion.main(['convert', {str(tiny_hf)!r}, '-o', {str(tmp_path / 'c')!r}])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "c" / "rank0.safetensors").is_file()


def test_build_engine_is_a_command_of_its_own() -> None:
    script = Path(sys.executable).with_name("build-engine")
    result = subprocess.run([script, "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert "--max-seq-len" in result.stdout


def test_inspect_takes_a_bare_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_49B))
    result = run("inspect", tmp_path / "config.json", "--tp", 8, "--json")
    assert result.exit_code == 0, result.output
    counts = json.loads(result.stdout)
    assert counts["parameters"] == 70_553_706_496
    assert counts["kv_bytes_per_token"] == 80 * 2 * 8 * 128 * 2
    assert counts["all_reduces_per_token"] == 160
    assert "attention-free runs  none" in run("inspect", tmp_path).stdout


def test_fuse_then_convert(tiny_hf: Path, tmp_path: Path) -> None:
    result = run("fuse", tiny_hf, "--drop-attention", "2-5", "-o", tmp_path / "fused", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["layers"] == [[0], [1], [2, 3, 4], [5]]
    counts = json.loads(run("inspect", tmp_path / "fused", "--json").stdout)
    assert counts["attention_free_runs"] == [[2, 3]]
    result = run("convert", tmp_path / "fused", "--tp", 2, "-o", tmp_path / "checkpoint")
    assert result.exit_code == 0, result.output
    assert "4 layers for TP 2" in result.stdout


def test_plan_file_says_the_same_as_options(tiny_hf: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("drop_attention: [2, 3, 4, 5]\nfuse: [[2, 4]]\nnorm: fold\n")
    assert run("convert", tiny_hf, "--plan", plan, "-o", tmp_path / "a").exit_code == 0
    assert run("convert", tiny_hf, "--drop-attention", "2-5", "-o", tmp_path / "b").exit_code == 0
    for name in ("config.json", "rank0.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("drop: [1]", "key 'drop' is unknown; keys are model, drop_attention, drop_ffn, "),
        ("drop_attention: [one]", "layers: 'one' is not a layer number"),
        ("fuse: [3]", "fuse: 3 is not [first, last]"),
        ("norm: mean", "norm: 'mean' is not one of fold, last"),
        ("model: abc", "made for model abc"),
        ("- 1", "not a mapping"),
        ("{", "not valid YAML"),
    ],
)
def test_wrong_plans(tiny_hf: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    result = run("fuse", tiny_hf, "--plan", tmp_path / "plan.yaml", "-o", tmp_path / "out")
    assert_fails(result, 1, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--drop-attention", "2-3", "--group", "2-4"), 1, "group 2-4 crosses layer 4, which has attention"),
        (("--drop-attention", "9"), 1, "layer 9 does not exist; the model has 0-5"),
        (("--drop-attention", "x"), 1, "'x' is not a layer number"),
        (("--drop-attention", "3-2"), 1, "runs backwards"),
        ((), 1, "nothing to drop"),
        (("--no-fuse", "--group", "1-2"), 2, "contradict"),
        (("--plan", "p", "--group", "1-2"), 2, "--plan says it all"),
        (("--norm", "mean"), 2, "'mean' is not one of"),
    ],
)
def test_wrong_fusions(tiny_hf: Path, tmp_path: Path, options: tuple, code: int, message: str) -> None:
    assert_fails(run("fuse", tiny_hf, *options, "-o", tmp_path / "out"), code, message)
    assert list(tmp_path.iterdir()) == []


def test_wrong_models_and_outputs(tiny_hf: Path, tmp_path: Path) -> None:
    assert_fails(run("inspect", tmp_path / "none"), 1, "no such model directory")
    assert_fails(run("convert", tiny_hf, "--tp", 3, "-o", tmp_path / "c"), 1, "tp_size: 3 does not divide")
    (tmp_path / "there").mkdir()
    assert_fails(run("convert", tiny_hf, "-o", tmp_path / "there"), 1, "exists; remove it")
    assert_fails(run("convert", tiny_hf, "-o", tmp_path / "no" / "c"), 1, "no such directory; create it")
    assert_fails(run("convert", tiny_hf), 2, "Missing option")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run("--debug", "inspect", tmp_path / "none")
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "UserError"


def test_doctor_names_every_path() -> None:
    checks = json.loads(run("doctor", "--json").stdout)
    assert checks["convert, fuse"]["ready"]
    assert not checks["TensorRT-LLM engine"]["ready"]
    assert "tensorrt_llm: not installed" in checks["TensorRT-LLM engine"]["detail"]
    for name in ("TensorRT-LLM PyTorch backend", "Triton with TensorRT-LLM", "trtllm-bench"):
        assert not checks[name]["ready"]
        assert "; " in checks[name]["detail"]  # what is missing; what to do


@pytest.mark.parametrize(
    ("version", "builds", "serves"), [("0.21.0", True, False), ("1.2.1", True, True), ("1.3.0", False, True)]
)
def test_doctor_on_a_gpu_machine(tmp_path: Path, version: str, builds: bool, serves: bool) -> None:
    machine = StandIn(tmp_path, version=version)
    tool = Path(sys.executable).with_name("ffn-fusion")
    result = subprocess.run(
        [tool, "doctor", "--json"], env=machine.environment, capture_output=True, text=True, check=True
    )
    checks = json.loads(result.stdout)
    found = {name: checks[f"TensorRT-LLM {name}"] for name in ("engine", "PyTorch backend")}
    assert {name: check["ready"] for name, check in found.items()} == {
        "engine": builds,
        "PyTorch backend": serves,
    }
    assert found["engine" if builds else "PyTorch backend"]["detail"].endswith("8 x NVIDIA H100 80GB HBM3")


def test_doctor_names_the_first_that_is_missing(tmp_path: Path) -> None:
    for number, (machine, detail) in enumerate(
        (({"gpus": 0}, "gpu: none is visible"), ({"compute_cap": "8.0"}, "compute capability 8.0"))
    ):
        tool = Path(sys.executable).with_name("ffn-fusion")
        environment = StandIn(tmp_path / str(number), **machine).environment
        result = subprocess.run([tool, "doctor", "--json"], env=environment, capture_output=True, text=True)
        assert detail in json.loads(result.stdout)["TensorRT-LLM engine"]["detail"]


def test_dry_run_needs_a_config_only(tmp_path: Path) -> None:
    """The real 49B's config at TP 8; the figures are counted by hand."""
    command = ("convert", FUSED_49B, "--group", "42-50", "--group", "53-69", "--tp", 8, "--dry-run")
    result = run(*command, "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["architecture"] == "DeciLMForCausalLM"
    assert (values["parent"]["layers"], values["cost"]["layers"]) == (80, 80 - 8 - 16)
    # 49 attentions and 80 FFNs; 8 and 16 FFNs go into their groups
    assert values["parent"]["all_reduces_per_token"] == 49 + 80
    assert values["cost"]["all_reduces_per_token"] == 49 + 80 - 8 - 16
    assert values["cost"]["kv_bytes_per_token"] == 49 * 2 * 8 * 128 * 2
    # norms of 24 members are folded away, all else stays
    assert values["parent"]["parameters"] - values["cost"]["parameters"] == 24 * 8192
    group = next(x for x in values["layers"] if x["members"] == list(range(42, 51)))
    assert (group["width"], group["rank_width"], group["padding"]) == (107520, 107520 // 8, 0)
    assert group["elements"] == 2 * 107520 // 8 * 8192
    assert group["headroom"] == pytest.approx((2**31 - 1) / group["elements"])
    assert len(set(values["rank_bytes"])) == 1
    text = run(*command).stdout
    assert "rank 0-7" in text
    assert "53-69" in text
    assert "10.3%" in text


def test_dry_run_and_conversion_agree(tiny_hf: Path, tmp_path: Path) -> None:
    command = ("convert", tiny_hf, "--drop-attention", "2-5", "--tp", 2, "--pp", 2, "--dtype", "bfloat16")
    told = json.loads(run(*command, "--group", "2-3", "--no-fuse", "--dry-run", "--json").stdout or "{}")
    assert told == {}  # contradicting options are wrong use
    told = json.loads(run(*command, "--pp", 1, "--dry-run", "--json").stdout)
    assert run(*command, "--pp", 1, "-o", tmp_path / "c").exit_code == 0
    sizes = [(tmp_path / "c" / f"rank{r}.safetensors").stat().st_size for r in range(2)]
    assert told["rank_bytes"] == sizes


def test_dry_run_of_what_would_fail(tmp_path: Path) -> None:
    result = run("convert", FUSED_49B, "--group", "53-69", "--tp", 7, "--dry-run")
    assert_fails(result, 1, "tp_size: 7 does not divide num_attention_heads 64")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG_49B))
    wide = ("convert", file, "--drop-attention", "10-40", "--tp", 1, "--dry-run")
    assert_fails(run(*wide), 1, "torch_dtype None is not one of", "give --dtype")
    result = run(*wide, "--dtype", "bfloat16")
    assert_fails(result, 1, "layer 10: the joined gate and up weight", "fuse groups of 4", "raise --tp to 8")
    assert_fails(
        run("convert", file, "--tp", 1, "-o", tmp_path / "c"), 1, "a file, not the directory with the weights"
    )
    assert_fails(run("convert", file, "--tp", 1), 2, "Missing option '-o'")


def test_dry_run_counts_the_cache_in_its_dtype(tiny_hf: Path) -> None:
    """6 layers, K and V of 2 heads with 16 numbers each."""
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        told = json.loads(run("convert", tiny_hf, "--dtype", dtype, "--dry-run", "--json").stdout)
        assert told["cost"]["kv_bytes_per_token"] == 6 * 2 * 2 * 16 * size


def test_norm_alone_says_nothing(tiny_hf: Path, tmp_path: Path) -> None:
    result = run("convert", tiny_hf, "--norm", "last", "-o", tmp_path / "c")
    assert_fails(result, 2, "name what to fuse")


def test_convert_takes_every_change(tiny_hf: Path, tmp_path: Path) -> None:
    changes = ("--drop-attention", "2-5", "--drop-ffn", "1", "--kv-heads", "0=1")
    result = run("convert", tiny_hf, *changes, "-o", tmp_path / "c", "--json")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    shapes = [
        (x["attention"]["num_key_value_heads"], x["ffn"]["intermediate_size"])
        for x in config["layer_configs"]
    ]
    assert shapes == [(1, 96), (2, None), (None, 288), (None, 96)]
    assert_fails(
        run("convert", tiny_hf, "--kv-heads", "0", "-o", tmp_path / "d"), 1, "'0' is not LAYERS=HEADS"
    )
