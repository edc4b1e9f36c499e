"""FP8 checkpoints against NVIDIA ModelOpt's own export, and what they cost in quality."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import TEXT, fused, write_llama
from safetensors.torch import load_file, save_file

from builder import calibration, huggingface, quantization, trtllm
from builder.errors import UserError
from builder.evaluation import logits_of, quality, token_windows
from builder.fp8 import Quantize, absolute_maximum
from builder.plan import Plan
from builder.tensors import Constant

WINDOWS = torch.randint(0, 320, (8, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("fp8") / "m", dtype="bfloat16")


def convert_fp8(
    checkpoint, output: Path, *, tp_size: int = 1, windows=WINDOWS, kv_cache: bool = True
) -> Path:
    whole = trtllm.prepare(checkpoint, tp_size, 1)
    scales = quantization.quantize(whole, calibration.calibrate(whole, windows), kv_cache=kv_cache)
    trtllm.convert(checkpoint, output, tp_size=tp_size, quantized=scales)
    return output


@pytest.fixture(scope="module")
def loud_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """K and V beyond 448 in the first layers, where a KV scale is more than 1."""
    loud = tmp_path_factory.mktemp("loud") / "m"
    shutil.copytree(model, loud)
    tensors = load_file(loud / "model.safetensors")
    for layer, name, gain in ((0, "k", 3000.0), (1, "v", 3000.0), (2, "k", 2000.0), (2, "v", 3000.0)):
        tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"] *= gain
    save_file(tensors, loud / "model.safetensors", metadata={"format": "pt"})
    return loud


def modelopt_export(model: Path, output: Path) -> Path:
    """The same model and calibration data through NVIDIA ModelOpt."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_tensorrt_llm_checkpoint
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        config = mtq.utils.update_quant_cfg_with_kv_cache_quant(
            copy.deepcopy(mtq.FP8_DEFAULT_CFG), mtq.FP8_KV_CFG["quant_cfg"]
        )
        mtq.quantize(theirs, config, lambda m: [m(x[None]) for x in WINDOWS])
        with torch.inference_mode():
            export_tensorrt_llm_checkpoint(
                theirs, "llama", torch.bfloat16, export_dir=str(output), inference_tensor_parallel=1
            )
    return output


@pytest.mark.parametrize("loud", [False, True], ids=["quiet", "loud"])
def test_scales_and_weights_are_modelopts(model: Path, loud_model: Path, tmp_path: Path, loud: bool) -> None:
    """Scales within 1%; at equal scales the e4m3 bytes are equal."""
    model = loud_model if loud else model
    theirs = load_file(modelopt_export(model, tmp_path / "theirs") / "rank0.safetensors")
    ours = load_file(convert_fp8(huggingface.read(model), tmp_path / "c") / "rank0.safetensors")
    assert theirs.keys() - ours.keys() == {
        f"transformer.layers.{i}.attention.{x}_cache_scaling_factor" for i in range(6) for x in "kv"
    }
    assert ours.keys() <= theirs.keys()
    scales = [name for name in ours if name.endswith("scaling_factor")]
    assert len(scales) == 6 * (5 * 2 + 1)
    kv = [float(ours[f"transformer.layers.{i}.attention.kv_cache_scaling_factor"]) for i in range(6)]
    assert [x > 1 for x in kv] == [loud] * 3 + [False] * 3
    for name in scales:
        assert (ours[name].dtype, ours[name].shape) == (torch.float32, (1,))
        torch.testing.assert_close(ours[name], theirs[name], rtol=0.01, atol=0)
    for name in ours.keys() - set(scales):
        assert ours[name].dtype == theirs[name].dtype, name
        same_scale = f"{name.removesuffix('.weight')}.weights_scaling_factor"
        if same_scale not in ours or torch.equal(ours[same_scale], theirs[same_scale]):
            assert torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)), name
    config, reference = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("c", "theirs"))
    assert config["quantization"] == reference["quantization"]


def test_ranks_share_scales_and_cut_weights(model: Path, tmp_path: Path) -> None:
    child = Plan(drop_attention=(2, 3, 4, 5)).apply(huggingface.read(model))
    one = load_file(convert_fp8(child, tmp_path / "one") / "rank0.safetensors")
    convert_fp8(child, tmp_path / "two", tp_size=2)
    ranks = [load_file(tmp_path / "two" / f"rank{r}.safetensors") for r in range(2)]
    fused_layer = "transformer.layers.2.ffn"
    for name, x in one.items():
        if "scaling_factor" in name:
            assert torch.equal(ranks[0][name], x), name
            assert torch.equal(ranks[1][name], x), name
    for module, axis in (("fc", 0), ("gate", 0), ("proj", 1)):
        parts = [r[f"{fused_layer}.{module}.weight"].view(torch.uint8) for r in ranks]
        assert torch.equal(torch.cat(parts, axis), one[f"{fused_layer}.{module}.weight"].view(torch.uint8))
    for kind in ("weights", "activation"):
        fc, gate = (one[f"{fused_layer}.{m}.{kind}_scaling_factor"] for m in ("fc", "gate"))
        assert torch.equal(fc, gate)


