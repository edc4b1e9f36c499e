"""Random weights for a bare config.json, so that latency can be measured without a download.

A tensor's numbers are a function of seed, name and element: Philox4x64-10 (numpy's, counter-based) gives
the bits, and each number takes its sign, mantissa and lowest exponent bit from them. Any window can
thus be filled in any order, and no number is zero, infinite or NaN.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from math import log, prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from builder import huggingface
from builder.checkpoint import Checkpoint
from builder.errors import UserError
from builder.export import COMPANIONS
from builder.storage import read_json, write_json
from builder.tensors import NUMPY_DTYPES, Array, Declared, Expression, bands, scratch

END = "<|endoftext|>"
_MANTISSA_BITS = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}
_BLOCK_BYTES = 32  # what one counter of Philox4x64 gives
_BAND_BYTES = 256 << 10


@dataclass(frozen=True)
class Random(Expression):
    """Random numbers with root mean square `scale`.

    Their magnitudes are spread evenly over the logarithm of two octaves and their signs are random; those
    of a `norm` lie in one octave and are positive.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    seed: int
    scale: float
    norm: bool = False

    def fill(self, out: Array, row: int, column: int) -> None:
        if out.shape[1] == self.columns and out.flags.c_contiguous:
            self._generate(out.reshape(-1), row * self.columns)
            return
        for band in bands(out.shape[0], self.row_bytes):
            with scratch.borrow((band.stop - band.start, self.columns), self.dtype) as rows:
                self._generate(rows.reshape(-1), (row + band.start) * self.columns)
                out[band] = rows[:, column : column + out.shape[1]]

    def _generate(self, out: Array, first: int) -> None:
        """Fill a flat array with the elements from `first` on."""
        mask, lowest = self._bits
        bits = out.view(mask.dtype)
        for band in bands(len(out), out.itemsize, _BAND_BYTES):
            counter, skip = divmod((first + band.start) * out.itemsize, _BLOCK_BYTES)
            words = -(-(skip + (band.stop - band.start) * out.itemsize) // 8)
            raw = np.random.Philox(key=self._key, counter=counter).random_raw(words).view(mask.dtype)
            raw = raw[skip // out.itemsize :][: band.stop - band.start]
            np.bitwise_and(raw, mask, out=bits[band])
            np.add(bits[band], lowest, out=bits[band])  # carries into the exponent, never into the sign

    @cached_property
    def _key(self) -> int:
        text = f"{self.seed} {self.name}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")

    @cached_property
    def _bits(self) -> tuple[Any, Any]:
        """Which bits are random, and the smallest magnitude as bits, added to them."""
        kind = NUMPY_DTYPES[self.dtype]
        unsigned = np.dtype(f"uint{8 * kind.itemsize}").type
        octaves = 1 if self.norm else 2
        mask = (1 << (_MANTISSA_BITS[self.dtype] + octaves - 1)) - 1
        if not self.norm:
            mask |= 1 << (8 * kind.itemsize - 1)
        # The root mean square of log-uniform numbers between 1 and 2^octaves.
        spread = sqrt((4**octaves - 1) / (2 * octaves * log(2)))
        lowest = np.array([self.scale / spread]).astype(kind).view(unsigned)[0]
        return unsigned(mask), lowest


def randomised(declared: Checkpoint, seed: int) -> Checkpoint:
    """`declared`, from `huggingface.declared`, with random weights.

    Matrices have a standard deviation of 1/sqrt(columns), so that what passes through them keeps its
    magnitude in any number of layers; norms are around 1, biases small.
    """
    hidden = declared.architecture.hidden_size
    tensors: dict[str, Expression] = {}
    for name, x in declared.tensors.items():
        assert isinstance(x, Declared), f"{name} has weights"
        norm = name.endswith("norm.weight")
        fan_in = prod(x.shape[1:]) if len(x.shape) > 1 else hidden
        tensors[name] = Random(x.name, x.shape, x.dtype, seed, 1.0 if norm else fan_in**-0.5, norm)
    digest = hashlib.sha256(f"{declared.digest} random {seed}".encode()).hexdigest()
    return replace(declared, tensors=tensors, digest=digest)


def read(model: Path, seed: int, scratch: Path, dtype: str | None = None) -> tuple[Path, Checkpoint]:
    """A bare config.json, or a directory with one and no weights, as a Checkpoint with random weights.

    Also returns a model directory with a tokenizer, made in `scratch` where `model` is none. `dtype` is
    for a config.json that names none. Raises UserError by field.
    """
    file = model / "config.json" if model.is_dir() else model
    checkpoint = huggingface.declared(model, _named_dtype(file) or dtype)
    if file.parent == model and (model / "tokenizer.json").is_file():
        return model, randomised(checkpoint, seed)
    if model.is_dir():
        for name in COMPANIONS:
            if (model / name).is_file():
                shutil.copyfile(model / name, scratch / name)
    shutil.copyfile(file, scratch / "config.json")
    write_tokenizer(scratch)
    return scratch, randomised(checkpoint, seed)


def has_weights(model: Path) -> bool:
    """Whether a directory holds weights of its own."""
    return any(file for kind in ("safetensors", "bin") for file in model.glob(f"*.{kind}"))


def _named_dtype(file: Path) -> str | None:
    if not file.is_file():
        return None  # declared says so
    values = read_json(file)
    return values.get("dtype") or values.get("torch_dtype")


def write_tokenizer(directory: Path) -> None:
    """Write a byte-level tokenizer.json and tokenizer_config.json for the config.json in `directory`.

    Each byte is a token. The vocabulary's other tokens are words that no text becomes, so that whatever
    a model says can be shown. Raises UserError where the vocabulary is too small for that.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    config = read_json(directory / "config.json")
    size = config.get("vocab_size")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if type(size) is not int or size <= len(alphabet):
        raise UserError(
            f"{directory / 'config.json'}: vocab_size {size!r} is too small for the tokenizer of random "
            f"weights; {len(alphabet) + 1} is the least"
        )
    end = _end_id(config, size)
    others = iter([*alphabet, *(f"Ġw{n}" for n in range(size))])
    vocabulary = {END if n == end else next(others): n for n in range(size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(directory / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    write_json(directory / "tokenizer_config.json", values)


def _end_id(config: dict[str, Any], size: int) -> int:
    """The model's first end-of-text token, the last of the vocabulary where it names none."""
    given = config.get("eos_token_id")
    first = given[0] if isinstance(given, list) and given else given
    return first if type(first) is int and 0 <= first < size else size - 1
