"""Files that are not trusted: whatever stands in them, an error of ours or a model, and nothing else.

An audit hook watches every file that is opened while a model is read.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builder import huggingface, trtllm
from builder.errors import UserError
from builder.tensorfile import read_header

T = TypeVar("T")
_opened: list[str] | None = None


def _watch(event: str, arguments: tuple) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str):
        _opened.append(arguments[0])


sys.addaudithook(_watch)


@contextmanager
def confined(directory: Path) -> Iterator[None]:
    """Fail where a file outside `directory` is opened."""
    global _opened
    _opened = []
    try:
        yield
        assert _opened, "the hook saw nothing"
        outside = [
            f for f in _opened if Path(os.path.realpath(f)).parent != Path(os.path.realpath(directory))
        ]
        assert not outside, outside
    finally:
        _opened = None


FUZZ = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
INTEGERS = st.one_of(
    st.integers(-10, 200), st.sampled_from([2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30])
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    INTEGERS,
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["llama", "F32", "silu", "0", "64", "yarn", "__import__('os')", "\x00", "../x"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda x: st.one_of(st.lists(x, max_size=4), st.dictionaries(st.text(max_size=6), x, max_size=4)),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "BF16", "F16", "F8_E4M3", "I64", "BOOL", "F4"]), VALUES),
        "shape": st.one_of(st.lists(INTEGERS, max_size=3), VALUES),
        "data_offsets": st.one_of(st.lists(INTEGERS, min_size=2, max_size=2), VALUES),
        "more": VALUES,
    },
)


def write_file(file: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    file.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def attempt(read: Callable[[], T]) -> T | None:
    """What `read` gives, or None where it raises an error of ours: one line of bearable length."""
    result, message = None, ""
    try:
        result = read()
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 2000
    message.encode()
    return result


def told(config: Path) -> str:
    """What a dry run would print."""
    model = huggingface.declared(config, "bfloat16")
    return trtllm.preview(model, model, tp_size=2).describe()


def read_any(file: Path) -> None:
    """Our error in one line, or sources that lie inside the file."""
    for source in (attempt(lambda: read_header(file)) or {}).values():
        assert source.offset >= 0
        assert source.offset + source.num_bytes <= file.stat().st_size
        assert source.read_all().nbytes == source.num_bytes


@FUZZ
@given(entries=st.dictionaries(st.text(max_size=5), ENTRIES, max_size=4), size=st.integers(0, 64))
def test_headers_of_any_entries(tmp_path: Path, entries: dict, size: int) -> None:
    write_file(tmp_path / "x.safetensors", json.dumps(entries).encode(), bytes(size))
    read_any(tmp_path / "x.safetensors")


@FUZZ
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    move=st.integers(-8, 8),
    which=st.integers(0, 3),
    end=st.booleans(),
)
def test_tensors_that_overlap_or_leave_holes(
    tmp_path: Path, shapes: list, move: int, which: int, end: bool
) -> None:
    """A sound file in which one offset is moved: sound again only when nothing moved."""
    entries, position = {}, 0
    for index, shape in enumerate(shapes):
        size = 4
        for n in shape:
            size *= n
        entries[f"t{index}"] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    entries[f"t{which % len(shapes)}"]["data_offsets"][end] += move
    write_file(tmp_path / "x.safetensors", json.dumps(entries).encode(), bytes(position))
    read_any(tmp_path / "x.safetensors")
    if move:
        with pytest.raises(UserError):
            read_header(tmp_path / "x.safetensors")
    else:
        assert len(read_header(tmp_path / "x.safetensors")) == len(shapes)


@FUZZ
@given(content=st.binary(max_size=200), length=st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_bytes_of_any_kind(tmp_path: Path, content: bytes, length: int | None) -> None:
    write_file(tmp_path / "x.safetensors", content, b"", length)
    read_any(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "a": 3}', "header names 'a' twice"),
        ('{"a": {"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}', "names 'shape' twice"),
        ('{"a": {"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', "'a' has a broken header entry"),
        ('{"a": {"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', "'a' has a broken header entry"),
        ('{"a": {"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', "'a' has a broken header entry"),
        ('{"a": {"dtype":"F32","shape":"1","data_offsets":[0,4]}}', "'a' has a broken header entry"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
        ("9" * 100_000, "not valid JSON"),
    ],
)
def test_headers_that_json_allows(tmp_path: Path, text: str, message: str) -> None:
    write_file(tmp_path / "x.safetensors", text.encode(), bytes(4))
    with pytest.raises(UserError, match=message):
        read_header(tmp_path / "x.safetensors")


def test_header_of_100_megabytes(tmp_path: Path) -> None:
    """One that says so, one that has them, and one beyond what the safetensors library accepts."""
    file = tmp_path / "x.safetensors"
    start = time.monotonic()
    write_file(file, b"{}", b"", 100_000_000)
    with pytest.raises(UserError, match="truncated or not safetensors"):
        read_header(file)
    with file.open("wb") as stream:
        stream.write((99_999_999).to_bytes(8, "little") + b"{}" + b" " * 99_999_997)
    assert read_header(file) == {}
    with file.open("wb") as stream:
        stream.write((100_000_001).to_bytes(8, "little"))
        stream.truncate(200_000_000)
    with pytest.raises(UserError, match="truncated or not safetensors"):
        read_header(file)
    assert time.monotonic() - start < 20


def model_at(tmp_path: Path, tiny_hf: Path) -> Path:
    """A directory with links to the tiny model's files, made once a test."""
    model = tmp_path / "model"
    if not model.exists():
        model.mkdir()
        os.link(tiny_hf / "model.safetensors", model / "model.safetensors")
    return model