def test_calibration_sees_what_the_decoder_sees(tiny_hf: Path) -> None:
    """Layer by layer, against hooks on the whole decoder of the fused model, in float32."""
    from builder.decoder import load

    checkpoint = fused(tiny_hf)
    decoder, seen = load(checkpoint), {}
    for name, module in decoder.named_modules():
        if name.endswith((".qkv", ".attention.o", ".gate", ".down")):
            module.register_forward_pre_hook(
                lambda m, x, name=name: seen.__setitem__(name, float(x[0].abs().max()))
            )
    decoder(WINDOWS, torch.arange(64).expand(8, 64))
    largest = calibration.calibrate(checkpoint, WINDOWS, batch=3)
    assert seen.keys() == {name for name in largest if not name.endswith(".kv")}
    for name, value in seen.items():
        assert largest[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_that_of_ml_dtypes(dtype: str) -> None:
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    values = (np.random.default_rng(0).standard_normal((64, 32)) * 3).astype(kind)
    scale = 0.007
    expected = np.clip(values.astype(np.float32) / np.float32(scale), -448, 448)
    x = Quantize(Constant(values, dtype), scale)
    assert np.array_equal(x.read_all(), expected.astype(ml_dtypes.float8_e4m3fn))
    assert absolute_maximum(Constant(values, dtype)) == float(np.abs(values.astype(np.float32)).max())


def test_dequantised_model_is_as_good(tmp_path: Path) -> None:
    """Perplexity within 2% of bfloat16's, on a model with something to lose: its own sharp predictions."""
    directory = write_llama(tmp_path / "m", dtype="bfloat16")
    parent = huggingface.read(directory)
    convert_fp8(parent, tmp_path / "c")
    restored = trtllm.read(tmp_path / "c").rank(0)
    text = logits_of(parent, WINDOWS).argmax(-1)
    windows = token_windows(text.flatten().tolist(), 31, 12)
    before, after = (quality(logits_of(x, windows), windows).perplexity for x in (parent, restored))
    assert before != after
    assert after == pytest.approx(before, rel=0.02)


def test_what_cannot_be_quantised(model: Path, tiny_hf: Path) -> None:
    with pytest.raises(UserError, match="quant: fp8 needs a 16-bit model, this one is float32"):
        quantization.check(huggingface.read(tiny_hf))
    whole = huggingface.read(model)
    with pytest.raises(UserError, match="calib: token 400 is outside vocab_size 320"):
        calibration.calibrate(whole, torch.full((1, 4), 400))
    broken = dict(whole.tensors)
    name = "layers.1.ffn.up.weight"
    bad = np.full(broken[name].shape, np.inf, ml_dtypes.bfloat16)
    broken[name] = Constant(bad, "bfloat16")
    from dataclasses import replace

    with pytest.raises(UserError, match=r"tensor layers\.1\.ffn\.up\.weight: holds inf"):
        quantization.quantize(replace(whole, tensors=broken), {})


def test_embedded_engine_refuses_fp8(model: Path, tmp_path: Path) -> None:
    from engines.embedded.compilation import build

    convert_fp8(huggingface.read(model), tmp_path / "c")
    with pytest.raises(UserError, match=r"quant_algo: FP8 in .* the embedded engine quantises by itself"):
        build(tmp_path / "c", tmp_path / "e", max_seq_len=32)


def test_command(model: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from ffn_fusion import main

    (tmp_path / "text.txt").write_text("\n".join(TEXT))
    command = ["convert", str(model), "--quant", "fp8", "--kv-cache", "fp8", "--calib"]
    command += [str(tmp_path / "text.txt"), "--calib-samples", "4", "--calib-length", "32"]
    result = CliRunner().invoke(main, [*command, "--tp", "2", "-o", str(tmp_path / "c")])
    assert result.exit_code == 0, result.output
    assert trtllm.read(tmp_path / "c").kv_cache_quant_algo == "FP8"
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "c")]).exit_code == 0
    result = CliRunner().invoke(main, [*command, "--calib-samples", "999", "-o", str(tmp_path / "d")])
    assert result.exit_code == 1
    assert "samples of 32, 999 were asked for; give more text or --calib-samples" in result.stderr
    for wrong, message in (
        (["convert", str(model), "--quant", "fp8", "-o", "x"], "needs --calib"),
        (["convert", str(model), "--kv-cache", "fp8", "-o", "x"], "needs --quant fp8"),
        (["convert", str(model), "--calib", "f", "-o", "x"], "--calib is for --quant fp8"),
        (["convert", str(model), "--quant", "int8", "-o", "x"], "'int8' is not 'fp8'"),
    ):
        result = CliRunner().invoke(main, wrong)
        assert result.exit_code == 2
        assert message in result.output
