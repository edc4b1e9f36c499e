"""A decoder that tells hidden states beside its logits, loaded block by block and cut over the ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from builder.architecture import Attention
from builder.checkpoint import Checkpoint
from builder.decoder import Context, Decoder, rope_frequencies, to_tensor
from builder.tensorfile import read_header
from builder.tensors import Expression, Slice, concat
from builder.training.packing import Lengths, PackedContext
from builder.training.processes import Processes


class States(nn.Module):
    """Outputs of `layers`, and the logits, of a Decoder whose layers run one after the other."""

    def __init__(self, decoder: Decoder, layers: Collection[int], *, recompute: bool) -> None:
        super().__init__()
        self.decoder = decoder
        self.layers = frozenset(layers)
        self.recompute = recompute  # activation checkpointing: blocks keep their input alone

    def forward(self, tokens: Tensor, lengths: Lengths | None = None) -> tuple[list[Tensor], Tensor]:
        """[B, T, hidden_size] of each layer asked for, in order, and logits [B, T, vocab_size].

        `lengths` are those of the documents that attention keeps apart; None is one document a sequence.
        """
        decoder = self.decoder
        x = decoder.embedding(tokens)
        context = self._context(tokens, lengths, x.dtype)
        states = []
        for index, block in enumerate(decoder.layers):
            if self.recompute and torch.is_grad_enabled():
                x = cast(Tensor, recomputed(block, x, context, use_reentrant=False))
            else:
                x = block(x, context)
            if index in self.layers:
                states.append(x)
        return states, decoder.lm_head(decoder.norm(x))

    def _context(self, tokens: Tensor, lengths: Lengths | None, dtype: torch.dtype) -> Context:
        frequencies, magnitude = self.decoder.rope_frequencies, self.decoder.architecture.rope.magnitude
        if lengths is not None:
            return PackedContext(lengths, frequencies, dtype, magnitude)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        return Context(positions, frequencies, dtype, magnitude)


def build(
    checkpoint: Checkpoint,
    layers: Collection[int],
    processes: Processes,
    *,
    dtype: torch.dtype,
    trained: bool,
    recompute: bool = False,
) -> States:
    """The model with its weights in `dtype`, on the device; each rank keeps its shard (FSDP2).

    Memory on the way is that of the shard and one block.
    """
    architecture, tensors = checkpoint.architecture, checkpoint.decoder_tensors()
    with torch.device("meta"):
        decoder = Decoder(architecture)
    for index, block in enumerate(decoder.layers):
        _fill(block, f"layers.{index}.", tensors, dtype)
        _place(block, processes, trained)
    for name in ("embedding", "norm", "lm_head"):
        if name != "lm_head" or not architecture.tie_word_embeddings:
            _fill(getattr(decoder, name), f"{name}.", tensors, dtype)
    if architecture.tie_word_embeddings:
        decoder.lm_head.weight = decoder.embedding.weight
    frequencies = rope_frequencies(architecture.rope, architecture.head_dim)
    decoder.rope_frequencies = frequencies.to(processes.device)
    model = States(decoder, layers, recompute=recompute).train(trained)
    _place(model, processes, trained)
    return model


def _fill(module: nn.Module, prefix: str, tensors: Mapping[str, Expression], dtype: torch.dtype) -> None:
    names = [n for n in tensors if n.startswith(prefix)]
    weights = {n.removeprefix(prefix): to_tensor(tensors[n], dtype) for n in names}
    module.load_state_dict(weights, strict=True, assign=True)


def _place(module: nn.Module, processes: Processes, trained: bool) -> None:
    module.to(processes.device)
    module.requires_grad_(trained)
    if processes.mesh is not None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        fully_shard(module, mesh=processes.mesh)
        cut = cast(FSDPModule, module)
        cut.set_gradient_divide_factor(1.0)  # losses are divided by the tokens of all ranks
        cut.set_force_sum_reduction_for_comms(True)


def parameters(model: States) -> dict[str, nn.Parameter]:
    """The weights by `decoder_tensors` name; a tied lm_head is the embedding."""
    return {n.removeprefix("decoder."): x for n, x in model.named_parameters()}


def local(x: Tensor) -> Tensor:
    """This rank's rows of a weight that is cut over the ranks, all of another."""
    from torch.distributed.tensor import DTensor

    return x.to_local() if isinstance(x, DTensor) else x


def write_shard(model: States, file: Path, dtype: str) -> None:
    """This rank's rows of all weights as a safetensors file, in `dtype`."""
    from safetensors.torch import save_file

    kind = getattr(torch, dtype)
    rows = {n: local(x).detach().to("cpu", kind).contiguous() for n, x in parameters(model).items()}
    save_file({n: x for n, x in rows.items() if x.numel()}, file)


def from_shards(student: Checkpoint, files: list[Path]) -> Checkpoint:
    """The student with the weights of every rank's `write_shard`, in the order of ranks; none is read yet."""
    parts: dict[str, list[Expression]] = {}
    for file in files:
        for name, source in read_header(file).items():
            parts.setdefault(name, []).append(source)
    joined = {name: concat(x, 0) for name, x in parts.items()}
    tensors = dict(_separate(student, joined))
    return Checkpoint(
        architecture=student.architecture, tensors=tensors, dtype=student.dtype, digest=student.digest
    )


def _separate(student: Checkpoint, joined: Mapping[str, Expression]) -> Iterator[tuple[str, Expression]]:
    """The inverse of `Checkpoint.decoder_tensors`: q, k and v apart."""
    architecture = student.architecture
    for name, x in joined.items():
        if ".qkv." not in name:
            yield name, x
            continue
        attention = architecture.layers[int(name.split(".")[1])].attention
        assert isinstance(attention, Attention)
        kv_size = attention.num_key_value_heads * architecture.head_dim
        start = 0
        for part, rows in (("q", architecture.q_size), ("k", kv_size), ("v", kv_size)):
            yield name.replace("qkv", part), Slice(x, 0, start, start + rows)
            start += rows
