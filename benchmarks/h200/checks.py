"""Whether the engine computes what it should on this device; each check's result, and no exception.

A tiny float32 model: the reference decoder of `builder`, run on the CPU, is what all are compared with.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.h200.gpu import Settings
from builder import decoder, trtllm
from builder.architecture import FFN, Architecture, Attention, Layer
from builder.checkpoint import Checkpoint, tensor_shapes
from builder.rope import Rope
from builder.tensors import Constant
from engines.embedded.collectives import Alone
from engines.embedded.graphs import Decoding
from engines.embedded.model import Decode, EngineDecoder, Numbers, Prefill, new_cache
from engines.embedded.plain import Plain, scaled_product, vector_product

TOLERANCE = 2e-3  # float32 sums in other orders; logits are of the size of 1 to 10
PROMPTS = (tuple(range(5, 75)), (9,), tuple(range(100, 163)))
NEW_TOKENS, BLOCKS, SPARE = 12, 3, 12


def architecture() -> Architecture:
    """Four layers: two with attention, a fused one, a lone FFN; all sizes fit FP8."""
    attention, rope = Attention(num_key_value_heads=2), Rope(kind="default", theta=1e4, scaling=())
    kinds = ((attention, 96), (attention, 96), (None, 288), (None, 96))
    return Architecture(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=16,
        vocab_size=320,
        max_position_embeddings=256,
        norm_eps=1e-5,
        rope=rope,
        tie_word_embeddings=False,
        layers=tuple(
            Layer(attention=a, ffn=FFN(intermediate_size=w), members=(i,)) for i, (a, w) in enumerate(kinds)
        ),
    )


def checkpoint() -> Checkpoint:
    """Random numbers, norms around 1."""
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.uniform(0.4, 1.6, shape) if "norm" in name else rng.standard_normal(shape) * 0.15
        for name, shape in tensor_shapes(architecture()).items()
    }
    tensors = {n: Constant(a.astype(np.float32), "float32") for n, a in arrays.items()}
    return Checkpoint(architecture=architecture(), tensors=tensors, dtype="float32", digest="")


class Case:
    """The model on the CPU and, by the engine's plain operators, on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.checkpoint = device, checkpoint()
        self.reference = decoder.load(self.checkpoint)

    def module(self, kind: type[EngineDecoder], vector: bool = False) -> EngineDecoder:
        numbers = Numbers(dtype=torch.float32, quant=None, operators=Plain(vector=vector))
        with torch.device(self.device):
            made = kind(self.checkpoint.architecture, numbers, decoder.alone)
        tensors = self.checkpoint.decoder_tensors()
        made.load_state_dict({name: decoder.to_tensor(x) for name, x in tensors.items()}, strict=True)
        return made

    @cached_property
    def greedy(self) -> list[list[int]]:
        """What follows each prompt."""
        return [self._greedy(list(prompt)) for prompt in PROMPTS]

    def _greedy(self, ids: list[int]) -> list[int]:
        start = len(ids)
        for _ in range(NEW_TOKENS):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[start:]

    def logits(self, ids: list[int]) -> Tensor:
        return self.reference(torch.tensor([ids]), torch.arange(len(ids))[None])[0]

    def decoding(self, cache: list[Tensor], capture: bool) -> Decoding:
        def program(module: EngineDecoder) -> Callable[[list[Tensor]], Tensor]:
            return lambda inputs: module(*inputs[:3], inputs[3:])

        return Decoding(
            (program(self.module(Decode, vector=True)), program(self.module(Decode))),
            cache,
            spare=SPARE,
            max_batch_size=4,
            max_blocks=BLOCKS,
            device=self.device,
            capture=capture,
        )


def prefilled(case: Case) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """A pool with all prompts, their tables, and the logits after each."""
    cache = new_cache(case.checkpoint.architecture, SPARE + 1, torch.float32, case.device)
    tables = torch.arange(len(PROMPTS) * BLOCKS).view(-1, BLOCKS)
    module = case.module(Prefill)
    logits = [
        module(torch.tensor(ids, device=case.device), table.to(case.device), cache).cpu()
        for ids, table in zip(PROMPTS, tables, strict=True)
    ]
    return cache, tables, logits


Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def tokens_after(step: Step, tables: Tensor, rows: list[int], first: list[int]) -> list[list[int]]:
    """Greedy tokens of the requests `rows` together, the first of which are given."""
    found = [[token] for token in first]
    for turn in range(NEW_TOKENS - 1):
        tokens = torch.tensor([x[-1] for x in found])
        positions = torch.tensor([len(PROMPTS[row]) + turn for row in rows])
        for kept, logits in zip(found, step(tokens, positions, tables[rows]).cpu(), strict=True):
            kept.append(int(logits.argmax()))
    return found


def prefill_is_the_references(case: Case) -> dict[str, Any]:
    """Logits after each prompt."""
    _, _, logits = prefilled(case)
    wanted = [case.logits(list(ids))[-1] for ids in PROMPTS]
    return _difference(torch.cat(logits), torch.stack(wanted))


