"""The contract of an engine directory.

An embedded engine has it in config.json. TensorRT-LLM's own config.json has that name in its
directories, so there it is ffn-fusion.json.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from builder.architecture import Architecture
from builder.errors import UserError
from builder.storage import read_json, write_json

VERSION = 3
BESIDE = "ffn-fusion.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`architecture` is that of the whole model, widths padded, and says what runs in parallel.

    Lengths count tokens.

    `dtype` is that of the activations and the KV cache, and of the weights unless `quant` names theirs.
    `device` is what an embedded engine runs on, "cpu" or "cuda"; `kv_cache_blocks` is its pool, 0 where the
    backend has its own.
    """

    version: int = VERSION
    backend: str
    checkpoint_digest: str
    architecture: Architecture
    dtype: str
    quant: str | None = None
    device: str = "cpu"
    tp_size: int
    pp_size: int
    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    kv_cache_blocks: int = 0
    hardware: dict[str, Any]
    compiler: dict[str, Any]

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    def counts(self) -> dict[str, Any]:
        """What the engine computes and holds, for reports: `Architecture.counts` and its dtype."""
        size = 4 if self.dtype == "float32" else 2
        return {"dtype": self.dtype, **self.architecture.counts(self.tp_size, size)}

    def check_limits(self) -> None:
        """Raises UserError where a limit does not fit the architecture or the others."""
        longest = self.architecture.max_position_embeddings
        for name in ("max_batch_size", "max_input_len"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not positive; give at least 1")
        if not 4 <= self.max_seq_len <= longest:
            raise UserError(
                f"max_seq_len: {self.max_seq_len} is not between 4 and the model's "
                f"max_position_embeddings {longest}"
            )
        if self.max_input_len >= self.max_seq_len:
            raise UserError(
                f"max_input_len: {self.max_input_len} leaves no room for output in max_seq_len "
                f"{self.max_seq_len}; lower it"
            )

    def write(self, directory: Path) -> None:
        """Write it into an engine directory."""
        name = BESIDE if self.backend.startswith("tensorrt") else "config.json"
        write_json(directory / name, {**asdict(self), "architecture": self.architecture.to_dict()})


_COUNTS = ("tp_size", "pp_size", "max_batch_size", "max_input_len", "max_seq_len", "kv_cache_blocks")
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("backend", "checkpoint_digest", "dtype", "device"), (str,)),
    **dict.fromkeys(_COUNTS, (int,)),
    **dict.fromkeys(("hardware", "compiler"), (dict,)),
}


def read(directory: Path) -> Manifest:
    """Read an engine directory's. Raises UserError where it is none of ours, or of another version."""
    file = directory / BESIDE
    if not file.is_file():
        file = directory / "config.json"
    values = read_json(file)
    if "backend" not in values:
        raise UserError(f"{file}: not an engine's; give what `build-engine` wrote")
    if values.get("version") != VERSION:
        raise UserError(f"{file}: version {values.get('version')!r} is not {VERSION}; build the engine again")
    wrong = {f.name for f in fields(Manifest)} ^ set(values)
    if wrong:
        raise UserError(f"{file}: key {sorted(wrong)[0]!r} is missing or unknown; build the engine again")
    try:
        architecture = Architecture.from_dict(values.pop("architecture"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: architecture is broken ({error}); build the engine again") from None
    for name, kinds in _KINDS.items():
        if not isinstance(values[name], kinds) or isinstance(values[name], bool):
            raise UserError(f"{file}: {name} is {str(values[name])[:40]!r}; build the engine again")
    return Manifest(architecture=architecture, **values)
