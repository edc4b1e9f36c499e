"""Laws that hold for any architecture: random layers, widths, heads, dtypes, ranks and stages."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from conftest import random_checkpoint, run_ranks
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from builder import export, huggingface, trtllm
from builder.architecture import FFN, Architecture, Attention, Layer, Linear
from builder.checkpoint import Checkpoint
from builder.decoder import load
from builder.errors import UserError
from builder.plan import Plan
from builder.rope import Rope
from builder.surgery.ffn import pad_widths
from builder.surgery.sharding import shard
from builder.tensors import NUMPY_DTYPES

LAWS = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
DTYPES = st.sampled_from(["float32", "bfloat16", "float16"])
TOKENS = torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(9).expand(2, 9)


@st.composite
def architectures(draw, *, linears: bool = True, min_layers: int = 1) -> Architecture:
    """Any decoder there is: every layer draws its own attention and FFN, at least one attention."""
    heads = draw(st.sampled_from([4, 8]))
    kv_heads = st.sampled_from([n for n in (1, 2, 4, 8) if n <= heads])
    attention = st.one_of(st.none(), kv_heads.map(lambda n: Attention(num_key_value_heads=n)))
    ffn = st.one_of(st.none(), st.integers(1, 70).map(lambda n: FFN(intermediate_size=n)))
    if linears:
        attention, ffn = st.one_of(attention, st.just(Linear())), st.one_of(ffn, st.just(Linear()))
    parts = draw(st.lists(st.tuples(attention, ffn), min_size=min_layers, max_size=7))
    layers = tuple(Layer(attention=a, ffn=f, members=(i,)) for i, (a, f) in enumerate(parts))
    assume(any(isinstance(x.attention, Attention) for x in layers))
    return Architecture(
        hidden_size=draw(st.sampled_from([16, 24, 32])),
        num_attention_heads=heads,
        head_dim=draw(st.sampled_from([2, 6, 8])),
        vocab_size=draw(st.integers(30, 41)),
        max_position_embeddings=64,
        norm_eps=1e-5,
        rope=Rope(),
        tie_word_embeddings=draw(st.booleans()),
        layers=layers,
    )


@contextmanager
def scratch() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp())
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def joined(directory: Path, tp_size: int, pp_size: int, whole: Architecture) -> dict[str, torch.Tensor]:
    """The rank files put together again, written down here once more: names, axes, heads, stages."""
    tensors = {}
    stages = np.array_split(range(len(whole.layers)), pp_size)
    for stage, layers in enumerate(stages):
        ranks = [load_file(directory / f"rank{stage * tp_size + r}.safetensors") for r in range(tp_size)]
        for name in ranks[0]:
            parts = [rank[name] for rank in ranks]
            place = name.split(".")
            if len(place) > 3 and place[1] == "layers":
                index = int(layers[int(place[2])])
                tensors[f"{index}." + ".".join(place[3:])] = join(parts, place[3:], whole, index)
            else:
                tensors[name] = torch.cat(parts)[: whole.vocab_size] if "lm_head" in name else parts[0]
    return tensors


def join(parts: list[torch.Tensor], place: list[str], whole: Architecture, index: int) -> torch.Tensor:
    if "layernorm" in place[0]:
        return parts[0]
    if "qkv" in place:
        heads, kv = whole.num_attention_heads // len(parts), whole.layers[index].num_key_value_heads
        local_kv, size = max(1, kv // len(parts)), whole.head_dim
        q, k, v = zip(
            *(p.split([heads * size, local_kv * size, local_kv * size]) for p in parts), strict=True
        )
        each = max(1, len(parts) // kv)  # ranks that share a KV head
        for name in (k, v):
            assert all(torch.equal(name[i], name[i - i % each]) for i in range(len(parts)))
        return torch.cat([*q, *k[::each], *v[::each]])
    return torch.cat(parts, 1 if place[-2] in ("dense", "proj") else 0)


def convert(checkpoint: Checkpoint, output: Path, tp_size: int, pp_size: int) -> bool:
    """Whether the mapping fits the model; what does not fit must be refused by an error of ours."""
    try:
        trtllm.convert(checkpoint, output, tp_size=tp_size, pp_size=pp_size)
    except UserError:
        assert not output.exists()
        return False
    return True


@LAWS
@given(
    architecture=architectures(),
    dtype=DTYPES,
    tp_size=st.sampled_from([2, 4, 8]),
    pp_size=st.sampled_from([1, 1, 2, 3]),
)
def test_joined_shards_are_the_whole(
    architecture: Architecture, dtype: str, tp_size: int, pp_size: int
) -> None:
    """Bit for bit, in every format's dtype."""
    checkpoint = random_checkpoint(architecture, dtype=dtype)
    with scratch() as directory:
        assume(convert(checkpoint, directory / "cut", tp_size, pp_size))
        # The same widths, so that padding is the same.
        trtllm.convert(pad_widths(checkpoint, tp_size), directory / "whole")
        padded = pad_widths(checkpoint, tp_size).architecture
        cut = joined(directory / "cut", tp_size, pp_size, padded)
        whole = joined(directory / "whole", 1, 1, padded)
        assert cut.keys() == whole.keys()
        assert all(torch.equal(bits(cut[name]), bits(whole[name])) for name in whole)