def decode_is_the_references(case: Case) -> dict[str, Any]:
    """Greedy tokens of all prompts together, without graphs."""
    cache, tables, logits = prefilled(case)
    first = [int(x.argmax()) for x in logits]
    got = tokens_after(case.decoding(cache, capture=False), tables, [0, 1, 2], first)
    return {"passed": got == case.greedy}


def tokens_do_not_depend_on_the_batch(case: Case) -> dict[str, Any]:
    """Greedy tokens alone, by the program of one row, and in a crowd."""
    cache, tables, logits = prefilled(case)
    step, first = case.decoding(cache, capture=False), [int(x.argmax()) for x in logits]
    alone = [tokens_after(step, tables, [i], [first[i]])[0] for i in range(len(PROMPTS))]
    return {"passed": alone == tokens_after(step, tables, [0, 1, 2], first)}


def graphs_give_what_calls_give(case: Case) -> dict[str, Any]:
    """Logits of the same steps, replayed and called, of one row and of three in a bucket of four."""
    if case.device.type != "cuda":
        return {"skipped": "no CUDA graphs on the CPU"}
    parts: list[list[Tensor]] = []
    for capture in (False, True):
        cache, tables, _ = prefilled(case)
        step = case.decoding(cache, capture=capture)
        positions = torch.tensor([len(ids) for ids in PROMPTS])
        parts.append([])
        for turn in range(3):  # the first replays follow the capture
            tokens = torch.tensor([3, 4, 5]) + turn
            parts[-1].append(step(tokens, positions + turn, tables).cpu())
            parts[-1].append(step(tokens[:1], positions[:1] + turn, tables[:1]).cpu())
    called, replayed = (torch.cat(x) for x in parts)
    return _difference(replayed, called)


def eight_bits_are_close(case: Case) -> dict[str, Any]:
    """Products with e4m3 weights and activations, and with e4m3 weights alone."""
    torch.manual_seed(0)
    x, weight = (torch.randn(n, 256, device=case.device, dtype=torch.bfloat16) for n in (5, 128))
    scale = weight.float().abs().amax(1) / 448
    small = (weight.float() / scale[:, None]).to(torch.float8_e4m3fn)
    exact = x.float() @ (small.float() * scale[:, None]).t()
    both = (scaled_product(x, small, scale).float() - exact).norm() / exact.norm()
    weights = (vector_product(x[:1], small, scale) - exact[:1]).norm() / exact[:1].norm()
    return {
        "passed": bool(both < 0.05 and weights < 1e-3),
        "relative_error": float(both),
        "weights_alone": float(weights),
    }


def engine_is_the_reference(case: Case) -> dict[str, Any]:
    """The whole way: convert, build for the device, load, run."""
    from engines.embedded.compilation import build
    from engines.embedded.runtime import Runtime

    with tempfile.TemporaryDirectory() as scratch:
        made, engine = Path(scratch) / "checkpoint", Path(scratch) / "engine"
        trtllm.convert(case.checkpoint, made)
        limits: dict[str, Any] = {"max_batch_size": 4, "max_input_len": 96, "max_seq_len": 64 * BLOCKS}
        build(made, engine, device=case.device.type, **limits)
        runtime = Runtime(engine, Alone())
        first = []
        for slot, ids in enumerate(PROMPTS):
            logits = runtime.prefill(slot, tuple(range(slot * BLOCKS, (slot + 1) * BLOCKS)), ids)
            assert logits is not None
            first.append(int(logits.argmax()))

        def step(tokens: Tensor, positions: Tensor, tables: Tensor) -> Tensor:
            slots = tuple((tables[:, 0] // BLOCKS).tolist())
            logits = runtime.decode(slots, tuple(tokens.tolist()), tuple(positions.tolist()))
            assert logits is not None
            return logits

        tables = torch.arange(len(PROMPTS) * BLOCKS).view(-1, BLOCKS)
        return {"passed": tokens_after(step, tables, [0, 1, 2], first) == case.greedy}


def _difference(got: Tensor, wanted: Tensor) -> dict[str, Any]:
    largest = float((got - wanted).abs().max())
    return {"passed": largest < TOLERANCE, "largest_difference": largest, "tolerance": TOLERANCE}


CHECKS = (
    prefill_is_the_references,
    decode_is_the_references,
    tokens_do_not_depend_on_the_batch,
    graphs_give_what_calls_give,
    eight_bits_are_close,
    engine_is_the_reference,
)


def check(settings: Settings) -> Iterator[tuple[str, Any]]:
    """Each check's result by its name; what it raises is its result."""
    if settings.cuda:
        torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad():
        case = Case(settings.device)
        for one in CHECKS:
            name = one.__name__.replace("_", " ")
            try:
                yield name, one(case)
            except Exception as error:  # noqa: BLE001  reported beside the others
                yield name, {"passed": False, "failed": f"{type(error).__name__}: {error}"[:500]}
