"""The embedded engine for GPUs, as far as a machine without one can show it.

Its operators are plain torch, so here they run on the CPU, and are compared with the reference decoder and
with the CPU's kernels. CUDA itself, its graphs and NCCL are not run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_checkpoint
from standin import StandIn
from torch import Tensor

from builder import decoder, rows, trtllm
from builder.architecture import FFN, Architecture, Attention, Layer
from builder.errors import UserError
from builder.rope import Rope
from builder.tensors import FP8, Constant, Expression
from engines import manifest
from engines.embedded import cuda, program, target
from engines.embedded.collectives import Alone
from engines.embedded.graphs import Decoding, bucket
from engines.embedded.model import EngineDecoder, new_cache
from engines.embedded.plain import scaled_product, vector_product
from engines.embedded.runtime import Runtime, _Program
from engines.embedded.weights import mapped
from engines.manifest import Manifest

ROOT = Path(__file__).resolve().parent.parent
PROMPT = tuple(range(5, 75))  # longer than one block
GPU = {"gpu": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0"}


@pytest.fixture(scope="module")
def on_cuda(tiny_engine: Path) -> Manifest:
    """What the manifest of the tiny engine would be on a GPU."""
    read = manifest.read(tiny_engine)
    return replace(read, device="cuda", hardware={**read.hardware, **GPU})


@pytest.fixture(scope="module")
def weights(tiny_engine: Path) -> dict[str, Tensor]:
    return mapped(tiny_engine / "rank0.safetensors", manifest.read(tiny_engine))


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> decoder.Decoder:
    return decoder.load(trtllm.read(tiny_checkpoint).rank(0))


def eager(whole: Manifest, kind: str, weights: dict[str, Tensor]) -> EngineDecoder:
    """A program of a GPU's engine, not compiled, on the CPU."""
    module = program.decoder(whole, kind)
    module.load_state_dict(weights, strict=True, assign=True)
    return module


def pool(whole: Manifest, device: str = "cpu") -> list[Tensor]:
    return new_cache(whole.architecture, target.pool_blocks(whole), getattr(torch, whole.dtype), device)


def prefill(
    module: EngineDecoder, cache: list[Tensor], blocks: tuple[int, ...], ids: tuple[int, ...]
) -> Tensor:
    table = torch.zeros(3, dtype=torch.int64)
    table[: len(blocks)] = torch.tensor(blocks)
    return module(torch.tensor(ids), table, cache)


STEP = (torch.tensor([7, 9]), torch.tensor([70, 1]), torch.tensor([[6, 7, 0], [1, 0, 0]]))


@pytest.fixture(scope="module")
def logits(on_cuda: Manifest, weights: dict[str, Tensor]) -> list[Tensor]:
    """Prefill of PROMPT, prefill of its first token, one decode of both, by the GPU's operators."""
    cache, module = pool(on_cuda), eager(on_cuda, "prefill", weights)
    first = [prefill(module, cache, (6, 7), PROMPT), prefill(module, cache, (1,), PROMPT[:1])]
    return [*first, eager(on_cuda, "decode", weights)(*STEP, cache)]


def test_logits_are_the_reference_decoders(logits: list[Tensor], reference: decoder.Decoder) -> None:
    long, short = (
        reference(torch.tensor([ids]), torch.arange(len(ids))[None])[0]
        for ids in ((*PROMPT, 7), (PROMPT[0], 9))
    )
    expected = [long[69:70], short[:1], torch.stack((long[70], short[1]))]
    for got, wanted in zip(logits, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5)


def test_logits_are_the_cpu_engines(logits: list[Tensor], tiny_engine: Path) -> None:
    runtime = Runtime(tiny_engine, Alone())
    expected = [
        runtime.prefill(2, (6, 7), PROMPT),
        runtime.prefill(0, (1,), PROMPT[:1]),
        runtime.decode((2, 0), (7, 9), (70, 1)),
    ]
    for got, wanted in zip(logits, expected, strict=True):
        assert wanted is not None
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5)


def filled(whole: Manifest, weights: dict[str, Tensor]) -> list[Tensor]:
    """A pool after both prompts of `logits`."""
    cache, module = pool(whole), eager(whole, "prefill", weights)
    prefill(module, cache, (6, 7), PROMPT)
    prefill(module, cache, (1,), PROMPT[:1])
    return cache


def test_a_step_of_one_request_is_that_of_two(
    on_cuda: Manifest, weights: dict[str, Tensor], logits: list[Tensor]
) -> None:
    module = eager(on_cuda, "decode1", weights)
    assert program.operators(on_cuda, "decode1") != program.operators(on_cuda, "decode")
    for row in range(2):
        cache = filled(on_cuda, weights)
        got = module(*(part[row : row + 1] for part in STEP), cache)
        torch.testing.assert_close(got, logits[2][row : row + 1], rtol=1e-5, atol=2e-5)


