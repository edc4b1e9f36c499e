"""The CPU kernels against torch, with each instruction set that this machine can also do without."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import engines.embedded
from engines.embedded.compiler import native_flags
from engines.embedded.step import BLOCK_SIZE
from engines.embedded.target import cpu_features

NATIVE = Path(engines.embedded.__file__).parent / "native"
INTEL = "avx2" in cpu_features()
SETS = {"native": ()} | (
    {
        "no AMX": ("-mno-amx-bf16",),
        "no BF16": ("-mno-amx-bf16", "-mno-avx512bf16"),
        "AVX2": ("-mno-amx-bf16", "-mno-avx512f"),
        "SSE": ("-mno-amx-bf16", "-mno-avx512f", "-mno-avx"),
    }
    if INTEL
    else {}
)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-6}  # of the sum of magnitudes; inputs are exact in both


@pytest.fixture(scope="module", params=list(SETS))
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    file = tmp_path_factory.mktemp("kernels") / "abi.so"
    source = Path(__file__).with_name("kernels_abi.cpp")
    flags = [*native_flags(), *SETS[request.param], "-Werror=return-type"]
    subprocess.run(["g++", *flags, "-I", NATIVE, source, "-o", file], check=True)
    return ctypes.CDLL(str(file))


def call(function: Callable[..., None], *arguments: Tensor | int | None) -> None:
    kinds = [ctypes.c_long if isinstance(x, int) else ctypes.c_void_p for x in arguments]
    function.argtypes = kinds
    function(*[x.data_ptr() if isinstance(x, Tensor) else x for x in arguments])


def name_of(dtype: torch.dtype, int8: bool) -> str:
    return str(dtype).removeprefix("torch.") + "_int8" * int8


class Weights:
    """x [batch, columns], weights [rows, columns] twice, their scales, and the exact products."""

    def __init__(self, batch: int, rows: int, columns: int, dtype: torch.dtype, int8: bool, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.sizes = (batch, rows, columns)
        self.x = torch.randn(batch, columns, generator=generator).to(dtype)
        draw = torch.randn(2, rows, columns, generator=generator)
        self.w = (draw * 40).clamp(-127, 127).to(torch.int8) if int8 else draw.to(dtype)
        self.scale = torch.rand(2, rows, generator=generator) * 0.02 if int8 else None
        scale = 1.0 if self.scale is None else self.scale[:, None].double()
        self.exact = self.x.double() @ self.w.double().transpose(1, 2) * scale  # [2, batch, rows]
        self.size = self.x.double().abs() @ self.w.double().abs().transpose(1, 2) * scale

    def linear(self, library: ctypes.CDLL, name: str, tiles: int, rows: slice = slice(None)) -> Tensor:
        x = self.x[rows].contiguous()
        out = torch.full((len(x), self.sizes[1]), float("nan"))
        scale = None if self.scale is None else self.scale[0]
        call(
            getattr(library, f"linear_{name}"), x, self.w[0], scale, None, out, len(x), *self.sizes[1:], tiles
        )
        return out


CASES = [(dtype, int8) for dtype in (torch.float32, torch.bfloat16) for int8 in (False, True)]


@pytest.mark.parametrize(("dtype", "int8"), CASES)
@pytest.mark.parametrize("tiles", [0, 1])
@settings(max_examples=10, deadline=None)
@given(
    batch=st.integers(1, 40), rows=st.integers(1, 130), columns=st.integers(1, 9).map(lambda n: n * 16 - 8)
)
def test_products_of_any_size(
    library: ctypes.CDLL, dtype: torch.dtype, int8: bool, tiles: int, batch: int, rows: int, columns: int
) -> None:
    case = Weights(batch, rows, columns, dtype, int8, seed=batch + rows)
    got = case.linear(library, name_of(dtype, int8), tiles).double()
    assert ((got - case.exact[0]).abs() <= TOLERANCE[dtype] * case.size[0]).all()


@pytest.mark.parametrize(("dtype", "int8"), CASES)
@pytest.mark.parametrize("tiles", [0, 1])
@pytest.mark.parametrize("columns", [96, 100, 1024])
def test_a_row_is_the_same_in_every_batch(
    library: ctypes.CDLL, dtype: torch.dtype, int8: bool, tiles: int, columns: int
) -> None:
    case, name = Weights(71, 150, columns, dtype, int8), name_of(dtype, int8)
    together = case.linear(library, name, tiles)
    for size in (1, 2, 3, 7, 16, 33):
        parts = [case.linear(library, name, tiles, slice(i, i + size)) for i in range(0, 71, size)]
        assert torch.equal(torch.cat(parts), together)


@pytest.mark.parametrize(("dtype", "int8"), CASES)
@pytest.mark.parametrize("tiles", [0, 1])
@pytest.mark.parametrize("sizes", [(1, 96, 64), (3, 37, 100), (20, 70, 96)])
def test_swiglu(
    library: ctypes.CDLL, dtype: torch.dtype, int8: bool, tiles: int, sizes: tuple[int, int, int]
) -> None:
    case = Weights(*sizes, dtype, int8)
    gate_scale, up_scale = (None, None) if case.scale is None else case.scale
    out = torch.empty(sizes[:2], dtype=dtype)
    function = getattr(library, f"swiglu_{name_of(dtype, int8)}")
    call(function, case.x, case.w[0], case.w[1], gate_scale, up_scale, out, *sizes, tiles)
    expected = F.silu(case.exact[0]) * case.exact[1]
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=rtol)


def test_bias_and_scale(library: ctypes.CDLL) -> None:
    case, bias = Weights(2, 20, 64, torch.float32, True), torch.randn(20)
    out = torch.empty(2, 20)
    call(library.linear_float32_int8, case.x, case.w[0], case.scale[0], bias, out, 2, 20, 64, 0)
    torch.testing.assert_close(out.double(), case.exact[0] + bias, rtol=1e-5, atol=1e-5)


def test_exponential(library: ctypes.CDLL) -> None:
    x = torch.cat((torch.linspace(-87, 0, 1 << 16), torch.tensor([-1e30, -88.0, -0.0] + [0.0] * 13)))
    y = torch.empty_like(x)
    call(library.exponential, x, y, len(x))
    torch.testing.assert_close(y.double(), x.double().exp(), rtol=3e-7, atol=2e-38)


class Attention:
    """A pool of blocks and some requests in it; torch's attention is the reference."""

    heads, kv_heads, head_dim = 6, 2, 40

    def __init__(self, dtype: torch.dtype, lengths: list[int]) -> None:
        generator = torch.Generator().manual_seed(sum(lengths))
        kv, size, self.dtype, self.lengths = self.kv_heads, self.head_dim, dtype, lengths
        wide = max(-(-n // BLOCK_SIZE) for n in lengths)
        order = torch.randperm(wide * len(lengths) + 3, generator=generator)
        self.tables = order[: wide * len(lengths)].view(len(lengths), wide).contiguous()
        self.keys = torch.full((len(order), kv, size, BLOCK_SIZE), float("nan"), dtype=dtype)
        self.values = torch.full((len(order), kv, BLOCK_SIZE, size), float("nan"), dtype=dtype)
        row = (self.heads + 2 * kv) * size
        self.qkv = [torch.randn(n, row, generator=generator).to(dtype) for n in lengths]
        angles = torch.rand(max(lengths), size // 2, generator=generator) * 6
        self.cos, self.sin = angles.cos(), angles.sin()

    def rotated(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [heads, length, head_dim] of a request, rounded as the cache rounds."""
        qkv, length = self.qkv[index], self.lengths[index]
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        parts = qkv.double().view(length, -1, self.head_dim).transpose(0, 1).split(sizes)
        q, k = (self.turn(x, length).to(self.dtype) for x in parts[:2])
        return q, k, parts[2].to(self.dtype)

    def turn(self, x: Tensor, length: int) -> Tensor:
        a, b = x.chunk(2, -1)
        cos, sin = self.cos[:length].double(), self.sin[:length].double()
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def store(self, library: ctypes.CDLL, index: int, length: int) -> Tensor:
        out = torch.empty(self.heads + 2 * self.kv_heads, length, self.head_dim, dtype=self.dtype)
        function = getattr(library, f"store_{name_of(self.dtype, False)}")
        sizes = (self.heads, self.kv_heads, self.head_dim)
        pool = (self.cos, self.sin, self.keys, self.values)
        call(function, self.qkv[index], *pool, self.tables[index], length, *sizes, out)
        return out

    def decode(self, library: ctypes.CDLL, rows: list[int]) -> Tensor:
        """The last token of the requests `rows`."""
        last = torch.tensor([self.lengths[i] - 1 for i in rows])
        qkv = torch.stack([self.qkv[i][-1] for i in rows])
        out = torch.empty(len(rows), self.heads * self.head_dim, dtype=self.dtype)
        tables = self.tables[rows].contiguous()
        function = getattr(library, f"decode_{name_of(self.dtype, False)}")
        inputs = (qkv, self.cos[last], self.sin[last], self.keys, self.values, tables, tables.shape[1], last)
        call(function, *inputs, len(rows), self.heads, self.kv_heads, self.head_dim, out)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[1], [2, 64, 65], [200, 1, 129, 64, 63]])
def test_attention_over_blocks(library: ctypes.CDLL, dtype: torch.dtype, lengths: list[int]) -> None:
    case = Attention(dtype, lengths)
    for index, length in enumerate(lengths):
        got = case.store(library, index, length - 1)  # what a prompt leaves
        parts = torch.cat(case.rotated(index))[:, : length - 1]
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(got, parts, rtol=tolerance, atol=tolerance)
    together = case.decode(library, list(range(len(lengths))))
    for index in range(len(lengths)):
        q, k, v = (x.double() for x in case.rotated(index))
        exact = F.scaled_dot_product_attention(q[None, :, -1:], k[None], v[None], enable_gqa=True).flatten()
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(together[index].double(), exact, rtol=tolerance, atol=tolerance)
        assert torch.equal(case.decode(library, [index])[0], together[index])