PATHS = st.one_of(
    st.sampled_from(
        ["../x.safetensors", "/etc/passwd", "a/b", "..", ".", "", "model.safetensors", "\0", "a\0b", "\ud800"]
    ),
    st.text(max_size=8),
    st.sampled_from(["x" * 300, "./model.safetensors", "model.safetensors/", "~/x", "%2e%2e/x"]),
    VALUES,
)


@FUZZ
@given(weight_map=st.one_of(VALUES, st.dictionaries(st.text(max_size=4), PATHS, max_size=4)))
def test_index_of_any_kind(tiny_hf: Path, tmp_path: Path, weight_map: object) -> None:
    model = model_at(tmp_path, tiny_hf)
    (model / "config.json").write_text((tiny_hf / "config.json").read_text())
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with confined(model):
        attempt(lambda: huggingface.read(model))
    (model / "model.safetensors.index.json").unlink()


FIELDS = [
    "architectures", "attention_bias", "block_configs", "dtype", "head_dim", "hidden_act", "hidden_size",
    "intermediate_size", "layer_types", "max_position_embeddings", "mlp_bias", "model_type",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters",
    "rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings", "torch_dtype", "vocab_size",
    "auto_map", "partial_rotary_factor", "num_experts",
]  # fmt: skip


@FUZZ
@given(changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=4))
def test_config_of_any_values(tiny_hf: Path, tmp_path: Path, changes: dict) -> None:
    model = model_at(tmp_path, tiny_hf)
    config = json.loads((tiny_hf / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    with confined(model):
        attempt(lambda: huggingface.read(model))
        attempt(lambda: told(model))


BLOCK = st.dictionaries(
    st.sampled_from(["no_op", "replace_with_linear", "n_heads_in_group", "ffn_mult", "num_key_value_heads",
                     "intermediate_size", "sparsify", "window_length", "moe", "hidden_act"]),
    VALUES,
    max_size=4,
)  # fmt: skip


@FUZZ
@given(
    blocks=st.lists(st.one_of(VALUES, st.fixed_dictionaries({"attention": BLOCK, "ffn": BLOCK})), max_size=3)
)
def test_blocks_of_any_values(tiny_hf: Path, tmp_path: Path, blocks: list) -> None:
    config = json.loads((tiny_hf / "config.json").read_text())
    changes = {"model_type": "nemotron-nas", "num_hidden_layers": len(blocks), "block_configs": blocks}
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    attempt(lambda: told(tmp_path / "config.json"))


def test_reading_runs_no_code(tiny_hf: Path, tmp_path: Path) -> None:
    """Remote code beside the weights is neither opened nor imported."""
    model = model_at(tmp_path, tiny_hf)
    marker = tmp_path / "ran"
    (model / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')")
    config = json.loads((tiny_hf / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (model / "config.json").write_text(json.dumps(config))
    with confined(model):
        huggingface.read(model)
    assert not marker.exists()
    assert "modeling_evil" not in sys.modules