def test_a_narrow_table_gives_the_same(
    on_cuda: Manifest, weights: dict[str, Tensor], logits: list[Tensor]
) -> None:
    tokens, positions, tables = STEP
    cache = filled(on_cuda, weights)
    got = eager(on_cuda, "decode", weights)(tokens, positions, tables[:, :2], cache)
    torch.testing.assert_close(got, logits[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "most", "size"),
    [(1, 1, 1), (1, 6, 1), (2, 6, 2), (3, 6, 4), (5, 6, 6), (6, 6, 6), (33, 64, 64)],
)
def test_buckets(count: int, most: int, size: int) -> None:
    assert bucket(count, most) == size


def test_rows_that_fill_a_bucket_up_harm_nothing(
    on_cuda: Manifest, weights: dict[str, Tensor], logits: list[Tensor]
) -> None:
    """Three requests in a bucket of four: their own tokens are written, and the spare block, nothing else."""
    cache, calls = filled(on_cuda, weights), []

    def program_of(rows: int):
        module = eager(on_cuda, "decode1" if rows == 1 else "decode", weights)

        def call(inputs: list[Tensor]) -> Tensor:
            calls.append([tuple(x.shape) for x in inputs[:3]])
            assert all(x.data_ptr() % 16 == 0 for x in inputs[:3])
            return module(*inputs[:3], inputs[3:])

        return call

    decoding = Decoding(
        (program_of(1), program_of(2)),
        cache,
        spare=on_cuda.kv_cache_blocks,
        max_batch_size=4,
        max_blocks=3,
        device=torch.device("cpu"),
        capture=False,
    )
    tokens, positions, tables = STEP
    before = [x.clone() for x in cache]
    three = decoding(
        torch.cat((tokens, torch.tensor([3]))),
        torch.cat((positions, torch.tensor([0]))),
        torch.cat((tables, torch.tensor([[9, 0, 0]]))),
    )
    torch.testing.assert_close(three[:2], logits[2], rtol=1e-5, atol=1e-5)
    changed = {int(b) for old, new in zip(before, cache, strict=True) for b in (old != new).nonzero()[:, 0]}
    assert changed == {7, 1, 9, on_cuda.kv_cache_blocks}
    torch.testing.assert_close(decoding(tokens, positions, tables), logits[2], rtol=1e-5, atol=1e-5)
    one = decoding(*(x[1:] for x in STEP))
    torch.testing.assert_close(one, logits[2][1:], rtol=1e-5, atol=1e-5)
    assert calls == [
        [(4,), (4,), (4, 2)],
        [(2,), (2,), (2, 2)],
        [(1,), (1,), (1, 1)],
    ]


