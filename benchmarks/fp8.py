"""What FP8 weights cost in quality on the demo's parent model.

    python -m benchmarks.fp8 [--json]

The parent is trained on the spot, or taken from the demo's cache; scales are calibrated on its training
corpus and perplexity is measured on held-out text, of the bfloat16 model and of the FP8 checkpoint
dequantised to bfloat16.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks import machine
from builder import calibration, huggingface, quantization, tokenizer, trtllm
from builder.checkpoint import Checkpoint
from builder.evaluation import logits_of, quality, token_windows
from builder.plan import Plan
from builder.training import corpus
from builder.training.parent import train_parent
from triton_repo.demo import DROPPED

CALIBRATION, LENGTH, COUNT = 128, 128, 96


def perplexities(checkpoint: Checkpoint, calibration_ids: list[int], ids: list[int]) -> dict:
    """Of a checkpoint in bfloat16 and of its FP8 form, on the same windows."""
    whole = trtllm.prepare(checkpoint, 1, 1, "bfloat16")
    seen = calibration.calibrate(whole, token_windows(calibration_ids, LENGTH - 1, CALIBRATION))
    quantized = quantization.quantize(whole, seen, kv_cache=True)
    windows = token_windows(ids, LENGTH, COUNT)
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "fp8"
        trtllm.convert(checkpoint, output, dtype="bfloat16", quantized=quantized)
        restored = trtllm.read(output).rank(0)
        before, after = (quality(logits_of(x, windows), windows).perplexity for x in (whole, restored))
    return {"bfloat16": round(before, 3), "fp8": round(after, 3), "ratio": round(after / before, 4)}


def measure() -> dict:
    """The parent, and the parent fused as the demo fuses it."""
    model = train_parent()
    encoder = tokenizer.load(model)
    ids = encoder.encode(corpus.held_out_text()).ids
    calibration_ids = encoder.encode("".join(corpus.training_text()[:40])).ids
    parent = huggingface.read(model)
    checkpoints = {"parent": parent, "fused": Plan(drop_attention=DROPPED).apply(parent)}
    rows = {n: perplexities(x, calibration_ids, ids) for n, x in checkpoints.items()}
    return {"machine": machine.describe("torch"), "windows": [COUNT, LENGTH], "perplexity": rows}


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    result = measure()
    if parser.parse_args().json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return
    for name, row in result["perplexity"].items():
        sys.stdout.write(
            f"{name:8} bfloat16 {row['bfloat16']:8.3f}  fp8 {row['fp8']:8.3f}  x {row['ratio']}\n"
        )


if __name__ == "__main__":
    main()
