"""inspect: what a model is made of."""

from __future__ import annotations

from pathlib import Path

import click

from builder.options import DIRECTORY, JSON, emit


@click.command()
@click.argument("model", type=DIRECTORY)
@click.option(
    "--tp", "tp_size", type=click.IntRange(1), default=8, show_default=True, help="Ranks to count for."
)
@click.option(
    "--kv-dtype",
    type=click.Choice(["float32", "bfloat16", "fp8"]),
    default="bfloat16",
    show_default=True,
    help="KV-cache elements to count.",
)
@JSON
def inspect(model: Path, tp_size: int, kv_dtype: str, as_json: bool) -> None:
    """Layers, widths, attention-free runs and costs of MODEL, a directory or a bare config.json.

    \b
    Example:
        ffn-fusion inspect Llama-3.1-8B --tp 8
    """
    from builder import huggingface

    architecture = huggingface.read_architecture(model)
    counts = architecture.counts(tp_size, {"float32": 4, "bfloat16": 2, "fp8": 1}[kv_dtype])
    runs = ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in counts["attention_free_runs"]) or "none"
    widths = ", ".join(f"{w:,}" for w in counts["ffn_widths"])
    text = "\n".join(
        (
            f"layers               {counts['layers']} ({counts['attention_layers']} with attention)",
            f"hidden size          {architecture.hidden_size:,}",
            f"heads                {architecture.num_attention_heads} x {architecture.head_dim}",
            f"FFN widths           {widths}",
            f"attention-free runs  {runs}",
            f"parameters           {counts['parameters']:,}",
            f"KV cache per token   {counts['kv_bytes_per_token']:,} bytes ({kv_dtype})",
            f"all-reduces          {counts['all_reduces_per_token']} per token at TP {tp_size}",
        )
    )
    emit({"model": str(model), **counts}, as_json, text)
