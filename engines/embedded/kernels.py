"""The CPU kernels of `native/`: as operators that programs call, and as the library that has them.

Compiled programs call the library's C functions themselves (AOTInductor's custom_ops_to_c_shims), so it is
loaded before them. Here the operators have shapes and no body: a program that contains them is for compiling.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from engines.embedded.target import KERNELS

_T, _OPTIONAL = "AtenTensorHandle", "AtenTensorHandle*"
# operator: (what torch calls it with and gets, what its C function is called with before the result)
_OPERATORS = {
    "engine_linear": (
        "(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, bool tiles, bool logits) -> Tensor",
        (_T, _T, _OPTIONAL, _OPTIONAL, "int32_t", "int32_t"),
    ),
    "engine_swiglu": (
        "(Tensor x, Tensor gate, Tensor up, Tensor? gate_scale, Tensor? up_scale, bool tiles) -> Tensor",
        (_T, _T, _T, _OPTIONAL, _OPTIONAL, "int32_t"),
    ),
    "engine_attention": (
        "(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor tables, "
        "Tensor positions, int heads) -> Tensor",
        (_T, _T, _T, _T, _T, _T, _T, "int64_t"),
    ),
    "engine_store_prompt": (
        "(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor table, int heads) "
        "-> Tensor",
        (_T, _T, _T, _T, _T, _T, "int64_t"),
    ),
}

_library = torch.library.Library("ffn_fusion", "FRAGMENT")
for _name, (_schema, _) in _OPERATORS.items():
    _library.define(_name + _schema)


@torch.library.register_fake("ffn_fusion::engine_linear", lib=_library)
def _linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, tiles: bool, logits: bool
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32 if logits else x.dtype)


@torch.library.register_fake("ffn_fusion::engine_swiglu", lib=_library)
def _swiglu(
    x: Tensor, gate: Tensor, up: Tensor, gate_scale: Tensor | None, up_scale: Tensor | None, tiles: bool
) -> Tensor:
    return x.new_empty(x.shape[0], gate.shape[0])


@torch.library.register_fake("ffn_fusion::engine_attention", lib=_library)
def _attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    positions: Tensor,
    heads: int,
) -> Tensor:
    return qkv.new_empty(qkv.shape[0], heads * keys.shape[2])


@torch.library.register_fake("ffn_fusion::engine_store_prompt", lib=_library)
def _store_prompt(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, table: Tensor, heads: int
) -> Tensor:
    return qkv.new_empty(heads + 2 * keys.shape[1], qkv.shape[0], keys.shape[2])


def c_shims() -> dict[torch._ops.OpOverload, list[str]]:
    """AOTInductor's custom_ops_to_c_shims: the C declaration of each operator."""
    return {
        getattr(torch.ops.ffn_fusion, name).default: [
            f"AOTITorchError aoti_torch_cpu_{name}({', '.join((*arguments, _OPTIONAL))})"
        ]
        for name, (_, arguments) in _OPERATORS.items()
    }


def load(engine: Path) -> None:
    """Make an engine's kernels known to the programs that are loaded after them."""
    ctypes.CDLL(str(engine / KERNELS), mode=ctypes.RTLD_GLOBAL)