@pytest.mark.parametrize("kind", ["decode", "decode1"])
@pytest.mark.parametrize("quant", [None, "fp8"])
def test_decode_can_be_traced_for_cuda(on_cuda: Manifest, kind: str, quant: str | None) -> None:
    """On fake tensors of the device. torch without CUDA cannot trace SDPA for it, so not the prefill."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    whole = replace(on_cuda, quant=quant, dtype="bfloat16" if quant else "float32")
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        module = program.decoder(whole, kind)
        rows = 1 if kind == "decode1" else 3
        numbers = torch.zeros(rows, dtype=torch.int64)
        out = module(numbers, numbers, torch.zeros(rows, 2, dtype=torch.int64), pool(whole, "cuda"))
    assert (out.shape, out.dtype, out.device.type) == ((rows, 320), torch.float32, "cuda")


@pytest.mark.filterwarnings("ignore")  # of torch about itself
def test_compiled_program_takes_any_batch_and_width(
    on_cuda: Manifest, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    """The program of a GPU, traced with weights that have no memory, compiled for the CPU."""
    compiled = _compile_here(on_cuda, "decode", tmp_path / "decode.pt2", weights)
    module = eager(on_cuda, "decode", weights)
    for batch, width in ((1, 1), (2, 3), (4, 2)):
        cache, other = filled(on_cuda, weights), filled(on_cuda, weights)
        inputs = (
            torch.arange(1, batch + 1),
            torch.arange(batch) * (20 * width),
            torch.arange(batch * width).view(batch, width) % 12,
        )
        got = compiled([*inputs, *cache])
        torch.testing.assert_close(got, module(*inputs, other), rtol=1e-5, atol=2e-5)
        for mine, theirs in zip(cache, other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def _compile_here(whole: Manifest, kind: str, file: Path, weights: dict[str, Tensor]) -> _Program:
    traced = program.exported(whole, kind, "cpu")
    options = program.options(whole, kind)
    torch._inductor.aoti_compile_and_package(traced, package_path=str(file), inductor_configs=options)
    frequencies = decoder.rope_frequencies(whole.architecture.rope, whole.architecture.head_dim)
    return _Program(file, {**weights, "rope_frequencies": frequencies}, torch.device("cpu"))


def architecture(hidden: int = 64) -> Architecture:
    layer = Layer(attention=Attention(num_key_value_heads=2), ffn=FFN(intermediate_size=96), members=(0,))
    return Architecture(
        hidden_size=hidden,
        num_attention_heads=4,
        head_dim=16,
        vocab_size=320,
        max_position_embeddings=256,
        norm_eps=1e-5,
        rope=Rope(kind="default", theta=1e4, scaling=()),
        tie_word_embeddings=False,
        layers=(layer, replace(layer, attention=None)),
    )


def test_rows_in_e4m3() -> None:
    """Scales are rows' largest magnitudes over 448; numbers round as torch rounds them."""
    values = np.random.default_rng(0).standard_normal((5, 48)).astype(np.float32)
    values[3] = 0
    small = rows.quantize({"layers.0.ffn.up.weight": Constant(values, "float32")}, FP8)
    scale = decoder.to_tensor(small["layers.0.ffn.up.scale"])
    assert torch.equal(
        scale, torch.from_numpy(np.where(values.any(1), abs(values).max(1) / np.float32(448), 1))
    )
    got = small["layers.0.ffn.up.weight"].read_all().view(np.uint8)
    wanted = (torch.from_numpy(values) / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert np.array_equal(got, wanted.view(torch.uint8).numpy())
    window = np.empty((2, 7), small["layers.0.ffn.up.weight"].read_all().dtype)
    small["layers.0.ffn.up.weight"].fill(window, 1, 30)
    assert np.array_equal(window.view(np.uint8), got[1:3, 30:37])


def test_what_fp8_leaves_and_refuses() -> None:
    values = Constant(np.full((16, 16), np.nan, np.float32), "float32")
    kept = dict.fromkeys(("embedding.weight", "lm_head.weight"), values)
    assert rows.quantize(kept, FP8) == kept
    with pytest.raises(UserError, match="not finite"):
        rows.quantize({"layers.0.ffn.up.weight": values}, FP8)["layers.0.ffn.up.scale"].read_all()


def test_products_of_8_bits_are_close() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 64), torch.randn(48, 64)
    scale = weight.abs().amax(1) / 448
    small = (weight / scale[:, None]).to(torch.float8_e4m3fn)
    exact = x @ (small.float() * scale[:, None]).t()
    torch.testing.assert_close(vector_product(x[:1], small, scale), exact[:1], rtol=1e-5, atol=1e-5)
    got = scaled_product(x, small, scale)
    assert (got - exact).norm() / exact.norm() < 0.04  # x in e4m3: 3 bits of mantissa
    assert torch.equal(scaled_product(torch.zeros(1, 64), small, scale), torch.zeros(1, 48))


def in_bfloat16(name: str, x: Expression) -> Tensor:
    """As an engine has it: 8-bit weights and their scales stay as they are."""
    if x.dtype == FP8:
        return torch.from_numpy(x.read_all().view(np.uint8)).view(torch.float8_e4m3fn)
    return decoder.to_tensor(x, None if name.endswith("scale") else torch.bfloat16)


def test_fp8_logits_are_close(on_cuda: Manifest) -> None:
    checkpoint = random_checkpoint(architecture())
    tensors = checkpoint.decoder_tensors()
    whole = replace(on_cuda, architecture=checkpoint.architecture, dtype="bfloat16", kv_cache_blocks=8)
    results = []
    for quant, kept in ((None, tensors), ("fp8", rows.quantize(tensors, FP8))):
        loaded = {name: in_bfloat16(name, x) for name, x in kept.items()}
        here = replace(whole, quant=quant)
        cache = pool(here)
        prefill(eager(here, "prefill", loaded), cache, (6, 7), PROMPT)
        step = [x[:1] for x in STEP]
        results += [eager(here, kind, loaded)(*step, cache) for kind in ("decode", "decode1")]
    exact = results[0]
    for got, most in zip(results[1:], (0.03, 0.15, 0.15), strict=True):
        assert (got - exact).norm() / exact.norm() < most


