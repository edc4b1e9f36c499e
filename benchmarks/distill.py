"""What distillation recovers: FFNs fused or removed at one latency, each before and after it.

    python -m benchmarks.distill [--tokens N] [--json]

The demo's parent loses the attention of a run of layers. Then the run's FFNs are fused, all but its last, or
so many of them removed that a step takes no longer than the fused model's: those go first that alone cost
the least KL on training text. Both are distilled from the parent on its training text, with the same
settings, seed and tokens. All are measured on held-out text, with 95% intervals by bootstrap over samples;
the two distilled models also sample by sample, for their difference.

The latency that must be equal is an estimate: for an H100 node at TP 8 of a model with the demo's layers and
Llama 3.1 70B's sizes, as benchmarks/plan.py has them. Beside it stands what the embedded engine measures
for the demo's own sizes on this machine at TP 2, a token at batch 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from torch import Tensor

from benchmarks import machine
from benchmarks.plan import costs_like_70b
from builder import export, huggingface, manifest, tokenizer, trtllm
from builder.checkpoint import Checkpoint
from builder.evaluation import Evaluation, estimate, score, summarize, token_windows
from builder.plan import Plan
from builder.search.latency import step_seconds
from builder.training import corpus
from builder.training.distillation import Job, distill
from builder.training.parent import train_parent
from builder.training.stages import Stage
from builder.training.trainer import Settings
from engines.embedded.compilation import build
from engines.embedded.session import Request, Session

RUN = tuple(range(8, 16))  # layers that lose their attention
CALIBRATION, HELD_OUT, LENGTH = 24, 128, 128
TOKENS, CONTEXT, SEQUENCES = 900_000, 128, 16
LEARNING_RATE = 1e-3
DOCUMENTS = 400  # of the training text
TP_SIZE, ROUNDS, DECODED = 2, 12, 100


def removed(parent: Checkpoint, samples: Tensor, seconds: float) -> Plan:
    """The fewest FFNs of the run, those that cost the least KL alone first, until `seconds` are kept."""
    costs = costs_like_70b(parent.architecture)
    kept = Plan(drop_attention=RUN, fuse=())
    lost = {}
    for index in RUN:
        child = Plan(drop_attention=RUN, drop_ffn=(index,), fuse=()).apply(parent)
        found = score(child, samples, parent)
        assert found.kl is not None
        lost[index] = float(found.kl.mean())
    order = sorted(lost, key=lost.__getitem__)
    for count in range(1, len(order) + 1):
        kept = Plan(drop_attention=RUN, drop_ffn=tuple(sorted(order[:count])), fuse=())
        if step_seconds(kept.apply(parent).architecture, costs) <= seconds:
            break
    return kept


def write(plan: Plan, parent: Checkpoint, source: Path, output: Path) -> Path:
    """As `ffn-fusion fuse` does."""
    child = plan.apply(parent)
    layers = manifest.layer_mapping(child.architecture, len(parent.architecture.layers))
    export.write(child, source, output, facts={"plan": plan.to_dict(), "layers": layers})
    return output


def distilled(parent: Path, student: Path, text: Path, tokens: int) -> tuple[Path, dict]:
    """The student after its training, and what that told."""
    output = student.with_name(f"{student.name}-distilled")
    stage = Stage(
        tokens=tokens,
        context=CONTEXT,
        batch_tokens=CONTEXT * SEQUENCES,
        learning_rate=LEARNING_RATE,
        data=(str(text),),
    )
    job = Job(
        parent=parent,
        student=student,
        output=output,
        stages=(stage,),
        settings=Settings(micro_batch=SEQUENCES),
        checkpoint_dir=output.with_suffix(".training"),
        log=output.with_suffix(".jsonl"),
    )
    begin, worked = time.monotonic(), time.process_time()
    told = distill(job)
    return output, {
        "seconds": round(time.monotonic() - begin, 1),
        "cpu_seconds": round(time.process_time() - worked, 1),
        "tokens": told["tokens"],
        "steps": told["steps"],
    }


def figures(found: Evaluation) -> dict:
    return {
        name: None if x is None else [round(v, 4) for v in (x.value, x.low, x.high) if v is not None]
        for name, x in (("perplexity", found.perplexity), ("kl", found.kl), ("top1", found.top1))
    }


def decode_ms(models: dict[str, Path], scratch: Path) -> dict[str, float]:
    """Milliseconds a token at batch 1 on the embedded engine, medians of interleaved rounds."""
    engines = {}
    for name, model in models.items():
        checkpoint = scratch / f"{name}-checkpoint".replace(" ", "-")
        engines[name] = checkpoint.with_name(f"{checkpoint.name}-engine")
        trtllm.convert(huggingface.read(model), checkpoint, tp_size=TP_SIZE)
        build(checkpoint, engines[name], max_batch_size=1, max_input_len=64, max_seq_len=256)
    taken: dict[str, list[float]] = {name: [] for name in engines}
    request = Request(input_ids=tuple(range(20, 52)), max_tokens=DECODED)
    with ExitStack() as stack:
        sessions = {name: stack.enter_context(Session(engine)) for name, engine in engines.items()}
        for round_ in range(ROUNDS + 1):
            for name, session in sessions.items():
                times = [time.perf_counter() for _ in session.generate(request)]
                if round_:
                    taken[name].append((times[-1] - times[0]) / (len(times) - 1) * 1e3)
    return {name: float(np.median(x)) for name, x in taken.items()}


def measure(tokens: int) -> dict:
    """Rows by model."""
    parent_dir = train_parent()
    parent = huggingface.read(parent_dir)
    encoder = tokenizer.load(parent_dir)
    held_out = token_windows(encoder.encode(corpus.held_out_text()).ids, LENGTH, HELD_OUT)
    training = corpus.training_text()
    calibration = token_windows(encoder.encode("".join(training[:40])).ids, LENGTH, CALIBRATION)
    costs = costs_like_70b(parent.architecture)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        text = directory / "text.jsonl"
        chosen = training[:: max(1, len(training) // DOCUMENTS)]
        text.write_text("".join(json.dumps({"text": x}) + "\n" for x in chosen), encoding="utf-8")
        fused = Plan(drop_attention=RUN)
        limit = step_seconds(fused.apply(parent).architecture, costs)
        plans = {
            "attention dropped": Plan(drop_attention=RUN, fuse=()),
            "fused": fused,
            "FFNs removed": removed(parent, calibration, limit),
        }
        models, trainings = {"parent": parent_dir}, {}
        for name, plan in plans.items():
            models[name] = write(plan, parent, parent_dir, directory / name.replace(" ", "-"))
        for name in ("fused", "FFNs removed"):
            told = distilled(parent_dir, models[name], text, tokens)
            models[f"{name}, distilled"], trainings[name] = told
        measured = decode_ms({name: models[name] for name in ("parent", *plans)}, directory)
        rows, kl = {}, {}
        for name, where in models.items():
            checkpoint = huggingface.read(where)
            scores = score(checkpoint, held_out, parent)
            assert scores.kl is not None
            kl[name] = scores.kl / scores.places
            ms = step_seconds(checkpoint.architecture, costs) * 1e3
            rows[name] = {
                "layers": len(checkpoint.architecture.layers),
                "estimated_ms": round(ms, 4),
                "measured_ms": round(measured[name.removesuffix(", distilled")], 4),
                **figures(summarize(scores)),
            }
    gained = estimate(kl["FFNs removed, distilled"] - kl["fused, distilled"])
    recovered = {
        name: round(1 - rows[f"{name}, distilled"]["kl"][0] / rows[name]["kl"][0], 4)
        for name in ("fused", "FFNs removed")
    }
    return {
        "machine": machine.describe("torch"),
        "latency": f"estimated: {costs.source}",
        "plans": {name: plan.to_dict() for name, plan in plans.items()},
        "training": {"learning_rate": LEARNING_RATE, "context": CONTEXT, "sequences": SEQUENCES, **trainings},
        "held_out": list(held_out.shape),
        "rows": rows,
        "recovered": recovered,
        "kl_removed_minus_fused": [gained.value, gained.low, gained.high],
    }


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each distillation")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options.tokens)
    if options.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return
    sys.stdout.write(f"latency {result['latency']}\n")
    sys.stdout.write(
        f"{'':26}{'estimated':>10}{'measured':>10}{'perplexity':>12}{'KL to the parent':>28}{'top-1':>8}\n"
    )
    for name, row in result["rows"].items():
        kl, low, high = row["kl"]
        told = f"{kl:.4f} [{low:.4f}, {high:.4f}]"
        sys.stdout.write(
            f"{name:26}{row['estimated_ms']:10.3f}{row['measured_ms']:10.3f}{row['perplexity'][0]:12.3f}"
            f"{told:>28}{row['top1'][0]:8.1%}\n"
        )
    for name, share in result["recovered"].items():
        training = result["training"][name]
        sys.stdout.write(f"{name}: {share:.1%} of the lost KL recovered in {training['seconds']} s\n")
    value, low, high = result["kl_removed_minus_fused"]
    sys.stdout.write(f"KL of removed minus fused, distilled: {value:.5f} [{low:.5f}, {high:.5f}]\n")


if __name__ == "__main__":
    main()
