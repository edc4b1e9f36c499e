"""Layers of the engine's own module with random weights, and a decode step through them.

A fused run and its sequential layers share gate and up: those of a member are rows of the fused ones. Down
is cut by columns, so members have their own: a strided matrix would be another product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.h200.gpu import Run, Settings, captured
from builder.architecture import FFN, Architecture, Layer
from builder.decoder import RMSNorm, alone
from engines.embedded.model import (
    Block,
    EngineDecoder,
    FeedForward,
    Numbers,
    SelfAttention,
    new_cache,
)
from engines.embedded.operators import Rotation
from engines.embedded.plain import Plain
from engines.embedded.step import BLOCK_SIZE, num_blocks


def numbers(quant: str | None, vector: bool = False) -> Numbers:
    """As the engine keeps them on CUDA."""
    return Numbers(dtype=torch.bfloat16, quant=quant, operators=Plain(vector=vector))


def without_attention(architecture: Architecture, dropped: range) -> Architecture:
    """`dropped` layers keep only their FFN."""
    layers = enumerate(architecture.layers)
    return replace(
        architecture, layers=tuple(replace(x, attention=None) if i in dropped else x for i, x in layers)
    )


def fused(architecture: Architecture, groups: Sequence[tuple[int, int]]) -> Architecture:
    """Each group first..last as one layer of their widths' sum."""
    layers: list[Layer] = []
    for index, layer in enumerate(architecture.layers):
        group = next((g for g in groups if g[0] <= index <= g[1]), None)
        if group is None:
            layers.append(layer)
        elif index == group[1]:
            members = architecture.layers[group[0] : group[1] + 1]
            width = sum(x.intermediate_size for x in members)
            layers.append(replace(layer, attention=None, ffn=FFN(intermediate_size=width)))
    return replace(architecture, layers=tuple(layers))


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder whose layers may be shared with other models."""

    architecture: Architecture
    decoder: EngineDecoder

    def weight_bytes(self) -> int:
        """What a step reads: all weights but the embedding's unused rows."""
        held = self.decoder.named_parameters(remove_duplicate=False)
        return sum(x.nbytes for name, x in held if not name.startswith("embedding."))

    def flops(self, batch: int) -> int:
        """Of the matrix products of a step."""
        return batch * self.architecture.flops_per_token()

    def kv_bytes(self, batch: int, context: int) -> int:
        return batch * context * self.architecture.kv_cache_bytes_per_token(2)


def random_model(architecture: Architecture, settings: Settings, quant: str | None = None) -> Model:
    """All weights made on the device."""
    with torch.device("meta"):
        decoder = EngineDecoder(architecture, numbers(quant), alone)
    decoder.to_empty(device=settings.device)
    for name, x in (*decoder.named_parameters(), *decoder.named_buffers()):
        _fill(name, x)
    return Model(architecture=architecture, decoder=decoder)


def _fill(name: str, x: Tensor) -> None:
    """Numbers of a trained model's size, so that nothing overflows."""
    if "norm" in name or "rope" in name or name.endswith("scale"):
        x.data.uniform_(0.5, 1.5).mul_(1e-4 if name.endswith("scale") else 1)
    elif x.dtype == torch.float8_e4m3fn:
        for band in x.data.split(4096):  # random numbers come wider than they are kept
            band.copy_(torch.randn(band.shape, device=x.device, dtype=torch.bfloat16) * 64)
    else:
        x.data.normal_(std=0.02)


def variant(parent: Model, architecture: Architecture, sources: Sequence[int]) -> Model:
    """`architecture`, whose layer i has what the parent's layer `sources[i]` has of it; the rest is new."""
    with torch.device("meta"):
        decoder = EngineDecoder(architecture, numbers(None), alone)
    for name in ("embedding", "norm", "lm_head", "rope_frequencies"):
        setattr(decoder, name, getattr(parent.decoder, name))
    for block, source in zip(decoder.layers, sources, strict=True):
        for name, _ in list(block.named_children()):
            shared = getattr(parent.decoder.layers[source], name, None)
            setattr(block, name, _new(getattr(block, name), parent) if shared is None else shared)
    return Model(architecture=architecture, decoder=decoder)


def _new(module: nn.Module, parent: Model) -> nn.Module:
    """With random weights, beside the parent's."""
    module.to_empty(device=parent.decoder.rope_frequencies.device)
    for name, x in module.named_parameters():
        _fill("norm" if isinstance(module, RMSNorm) else name, x)
    return module


def sequential(whole: Model, architecture: Architecture, groups: Sequence[tuple[int, int]]) -> Model:
    """The model that `whole` is the fused form of, with `architecture`'s layers."""
    sources = []
    for index, layer in enumerate(fused_members(len(architecture.layers), groups)):
        sources += [index] * len(layer)
    model = variant(whole, architecture, sources)
    for first, last in groups:
        _cut(list(model.decoder.layers)[first : last + 1], architecture, first)
    return model


