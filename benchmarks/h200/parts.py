"""What is measured: whole models, one rank's share of models of 8, and stacks of FFNs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.h200 import stacks
from benchmarks.h200.gpu import Rates, Run, Settings, captured, figure, medians
from benchmarks.h200.stacks import MATRIX, VECTOR, Model, Steps
from builder.architecture import FFN, Architecture, Attention
from builder.config import Config
from builder.decoder import RMSNorm
from engines.embedded.model import FP8, FeedForward
from engines.embedded.plain import Plain

CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "h100_node" / "shapes"
CONTEXT, QUICK_CONTEXT = 1024, 128
Figures = Iterator[tuple[str, Any]]  # each as soon as it is known


@dataclass(frozen=True, kw_only=True)
class AllReduce:
    """A model of one all-reduce over NVLink; parameters, not measurements.

    `latency_s` is assumed: the order of small one-node all-reduces. `bytes_per_s` is NVLink 4's in one
    direction (H100 and H200 data sheets: 900 GB/s in both). A ring of n ranks moves 2 (n - 1) / n of the
    bytes.
    """

    ranks: int = 8
    latency_s: float = 10e-6
    bytes_per_s: float = 450e9

    def seconds(self, num_bytes: int) -> float:
        return self.latency_s + 2 * (self.ranks - 1) / self.ranks * num_bytes / self.bytes_per_s


def tiny() -> Architecture:
    """For --quick on the CPU: eight layers."""
    architecture = Config(CONFIGS / "llama-3.1-8b.json").architecture()
    small = replace(architecture.layers[0], ffn=FFN(intermediate_size=192))
    layer = replace(small, attention=Attention(num_key_value_heads=2))
    return replace(
        architecture,
        hidden_size=64,
        head_dim=16,
        num_attention_heads=4,
        vocab_size=512,
        layers=tuple(replace(layer, members=(i,)) for i in range(8)),
    )


def decode_8b(settings: Settings, rates: Rates) -> Figures:
    """Llama 3.1 8B: as it is, without attention in a third of its layers, and those fused but the last."""
    parent = Config(CONFIGS / "llama-3.1-8b.json").architecture() if settings.cuda else tiny()
    count = len(parent.layers)
    first = count * 17 // 32
    dropped = range(first, first + (count * 3 + 7) // 8)
    groups = [(dropped[0], dropped[-2])]
    bare = stacks.without_attention(parent, dropped)
    yield "layers", {"without_attention": [dropped[0], dropped[-1]], "fused": [list(g) for g in groups]}
    whole = stacks.random_model(stacks.fused(bare, groups), settings)
    sequence = stacks.sequential(whole, bare, groups)
    models = {
        "parent": stacks.variant(sequence, parent, range(count)),
        "attention dropped": sequence,
        "fused": whole,
    }
    yield from _decodes(models, settings, rates, vector=True)


def share_of(
    config: Path, groups: Sequence[tuple[int, int]], settings: Settings, rates: Rates, reduce: AllReduce
) -> Figures:
    """One rank's share, in sequence and with `groups` fused; all-reduces are modelled by `reduce`."""
    if settings.cuda:
        architecture = Config(config).architecture()
    else:
        architecture, groups = stacks.without_attention(tiny(), range(4, 8)), [(4, 6)]
    reduce = replace(reduce, ranks=min(reduce.ranks, architecture.num_attention_heads))
    local = architecture.shard(reduce.ranks)
    whole = stacks.random_model(stacks.fused(local, groups), settings)
    models = {"sequential": stacks.sequential(whole, local, groups), "fused": whole}
    yield "all_reduce", {"modelled": True, **vars(reduce)}
    yield from _decodes(models, settings, rates, reduce=reduce)


def _decodes(
    models: dict[str, Model],
    settings: Settings,
    rates: Rates,
    vector: bool = False,
    reduce: AllReduce | None = None,
) -> Figures:
    """Each batch's steps; at batch 1 by `vector` also with products as sums."""
    context = CONTEXT if settings.cuda and not settings.quick else QUICK_CONTEXT
    pool = stacks.new_pool(
        max((m.architecture for m in models.values()), key=lambda a: a.num_attention_layers),
        max(settings.batches),
        context,
        settings,
    )
    yield "context", context
    yield "weight_bytes", {name: model.weight_bytes() for name, model in models.items()}
    matrix = Steps(settings, vector=False)
    for batch in settings.batches:
        runs = {name: matrix.decode(model, pool, batch, context) for name, model in models.items()}
        if vector and batch == 1:
            sums = Steps(settings, vector=True)
            runs |= {f"{name}, sums": sums.decode(m, pool, batch, context) for name, m in models.items()}
        yield f"batch {batch}", _batch(runs, models, batch, context, settings, rates, reduce)


