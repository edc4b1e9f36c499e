"""The script that compiles the graphs with TensorRT's trtexec, with a shape profile for decode and prefill.

Flags: NVIDIA/TensorRT samples/common/sampleOptions.cpp, of 11.1; min, opt and max follow the
`--profile` they belong to.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.manifest import Manifest
from engines.onnx_export.graph import Port

Sizes = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Sizes of the dimensions that vary: the smallest, those to tune for, the largest."""

    min: Sizes
    opt: Sizes
    max: Sizes

    def flags(self, ports: Iterable[Port]) -> list[str]:
        """trtexec's shapes for these inputs."""
        shapes = list(ports)
        return [f"--{n}Shapes={_spec(shapes, getattr(self, n))}" for n in ("min", "opt", "max")]


def profiles(manifest: Manifest) -> tuple[Profile, Profile]:
    """Decode: every request of a batch one token behind its cache. Prefill: prompts, whole or in chunks."""
    batch, prompt, longest = manifest.max_batch_size, manifest.max_input_len, manifest.max_seq_len
    decode = Profile(min=_sizes(1, 1, 1), opt=_sizes(batch, 1, prompt), max=_sizes(batch, 1, longest - 1))
    prefill = Profile(min=_sizes(1, 1, 0), opt=_sizes(1, prompt, 0), max=_sizes(batch, prompt, prompt - 1))
    return decode, prefill


def _sizes(batch: int, tokens: int, past: int) -> Sizes:
    return {"batch": batch, "tokens": tokens, "past": past, "total": past + tokens, "wanted": 1}


def _spec(ports: Iterable[Port], sizes: Sizes) -> str:
    """name:1x2x3,..."""
    return ",".join(
        f"{port.name}:{'x'.join(str(sizes[d] if isinstance(d, str) else d) for d in port.shape)}"
        for port in ports
    )


def write(
    file: Path, manifest: Manifest, places: Sequence[str], graphs: Mapping[str, Iterable[Port]]
) -> None:
    """Write the executable script: `graphs` are inputs by file, the same in every one of `places`."""
    lines = [
        "#!/bin/sh",
        "# Compiles the graphs into TensorRT engines (.plan) beside them. TRTEXEC names another trtexec;",
        "# arguments are handed on to it. Profile 0 is decode, profile 1 prefill.",
        "set -eu",
        'cd "$(dirname "$0")"',
        f"for place in {' '.join(places)}; do",
        *(line for name, ports in graphs.items() for line in _command(manifest, name, list(ports))),
        "done",
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    file.chmod(file.stat().st_mode | 0o111)


def _command(manifest: Manifest, name: str, ports: list[Port]) -> list[str]:
    stem = name.removesuffix(".onnx")
    lines = [
        f'"${{TRTEXEC:-trtexec}}" --onnx="$place/{name}" --saveEngine="$place/{stem}.plan"',
        "--stronglyTyped --skipInference" + " --noTF32" * (manifest.dtype == "float32"),
    ]
    for index, profile in enumerate(profiles(manifest)):
        lines.append(f"--profile={index}")
        lines += [shlex.quote(flag) for flag in profile.flags(ports)]
    first, *others = [*lines, '"$@"']
    return [f"  {first} \\", *(f"    {x} \\" for x in others[:-1]), f"    {others[-1]}"]
