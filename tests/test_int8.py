"""INT8 weights: the numbers themselves, an engine that has them, and what they cost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import TEXT, random_checkpoint

from builder import decoder, rows, trtllm
from builder.errors import UserError
from builder.evaluation import logits_of, quality
from builder.tensorfile import read_header
from builder.tensors import INT8, Constant, Expression
from engines.embedded import quality as costs
from engines.embedded.collectives import Alone
from engines.embedded.runtime import Runtime
from engines.embedded.session import Request, Session
from engines.manifest import read
from ffn_fusion import main


def matrix(rows: int, columns: int, dtype: str = "float32") -> Constant:
    values = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)
    values[rows // 2] = 0
    return Constant(values, dtype)


def test_numbers_and_scales() -> None:
    x = matrix(300, 5000)  # several bands of rows
    values, scales = rows.QuantizeRows(x, INT8).read_all(), rows.RowScales(x, INT8).read_all()
    expected = np.abs(x.values).max(1) / np.float32(127)
    expected[150] = 1
    np.testing.assert_array_equal(scales, expected)
    np.testing.assert_array_equal(values, np.rint(x.values / expected[:, None]).astype(np.int8))
    assert np.abs(values).max() == 127
    back = rows.ScaleRows(rows.QuantizeRows(x, INT8), rows.RowScales(x, INT8)).read_all()
    assert (np.abs(back - x.values) <= 0.5001 * expected[:, None]).all()


def test_windows_are_parts_of_the_whole() -> None:
    x = rows.QuantizeRows(matrix(40, 60), INT8)
    window = np.empty((7, 11), np.int8)
    x.fill(window, 13, 29)
    np.testing.assert_array_equal(window, x.read_all()[13:20, 29:40])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_numbers_that_no_scale_fits_are_refused(wrong: float) -> None:
    x = matrix(4, 4)
    x.values[1, 2] = wrong
    with pytest.raises(UserError, match="not finite"):
        rows.QuantizeRows(x, INT8).read_all()


def test_the_embedding_and_vectors_stay() -> None:
    tensors: dict[str, Expression] = {
        "embedding.weight": matrix(8, 4),
        "norm.weight": Constant(np.ones(4, np.float32), "float32"),
        "lm_head.weight": matrix(8, 4),
    }
    assert {n: x.dtype for n, x in rows.quantize(tensors, INT8).items()} == {
        "embedding.weight": "float32",
        "norm.weight": "float32",
        "lm_head.weight": "int8",
        "lm_head.scale": "float32",
    }


@pytest.fixture(scope="module", params=["tiny_checkpoint", "tiny_checkpoint_tp2"], ids=["tp1", "tp2"])
def built(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, dict]:
    """A checkpoint, its INT8 engine, and what the command printed as JSON."""
    checkpoint = request.getfixturevalue(request.param)
    engine = tmp_path_factory.mktemp("int8") / "engine"
    limits = ["--max-seq-len", "160", "--max-input-len", "96", "--quant", "int8", "-o", str(engine), "--json"]
    result = CliRunner().invoke(main, ["build-engine", str(checkpoint), *limits])
    assert result.exit_code == 0, result.output
    return checkpoint, engine, json.loads(result.stdout)


def test_the_engine_computes_with_what_it_stores(built: tuple[Path, Path, dict]) -> None:
    checkpoint, engine, _ = built
    if read(engine).tp_size > 1:
        prompt = tuple(range(5, 75))
        with Session(engine) as session:
            tokens = [
                t for o in session.generate(Request(input_ids=prompt, max_tokens=8)) for t in o.token_ids
            ]
        assert len(tokens) == 8
        return
    stored = read_header(engine / "rank0.safetensors")
    assert {x.dtype for n, x in stored.items() if n.endswith("weight") and len(x.shape) == 2} == {
        "int8",
        "float32",
    }
    model = decoder.load(trtllm.read(checkpoint).rank(0))
    weights = {n: decoder.to_tensor(x) for n, x in rows.dequantize(stored).items()}
    model.load_state_dict(weights, strict=True)
    runtime, prompt = Runtime(engine, Alone()), tuple(range(5, 75))
    first, then = runtime.prefill(2, (6, 7), prompt), runtime.decode((2,), (9,), (70,))
    expected = model(torch.tensor([[*prompt, 9]]), torch.arange(71)[None])[0, 69:]
    torch.testing.assert_close(torch.cat((first, then)), expected, rtol=1e-5, atol=3e-5)


def test_the_cost_is_printed(built: tuple[Path, Path, dict]) -> None:
    printed = built[2]
    assert printed["quant"] == "int8"
    told = printed["quality"]
    assert 0 < told["kl"] < 0.05
    assert 0.8 < told["top1"] <= 1
    assert told["num_tokens"] == costs.OWN_SEQUENCES * (costs.OWN_LENGTH - 1)
    assert told["perplexity"] is None


def test_the_cost_on_text(built: tuple[Path, Path, dict], tiny_hf: Path, tmp_path: Path) -> None:
    """Against whole models through the reference decoder; TP 1 and TP 2 tell the same."""
    checkpoint, engine, _ = built
    file = tmp_path / "text.txt"
    file.write_text("\n".join(TEXT))
    windows = costs.read_text(file, tiny_hf, length=64)
    told = costs.cost(checkpoint, engine, windows, own=False)
    if read(engine).tp_size > 1:
        assert told.kl > 0
        assert told.perplexity != told.parent_perplexity
        return
    whole = trtllm.read(checkpoint).rank(0)
    parent = logits_of(whole, windows)
    model = decoder.load(whole)
    stored = rows.dequantize(read_header(engine / "rank0.safetensors"))
    model.load_state_dict({n: decoder.to_tensor(x) for n, x in stored.items()})
    positions = torch.arange(windows.shape[1] - 1).expand(len(windows), -1)
    expected = quality(model(windows[:, :-1], positions).log_softmax(-1), windows, parent)
    assert told.kl == pytest.approx(expected.kl, rel=1e-3)
    assert told.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
    assert told.parent_perplexity == pytest.approx(quality(parent, windows).perplexity, rel=1e-4)


def test_equal_weights_cost_nothing(tiny_checkpoint: Path) -> None:
    whole = trtllm.read(tiny_checkpoint).rank(0)
    tensors = whole.decoder_tensors()
    windows = torch.arange(96).view(2, 48)
    told = costs.compare(whole.architecture, [tensors], [tensors], windows, own=False)
    assert (told.kl, told.top1) == (0, 1)
    with pytest.raises(UserError, match="vocab_size"):
        costs.compare(whole.architecture, [tensors], [tensors], windows + 300, own=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "x.txt"], "--data and --tokenizer go together"),
        (["--data", "x.txt", "--tokenizer", "m"], "--data is for --quant"),
        (["--kv-cache-memory", "7 parsecs"], "7 parsecs"),
        (["--backend", "onnx", "--quant", "int8"], "--quant is not for --backend onnx"),
        (["--backend", "tensorrt-llm", "--quant", "int8"], "--quant has no meaning"),
    ],
)
def test_wrong_use(tiny_checkpoint: Path, tmp_path: Path, options: list[str], words: str) -> None:
    command = ["build-engine", str(tiny_checkpoint), "-o", str(tmp_path / "engine"), *options]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert list(tmp_path.iterdir()) == []


def test_random_models_of_every_kind_of_layer_can_be_quantised(tiny_checkpoint: Path) -> None:
    architecture = trtllm.read(tiny_checkpoint).architecture
    tensors = random_checkpoint(architecture).decoder_tensors()
    smaller = rows.quantize(tensors, INT8)
    assert set(rows.dequantize(smaller)) == set(tensors)
