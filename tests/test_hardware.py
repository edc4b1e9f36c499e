"""What this machine is, and what of it a process may use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engines import hardware
from engines.embedded import target

ROOT = Path(__file__).resolve().parent.parent

# What a container's seccomp profile may do: arch_prctl(ARCH_REQ_XCOMP_PERM) answers EPERM (linux/filter.h).
WITHOUT_TILES = """
import ctypes, json, struct
LOAD, EQUAL, RETURN, ALLOW, EPERM = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050001
words = [(LOAD, 0, 0, 0), (EQUAL, 0, 3, 158), (LOAD, 0, 0, 16), (EQUAL, 0, 1, 0x1023), (RETURN, 0, 0, EPERM)]
words.append((RETURN, 0, 0, ALLOW))
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *word) for word in words))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(words), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()  # PR_SET_SECCOMP, a filter
from engines.embedded import compiler, target
print(json.dumps([target.cpu_features(), target.refused_features(), compiler.native_flags()]))
"""


@pytest.mark.skipif("amx_tile" not in target.cpu_features(), reason="this processor has no AMX")
def test_without_permission_for_amx_nothing_is_compiled_for_it() -> None:
    run = [sys.executable, "-c", WITHOUT_TILES]
    said = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60).stdout
    features, refused, flags = json.loads(said)
    assert sorted(features + refused) == target.cpu_features()
    assert "amx_bf16" in refused
    preprocess = ["g++", *flags, "-dM", "-E", "-xc++", "/dev/null"]
    macros = subprocess.run(preprocess, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "__AVX512F__" in macros
    assert "__AMX" not in macros


def test_mapped_files_count_as_free_memory_of_a_group(tmp_path: Path) -> None:
    assert hardware._free_in_group(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    assert hardware._free_in_group(tmp_path) == 100
    (tmp_path / "memory.stat").write_text("anon 500\nactive_file 250\ninactive_file 100\n")
    assert hardware._free_in_group(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware._free_in_group(tmp_path) == float("inf")