@pytest.fixture
def h100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    machine = StandIn(tmp_path / "machine", gpus=2)
    monkeypatch.setenv("PATH", machine.environment["PATH"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return machine


def test_the_gpu_of_a_build_is_recorded(h100: StandIn) -> None:
    told = target.this_hardware("cuda")
    assert {name: told[name] for name in GPU} == GPU
    assert told["features"] == target.this_hardware()["features"]
    assert "gpu" not in target.this_hardware()


def test_no_gpu_no_cuda_no_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target.hardware, "gpus", lambda: ())
    with pytest.raises(UserError, match=r"^device: 'cuda' needs an NVIDIA GPU"):
        target.this_hardware("cuda")
    monkeypatch.setattr(target, "cuda_version", lambda: None)
    with pytest.raises(UserError, match=r"^device: torch .* has no CUDA"):
        target.this_compiler("cuda")
    monkeypatch.setattr(target, "cuda_version", lambda: "13.0")
    monkeypatch.setattr(target, "_has_toolkit", lambda: False)
    with pytest.raises(UserError, match="CUDA toolkit"):
        target.this_compiler("cuda")
    monkeypatch.setattr(target, "_has_toolkit", lambda: True)
    assert target.this_compiler("cuda")["cuda"] == "13.0"
    assert "cuda" not in target.this_compiler()


def test_torchs_cuda_is_read_without_torch() -> None:
    assert target.cuda_version() == torch.version.cuda


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "tpu"}, "^device: 'tpu'"),
        ({"device": "cpu", "quant": "fp8"}, "^quant: 'fp8' is for GPUs"),
        ({"quant": "int8"}, "^quant: 'int8' is for the CPU"),
        ({"quant": "fp8"}, "--dtype bfloat16"),
        (
            {"quant": "fp8", "dtype": "bfloat16", "hardware": {"compute_capability": "8.0"}},
            "this GPU has 8.0",
        ),
        ({"quant": "fp8", "dtype": "bfloat16", "architecture": architecture(hidden=72)}, "hidden_size is 72"),
    ],
)
def test_numbers_a_device_does_not_have(on_cuda: Manifest, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        target.check_device(replace(on_cuda, **changes))


def test_numbers_a_device_has(on_cuda: Manifest) -> None:
    for changes in ({}, {"device": "cpu", "quant": "int8"}, {"quant": "fp8", "dtype": "bfloat16"}):
        target.check_device(replace(on_cuda, **changes))


@pytest.mark.parametrize(
    ("changes", "gpus", "words"),
    [
        ({}, (), "nvidia-smi shows none"),
        ({"hardware": {"compute_capability": "8.0"}}, None, "compute capability 8.0"),
        ({"compiler": {"cuda": "1.0"}}, None, "CUDA 1.0"),
        ({}, None, "decode.pt2: missing"),
    ],
)
def test_an_engine_for_another_gpu_is_refused(
    on_cuda: Manifest,
    h100: StandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict,
    gpus: tuple | None,
    words: str,
) -> None:
    if gpus is not None:
        monkeypatch.setattr(target.hardware, "gpus", lambda: gpus)
    monkeypatch.setattr(target, "cuda_version", lambda: "13.0")
    compiler = {**on_cuda.compiler, "cuda": "13.0"}
    merged = {
        "compiler": {**compiler, **changes.get("compiler", {})},
        "hardware": {**on_cuda.hardware, **changes.get("hardware", {})},
    }
    with pytest.raises(UserError, match=words):
        target.check(tmp_path, replace(on_cuda, **{**changes, **merged}))


def test_files_of_an_engine(on_cuda: Manifest) -> None:
    assert target.engine_files(on_cuda) == ["decode.pt2", "decode1.pt2", "prefill.pt2", "rank0.safetensors"]
    assert target.pool_blocks(on_cuda) == on_cuda.kv_cache_blocks + 1
    assert target.pool_blocks(replace(on_cuda, device="cpu")) == on_cuda.kv_cache_blocks


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_a_rank_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="finds no usable GPU"):
        cuda.device()


def test_a_rank_of_more_than_the_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "local_rank", lambda: 2)
    with pytest.raises(UserError, match="rank 2 has no GPU: 2 visible"):
        cuda.device()


@pytest.mark.parametrize("name", cuda.LOCAL_RANKS)
def test_a_ranks_place_on_its_host(name: str) -> None:
    assert cuda.local_rank({name: "3"}) == 3
    assert cuda.local_rank({}) == 0


JOIN = """
import torch
from engines.embedded import cuda
from engines.embedded.collectives import MPIRanks
ranks = MPIRanks()
cuda.join(ranks.rank, ranks.size, torch.device("cpu"))
x = torch.full((3,), float(ranks.rank + 1))
assert torch.equal(cuda.all_reduce(x), torch.full((3,), 3.0)) and x[0] == ranks.rank + 1
torch.distributed.destroy_process_group()
"""


def test_ranks_meet_and_sum(tmp_path: Path) -> None:
    """Over gloo, torch's group of CPUs; the code is that of NCCL's."""
    script = tmp_path / "join.py"
    script.write_text(JOIN)
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    launcher = [Path(sys.executable).with_name("mpirun"), "-n", "2", "--oversubscribe", "--bind-to", "none"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, *root, sys.executable, script], check=True, timeout=120, env=environment)
