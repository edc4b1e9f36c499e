"""The fused FFN is the sum of its members with their own norms: in float64, float32, and rounded once."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import write_llama

from builder import huggingface
from builder.architecture import FFN, Architecture, Layer
from builder.checkpoint import Checkpoint, tensor_shapes
from builder.decoder import load
from builder.errors import UserError
from builder.rope import Rope
from builder.surgery.attention import drop_attention
from builder.surgery.ffn import pad_widths
from builder.surgery.fusion import default_groups, fuse
from builder.tensors import NUMPY_DTYPES, Constant, Expression

EPS = 1e-5


def constant(array: np.ndarray, dtype: str) -> Constant:
    return Constant(array.astype(NUMPY_DTYPES[dtype]), dtype)


def ffn_stack(widths: list[int], dtype: str, hidden: int = 48) -> Checkpoint:
    """Attention-free layers of unlike widths and norms, some norm entries zero, tiny or negative."""
    rng = np.random.default_rng(0)
    architecture = Architecture(
        hidden_size=hidden,
        num_attention_heads=4,
        head_dim=12,
        vocab_size=32,
        max_position_embeddings=64,
        norm_eps=EPS,
        rope=Rope(),
        tie_word_embeddings=False,
        layers=tuple(
            Layer(attention=None, ffn=FFN(intermediate_size=w), members=(i,)) for i, w in enumerate(widths)
        ),
    )
    arrays = {name: rng.standard_normal(shape) * 0.3 for name, shape in tensor_shapes(architecture).items()}
    for i, name in enumerate(n for n in arrays if "norm" in n):
        arrays[name] = rng.uniform(0.2, 2.0, hidden)
        arrays[name][i % hidden] = 0.0
        arrays[name][:3] = (1e-12, -0.7, 0.0)
    return Checkpoint(
        architecture=architecture,
        tensors={n: constant(a, dtype) for n, a in arrays.items()},
        dtype=dtype,
        digest="",
    )


def ffn(x: np.ndarray, tensors: dict[str, Expression], dtype: type) -> np.ndarray:
    """down(silu(gate(n(x))) * up(n(x))) written out, in `dtype`."""
    norm, gate, up, down = (
        tensors[n].read_all().astype(dtype)
        for n in ("ffn_norm.weight", "ffn.gate.weight", "ffn.up.weight", "ffn.down.weight")
    )
    y = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + EPS) * norm
    z = y @ gate.T
    return (z / (1 + np.exp(-z)) * (y @ up.T)) @ down.T


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_fused_is_the_sum_of_its_members(dtype: str, tolerance: float) -> None:
    stack = ffn_stack([64, 32, 96], dtype)
    fused = fuse(stack, [(0, 2)])
    assert fused.architecture.layers == (
        Layer(attention=None, ffn=FFN(intermediate_size=192), members=(0, 1, 2)),
    )
    x = np.random.default_rng(1).standard_normal((7, 48)).astype(dtype)
    expected = sum(ffn(x, stack.layer(i), np.float64) for i in range(3))
    actual = ffn(x, fused.layer(0), np.dtype(dtype).type)
    assert np.abs(expected).max() > 1
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def test_bfloat16_is_the_float32_result_rounded_once() -> None:
    """The base norm is rounded first; the folded weights are computed from it in float32 and cast once."""
    stack = ffn_stack([64, 32], "bfloat16")
    fused = fuse(stack, [(0, 1)]).layer(0)
    base = fused["ffn_norm.weight"].read_all()
    assert base.dtype == ml_dtypes.bfloat16
    for name in ("ffn.gate.weight", "ffn.up.weight"):
        parts = []
        for i in range(2):
            layer = {n: x.read_all().astype(np.float32) for n, x in stack.layer(i).items()}
            ratio = layer["ffn_norm.weight"] / base.astype(np.float32)
            parts.append((layer[name] * ratio).astype(ml_dtypes.bfloat16))
        assert np.array_equal(fused[name].read_all().view("uint16"), np.concatenate(parts).view("uint16"))


def test_blocks_equal_the_whole() -> None:
    fused = fuse(ffn_stack([64, 32, 96], "bfloat16"), [(0, 2)]).layer(0)
    for x in fused.values():
        whole = x.read_all()
        pieces = [x.read(i, min(i + 7, x.shape[0])) for i in range(0, x.shape[0], 7)]
        assert np.array_equal(np.concatenate(pieces).view("uint16"), whole.view("uint16"))


def test_last_norm_differs_from_folding() -> None:
    stack = ffn_stack([64, 64], "float32")
    last = fuse(stack, [(0, 1)], norm="last").layer(0)
    assert last["ffn_norm.weight"] is stack.layer(1)["ffn_norm.weight"]
    x = np.random.default_rng(1).standard_normal((4, 48))
    expected = sum(ffn(x, stack.layer(i), np.float64) for i in range(2))
    assert np.abs(ffn(x, last, np.float64) - expected).max() > 0.05 * np.abs(expected).max()


def test_padding_changes_nothing(tiny_hf: Path) -> None:
    checkpoint = huggingface.read(tiny_hf)
    padded = pad_widths(checkpoint, 256)
    assert {x.ffn.intermediate_size for x in padded.architecture.layers if x.ffn} == {256}
    tokens, positions = torch.arange(12)[None], torch.arange(12)[None]
    torch.testing.assert_close(load(padded)(tokens, positions), load(checkpoint)(tokens, positions))


def test_default_groups_leave_the_last_layer_out(tiny_hf: Path) -> None:
    dropped = drop_attention(huggingface.read(tiny_hf), {0, 2, 3, 4})
    assert list(dropped.architecture.attention_free_runs()) == [(0, 0), (2, 4)]
    assert default_groups(dropped.architecture) == [(2, 3)]
    assert default_groups(dropped.architecture, include_last=True) == [(2, 4)]
    assert fuse(dropped, [(2, 3)]).architecture.layers[2].members == (2, 3)


@pytest.mark.parametrize(
    ("drop", "groups", "message"),
    [
        ({2, 3}, [(2, 4)], "crosses layer 4, which has attention; drop it"),
        ({2, 3, 4}, [(2, 3), (3, 4)], "overlaps"),
        ({2, 3}, [(2, 9)], "no run of two or more of the layers 0-5"),
        ({2, 3}, [(2, 2)], "no run of two or more"),
        ({9}, [], "layer 9 does not exist; the model has 0-5"),
    ],
)
def test_wrong_groups_are_refused(tiny_hf: Path, drop: set, groups: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fuse(drop_attention(huggingface.read(tiny_hf), drop), groups)


def test_model_in_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    directory = write_llama(tmp_path / "m", dtype="bfloat16")
    fused = fuse(drop_attention(huggingface.read(directory), {1, 2, 3}), [(1, 2)])
    assert {x.dtype for x in fused.tensors.values()} == {"bfloat16"}