@LAWS
@given(
    architecture=architectures(linears=False, min_layers=3), dtype=DTYPES, tp_size=st.sampled_from([1, 2, 4])
)
def test_fusing_and_converting_commute(architecture: Architecture, dtype: str, tp_size: int) -> None:
    """Fused into a Hugging Face directory and then converted, or both in one pass: the same numbers.

    The directory pads widths to 256; what is beyond the one-pass width must be zero.
    """
    checkpoint = random_checkpoint(architecture, dtype=dtype)
    child = Plan().apply(checkpoint)
    assume(any(len(layer.members) > 1 for layer in child.architecture.layers))
    assume(not child.architecture.uniform)
    with scratch() as directory:
        (directory / "source").mkdir()
        (directory / "source" / "config.json").write_text("{}")
        export.write(child, directory / "source", directory / "hf")
        two_steps = huggingface.read(directory / "hf")
        assume(convert(child, directory / "one", tp_size, 1))
        assert convert(two_steps, directory / "two", tp_size, 1)
        narrow, wide = pad_widths(child, tp_size).architecture, pad_widths(two_steps, tp_size).architecture
        one, two = joined(directory / "one", tp_size, 1, narrow), joined(directory / "two", tp_size, 1, wide)
        assert one.keys() == two.keys()
        for name, x in one.items():
            rows = tuple(slice(n) for n in x.shape)
            assert torch.equal(bits(two[name][rows]), bits(x)), name
            rest = two[name].clone()
            rest[rows] = 0
            assert not rest.any(), name


@LAWS
@given(architecture=architectures(), tp_size=st.sampled_from([2, 4]), fuse=st.booleans())
def test_ranks_give_the_logits_of_one(architecture: Architecture, tp_size: int, fuse: bool) -> None:
    checkpoint = random_checkpoint(architecture)
    if fuse:
        checkpoint = Plan().apply(checkpoint)
    whole = pad_widths(checkpoint, tp_size)
    try:
        ranks = [shard(whole, tp_size, r) for r in range(tp_size)]
    except UserError:
        reject()
    expected = load(checkpoint)(TOKENS, POSITIONS)
    actual = torch.cat(run_ranks(ranks, TOKENS, POSITIONS), -1)[..., : architecture.vocab_size]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@LAWS
@given(architecture=architectures(), dtype=DTYPES, block=st.integers(1, 9))
def test_windows_are_parts_of_the_whole(architecture: Architecture, dtype: str, block: int) -> None:
    """Any window of any expression that surgery makes, against the whole tensor."""
    dropped = replace(architecture, layers=tuple(replace(x, attention=None) for x in architecture.layers))
    kept = tuple(replace(x, ffn=x.ffn if isinstance(x.ffn, FFN) else None) for x in dropped.layers)
    assume(any(x.ffn for x in kept))
    checkpoint = random_checkpoint(replace(dropped, layers=kept), dtype=dtype)
    for x in Plan().apply(checkpoint).tensors.values():
        whole = x.read_all().reshape(x.rows, -1)
        for row in range(0, x.rows, block):
            for column in range(0, x.columns, block):
                out = np.empty_like(whole[row : row + block, column : column + block])
                x.fill(out, row, column)
                assert out.dtype == NUMPY_DTYPES[x.dtype]
                assert out.tobytes() == whole[row : row + block, column : column + block].tobytes()


@LAWS
@given(architecture=architectures(), dtype=DTYPES)
def test_hugging_face_round_trip(architecture: Architecture, dtype: str) -> None:
    checkpoint = random_checkpoint(architecture, dtype=dtype)
    with scratch() as directory:
        (directory / "config.json").write_text("{}")
        written = export.write(checkpoint, directory, directory / "hf")
        again = huggingface.read(directory / "hf")
        assert again.architecture == replace(written, layers=again.architecture.layers)
        shapes = [(x.num_key_value_heads, x.intermediate_size) for x in again.architecture.layers]
        assert shapes == [(x.num_key_value_heads, x.intermediate_size) for x in written.layers]
        assert huggingface.declared(directory / "hf").architecture == again.architecture
