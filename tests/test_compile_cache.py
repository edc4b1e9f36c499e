"""Compiled files are taken again where nothing that matters has changed, and only there."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from engines import manifest
from engines.embedded import cache, compiler, target
from engines.embedded.compilation import build
from engines.manifest import Manifest


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "kept"
    monkeypatch.setenv(cache.SWITCH, str(directory))
    return directory


def test_an_equal_engine_is_not_compiled_twice(
    tiny_checkpoint: Path, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    build(tiny_checkpoint, tmp_path / "first", max_seq_len=64, progress=said.append)
    assert sum(" compiled in " in line for line in said) == len(target.COMPILED)
    assert sorted(f.name for f in kept.iterdir()) == sorted(
        compiler.key(manifest.read(tmp_path / "first"), name) for name in target.COMPILED
    )
    said.clear()
    monkeypatch.setattr(compiler, "command", lambda *_: pytest.fail("compiled again"))
    build(tiny_checkpoint, tmp_path / "second", max_seq_len=64, progress=said.append)
    assert sum("taken from the cache" in line for line in said) == len(target.COMPILED)
    for name in target.COMPILED:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


CHANGES: list[tuple[str, object, bool, bool]] = [  # field, value, another program, other kernels
    ("checkpoint_digest", "another", False, False),
    ("dtype", "bfloat16", True, False),
    ("quant", "int8", True, False),
    ("max_batch_size", 9, True, False),
    ("max_input_len", 9, True, False),
    ("max_seq_len", 99, True, False),
    ("kv_cache_blocks", 99, True, False),
    ("compiler", {"torch": "9.9", "cxx": "g++"}, True, True),
]


@pytest.mark.parametrize(("field", "value", "program", "kernels"), CHANGES)
def test_what_matters_is_in_the_key(
    tiny_engine: Path, field: str, value: object, program: bool, kernels: bool
) -> None:
    old = manifest.read(tiny_engine)
    new = dataclasses.replace(old, **{field: value})
    assert (compiler.key(old, "decode.pt2") != compiler.key(new, "decode.pt2")) == program
    assert (compiler.key(old, target.KERNELS) != compiler.key(new, target.KERNELS)) == kernels


def test_where_layers_came_from_does_not_matter_but_their_shapes_do(tiny_engine: Path) -> None:
    old = manifest.read(tiny_engine)
    layers = old.architecture.layers

    def changed(**values: object) -> Manifest:
        last = dataclasses.replace(layers[-1], **values)
        architecture = dataclasses.replace(old.architecture, layers=(*layers[:-1], last))
        return dataclasses.replace(old, architecture=architecture)

    assert compiler.key(changed(members=(77,)), "decode.pt2") == compiler.key(old, "decode.pt2")
    assert compiler.key(changed(ffn=None), "decode.pt2") != compiler.key(old, "decode.pt2")
    assert compiler.key(old, "prefill.pt2") != compiler.key(old, "decode.pt2")


def test_another_processor_needs_another_file(tiny_engine: Path) -> None:
    old = manifest.read(tiny_engine)
    new = dataclasses.replace(old, hardware={**old.hardware, "features": ["avx9000"]})
    for name in target.COMPILED:
        assert compiler.key(old, name) != compiler.key(new, name)


def test_what_was_used_longest_ago_makes_room(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "LIMIT", 250)
    file = tmp_path / "file"
    file.write_bytes(bytes(100))
    for age, key in ((30, "old"), (20, "older than it looks")):
        cache.keep(key, file)
        os.utime(kept / key, (age, age))
    assert cache.fetch("old", tmp_path / "copy")  # used now
    cache.keep("new", file)
    assert {f.name for f in kept.iterdir()} == {"old", "new"}
    assert (tmp_path / "copy").read_bytes() == bytes(100)


def test_no_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    monkeypatch.setenv(cache.SWITCH, "")
    cache.keep("key", file)
    assert not cache.fetch("key", tmp_path / "copy")
    monkeypatch.setenv(cache.SWITCH, str(file / "below a file"))
    cache.keep("key", file)
    assert not cache.fetch("key", tmp_path / "copy")
    assert {f.name for f in tmp_path.iterdir()} == {"file"}