def fused_members(count: int, groups: Sequence[tuple[int, int]]) -> list[range]:
    """The layers that each layer of the fused model holds."""
    starts = dict(groups)
    result, index = [], 0
    while index < count:
        last = starts.get(index, index)
        result.append(range(index, last + 1))
        index = last + 1
    return result


def _cut(blocks: Sequence[nn.Module], architecture: Architecture, first: int) -> None:
    """Give each member its rows of the fused gate and up, and a down of its own."""
    row = 0
    for offset, block in enumerate(blocks):
        assert isinstance(block, Block)
        assert isinstance(block.ffn, FeedForward)
        whole, width = block.ffn, architecture.layers[first + offset].intermediate_size
        with torch.device("meta"):
            member = FeedForward(architecture.hidden_size, FFN(intermediate_size=width), numbers(None))
        for name in ("gate", "up"):
            rows = getattr(whole, name).weight.data[row : row + width]
            getattr(member, name).weight = nn.Parameter(rows, requires_grad=False)
        down = torch.empty_like(member.down.weight, device=rows.device)
        _fill("down", down)
        member.down.weight = nn.Parameter(down, requires_grad=False)
        block.ffn, row = member, row + width


def use(module: nn.Module, operators: Plain) -> None:
    """Let all modules below compute with `operators`."""
    for part in module.modules():
        if hasattr(part, "operators"):
            setattr(part, "operators", operators)  # noqa: B010  no module declares it to the type checker


def begin(decoder: EngineDecoder, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, and cosines and sines of the angles."""
    angles = decoder.rotation(positions)
    return decoder.embedding(tokens), angles.cos, angles.sin


def layer(
    block: Block,
    hidden_size: int,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    pair: Sequence[Tensor],
    tables: Tensor,
    positions: Tensor,
) -> Tensor:
    """One layer of a decode step."""
    assert x.shape[1] == hidden_size, "a number to the compiler, even where weights' sizes are not"

    def attend(attention: SelfAttention, h: Tensor) -> Tensor:
        return attention.decode(h, Rotation(cos=cos, sin=sin), list(pair), tables, positions)

    return block(x, attend)


def end(decoder: EngineDecoder, x: Tensor) -> Tensor:
    """Logits."""
    return decoder.lm_head(decoder.norm(x), True)


VECTOR, MATRIX = Plain(vector=True), Plain(vector=False)


def compiled(part: Callable[..., Any], settings: Settings, vector: bool) -> Callable[..., Any]:
    """For batch 1 and each width by itself with `vector`, else for any; on the CPU traced, not compiled."""
    options: dict[str, Any] = {"dynamic": not vector, "fullgraph": True}
    if not settings.cuda:
        options["backend"] = "aot_eager"
    elif vector:
        options["options"] = {"coordinate_descent_tuning": True}
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    torch._dynamo.config.force_parameter_static_shapes = False
    return torch.compile(part, **options)


class Steps:
    """The parts of a decode step, each compiled once for its kind and used by all models.

    With `vector` for batch 1 and each width by itself, as the engine's decode1, else for any.
    """

    def __init__(self, settings: Settings, vector: bool) -> None:
        self._settings, self.operators = settings, VECTOR if vector else MATRIX
        self.begin, self.layer, self.end = (compiled(part, settings, vector) for part in (begin, layer, end))

    def decode(self, model: Model, cache: list[Tensor], batch: int, context: int) -> Run:
        """A decode step of `batch` requests of `context` tokens each, as a CUDA graph."""
        use(model.decoder, self.operators)
        decoder, device, size = model.decoder, self._settings.device, model.architecture.hidden_size
        width = num_blocks(context)
        tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        positions = torch.full((batch,), context - 1, dtype=torch.int64, device=device)
        tables = torch.arange(batch * width, device=device).view(batch, width)

        def run() -> Tensor:
            x, cos, sin = self.begin(decoder, tokens, positions)
            used = 0
            for block in decoder.layers:
                pair: Sequence[Tensor] = ()
                if isinstance(block.attention, SelfAttention):
                    pair, used = cache[used : used + 2], used + 2
                x = self.layer(block, size, x, cos, sin, pair, tables, positions)
            return self.end(decoder, x)

        return captured(run, self._settings)


def new_pool(architecture: Architecture, batch: int, context: int, settings: Settings) -> list[Tensor]:
    """Blocks for the largest step; layers of as many KV heads are alike."""
    assert context % BLOCK_SIZE == 0, "whole blocks"
    pool = new_cache(architecture, batch * num_blocks(context), torch.bfloat16, settings.device)
    for x in pool:
        torch._dynamo.mark_static(x)
    return pool