def _batch(
    runs: dict[str, Run],
    models: dict[str, Model],
    batch: int,
    context: int,
    settings: Settings,
    rates: Rates,
    reduce: AllReduce | None,
) -> dict[str, Any]:
    seconds = medians(runs, settings)
    rows: dict[str, Any] = {}
    for name, measured in seconds.items():
        model = models[name.partition(",")[0] if name not in models else name]
        num_bytes = model.weight_bytes() + model.kv_bytes(batch, context)
        rows[name] = figure(measured, rates.floor_s(num_bytes, model.flops(batch), "bfloat16"))
        if reduce is not None:
            count = model.architecture.all_reduces_per_token(reduce.ranks)
            each = reduce.seconds(batch * model.architecture.hidden_size * 2)
            rows[name] |= {
                "all_reduces": count,
                "with_all_reduces_us": round((measured + count * each) * 1e6, 1),
            }
    return rows


def stacks_of_ffns(settings: Settings, rates: Rates) -> Figures:
    """Norm, SwiGLU and residual of 2, 4 and 8 FFNs after each other, and the one FFN that they fuse into.

    Widths are those of a rank of 8 (49B: 3584 and 1792 at hidden 8192; 253B: 6656 at 16384) and of the 8B.
    At batch 1 both have their products as cuBLAS makes them and as sums over rows.
    """
    shapes = [(8192, 3584), (4096, 14336), (16384, 6656), (8192, 1792)] if settings.cuda else [(64, 96)]
    counts = (2,) if settings.quick else (2, 4, 8)
    for quant in (None, FP8):
        for hidden, width in shapes:
            for count in counts:
                name = f"{quant or 'bf16'} {hidden}x{width}x{count}"
                try:
                    yield name, _stack(hidden, width, count, quant, settings, rates)
                except Exception as error:  # noqa: BLE001  the other stacks still run
                    yield name, {"failed": str(error).partition("\n")[0]}


class Stack(nn.Module):
    """FFNs with their norms."""

    def __init__(self, hidden: int, widths: Sequence[int], quant: str | None, settings: Settings) -> None:
        super().__init__()
        with torch.device("meta"):
            self.norms = nn.ModuleList(RMSNorm(hidden, 1e-5).to(torch.bfloat16) for _ in widths)
            self.ffns = nn.ModuleList(
                FeedForward(hidden, FFN(intermediate_size=w), stacks.numbers(quant)) for w in widths
            )
        self.to_empty(device=settings.device).requires_grad_(False)
        for name, x in self.named_parameters():
            stacks._fill(name, x)

    def num_bytes(self) -> int:
        return sum(x.nbytes for x in self.parameters())

    def flops(self, batch: int) -> int:
        return 2 * batch * sum(x.numel() for x in self.parameters() if x.dim() == 2)


def add_ffn(norm: RMSNorm, ffn: FeedForward, hidden_size: int, x: Tensor) -> Tensor:
    """One layer without attention."""
    assert x.shape[1] == hidden_size, "a number to the compiler"
    return x + ffn(norm(x))


def _stack(
    hidden: int, width: int, count: int, quant: str | None, settings: Settings, rates: Rates
) -> dict[str, Any]:
    kinds = {
        "sequential": Stack(hidden, [width] * count, quant, settings),
        "fused": Stack(hidden, [width * count], quant, settings),
    }
    rows: dict[str, Any] = {"weight_bytes": kinds["fused"].num_bytes()}
    for batch in settings.batches:
        ways: dict[str, Plain] = {"": MATRIX} | ({", sums": VECTOR} if batch == 1 else {})
        runs = {
            kind + way: _stack_run(stack, operators, hidden, batch, settings)
            for kind, stack in kinds.items()
            for way, operators in ways.items()
        }
        flush = rows["weight_bytes"] < 1 << 28
        rows[f"batch {batch}"] = {
            name: figure(
                seconds,
                rates.floor_s(
                    kinds[name.partition(",")[0]].num_bytes(),
                    kinds[name.partition(",")[0]].flops(batch),
                    quant or "bfloat16",
                ),
            )
            for name, seconds in medians(runs, settings, flush=flush).items()
        }
    return rows


_COMPILED: dict[bool, Callable[..., Tensor]] = {}


def _stack_run(stack: Stack, operators: Plain, hidden: int, batch: int, settings: Settings) -> Run:
    stacks.use(stack, operators)
    if operators.vector not in _COMPILED:
        _COMPILED[operators.vector] = stacks.compiled(add_ffn, settings, operators.vector)
    step = _COMPILED[operators.vector]
    x = torch.randn(batch, hidden, device=settings.device, dtype=torch.bfloat16)

    def run() -> Tensor:
        y = x
        for norm, ffn in zip(stack.norms, stack.ffns, strict=True):
            y = step(norm, ffn, hidden, y)
        return y

    return captured(run, settings)
