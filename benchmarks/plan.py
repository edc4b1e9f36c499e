"""The mixed-integer search against greedy selection, by the KL that each plan costs under one latency limit.

    python -m benchmarks.plan [--profile table.json] [--json]

The demo's parent is analysed on its training text. Two spaces are searched: attentions alone, FFNs kept, as
FFN Fusion wants them, and all alternatives. Three ways of greedy selection go until a latency limit is kept:

    shares   layer by layer, the ones with the least mean score first, each gets the alternatives of least
             score that fit into an equal share of the time that is left
    steps    one alternative at a time, the least KL for the time that its part takes less
    fused    the same, the time that the model takes less with its runs fused

Their runs are fused by default, each but its last FFN. The search gets the same limit. All
plans are applied, and KL(parent || child) is measured on held-out text, with 95% intervals by bootstrap over
samples.

Without a table from `ffn-fusion profile` times are estimates for an H100 node at TP 8 of a model with
the demo's layers and Llama 3.1 70B's sizes: a width of 512 costs what 28,672 does there, 4 KV heads what 8
do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean

from torch import Tensor

from benchmarks import machine
from builder import huggingface, tokenizer
from builder.analysis import study
from builder.analysis.record import Data
from builder.architecture import FFN, Architecture, Attention, Linear
from builder.checkpoint import Checkpoint
from builder.evaluation import Estimate, estimate, score, token_windows
from builder.evaluation import Scores as Evaluated
from builder.plan import Plan
from builder.search import gpu, measured
from builder.search.alternatives import Pins, Scores
from builder.search.latency import Costs
from builder.search.program import Solution
from builder.search.proposal import Conditions, Proposal, Search, Targets
from builder.search.roofline import Roofline, estimated
from builder.search.setting import Setting
from builder.surgery.fusion import default_groups
from builder.training import corpus
from builder.training.parent import train_parent

SPEEDUPS = {"attention alone": (1.2, 1.3, 1.4, 1.5, 1.6), "all": (1.3, 1.6)}
CALIBRATION, HELD_OUT, LENGTH = 24, 48, 128
WIDTH, KV_HEADS = 28672 // 512, 2  # of Llama 3.1 70B for one of the demo's


@dataclass(frozen=True)
class Scaled:
    """A large model's costs for the parts of a small one."""

    large: Roofline
    measured: bool = False

    @property
    def source(self) -> str:
        return f"{self.large.source}, of Llama 3.1 70B's sizes"

    def attention(self, part: Attention | Linear | None) -> float:
        if isinstance(part, Attention):
            part = Attention(num_key_value_heads=part.num_key_value_heads * KV_HEADS)
        return self.large.attention(part)

    def ffn(self, part: FFN | Linear | None) -> float:
        if isinstance(part, FFN):
            part = FFN(intermediate_size=part.intermediate_size * WIDTH)
        return self.large.ffn(part)

    def outside(self) -> float:
        return self.large.outside()


def costs_like_70b(demo: Architecture) -> Scaled:
    """Estimates for 8 H100, FP8, one sequence of 2048 tokens."""
    sizes = {"hidden_size": 8192, "num_attention_heads": 64, "head_dim": 128, "vocab_size": 128256}
    layers = tuple(
        replace(x, attention=Attention(num_key_value_heads=8), ffn=FFN(intermediate_size=28672))
        for x in demo.layers
    )
    large = replace(demo, **sizes, layers=layers, tie_word_embeddings=False)
    return Scaled(estimated(large, Setting(gpu=gpu.named("h100"), tp_size=8)))


Choice = tuple[int, ...]  # options of all attentions, then of all FFNs


def by_shares(search: Search, seconds: float) -> Proposal | None:
    """Each layer within an equal share of what is left, the most replaceable first."""
    layers, costs = search.space.layers, search.conditions.costs
    left = seconds - costs.outside()
    means = [fmean(x.kl or 0.0 for x in (*y.attention, *y.ffn)) for y in layers]
    chosen: dict[int, tuple[int, int]] = {}
    for done, index in enumerate(sorted(range(len(layers)), key=means.__getitem__)):
        layer, share = layers[index], left / (len(layers) - done)
        pairs = [
            ((x.kl or 0.0) + (y.kl or 0.0), costs.attention(x.part) + costs.ffn(y.part), (i, j))
            for i, x in enumerate(layer.attention)
            for j, y in enumerate(layer.ffn)
        ]
        fitting = [x for x in pairs if x[1] <= share] or [min(pairs, key=lambda x: x[1])]
        _, taken, chosen[index] = min(fitting)
        left -= taken
    choice = tuple(chosen[i][part] for part in (0, 1) for i in range(len(layers)))
    missed = seconds_of(search, choice) > seconds or not architecture_of(search, choice).num_attention_layers
    return None if missed else search.proposal(solution_of(search, choice))


def by_steps(search: Search, seconds: float, *, fused: bool) -> Proposal | None:
    """The cheapest step for the time it saves, again and again, until `seconds` are reached."""
    options = [x.attention for x in search.space.layers] + [x.ffn for x in search.space.layers]
    choice: Choice = (0,) * len(options)
    while (now := seconds_of(search, choice)) > seconds:
        before = now if fused else seconds_of(search, choice, fused=False)
        prices = []
        for slot, place in steps(search, choice):
            trial = (*choice[:slot], place, *choice[slot + 1 :])
            cost = (options[slot][place].kl or 0.0) - (options[slot][choice[slot]].kl or 0.0)
            saved = before - seconds_of(search, trial, fused=fused)
            if saved > 0:
                prices.append((cost / saved, trial))
        if not prices:
            return None
        choice = min(prices)[1]
    return search.proposal(solution_of(search, choice))


def steps(search: Search, choice: Choice) -> Iterator[tuple[int, int]]:
    """(slot, option) of every single step to something smaller that leaves some attention."""
    options = [x.attention for x in search.space.layers] + [x.ffn for x in search.space.layers]
    for slot, place in enumerate(choice):
        for other in range(place + 1, len(options[slot])):
            trial = (*choice[:slot], other, *choice[slot + 1 :])
            if architecture_of(search, trial).num_attention_layers:
                yield slot, other


GREEDY: dict[str, Callable[[Search, float], Proposal | None]] = {
    "shares": by_shares,
    "steps": partial(by_steps, fused=False),
    "fused": partial(by_steps, fused=True),
}


def architecture_of(search: Search, choice: Choice) -> Architecture:
    """With these options, nothing fused yet."""
    half = len(choice) // 2
    return search.space.with_parts(choice[:half], choice[half:])


def seconds_of(search: Search, choice: Choice, *, fused: bool = True) -> float:
    """Of a decode step, with every run fused but its last FFN, or with nothing fused."""
    architecture, costs = architecture_of(search, choice), search.conditions.costs
    layers, widths = architecture.layers, [x.intermediate_size for x in architecture.layers]
    total = costs.outside() + sum(costs.attention(x.attention) + costs.ffn(x.ffn) for x in layers)
    for first, last in default_groups(architecture) if fused else ():
        members = [w for w in widths[first : last + 1] if w]
        total += costs.ffn(FFN(intermediate_size=sum(members)))
        total -= sum(costs.ffn(FFN(intermediate_size=w)) for w in members)
    return total


def solution_of(search: Search, choice: Choice) -> Solution:
    """The choice as the search's program would have said it."""
    architecture, half = architecture_of(search, choice), len(choice) // 2
    fused = {i for first, last in default_groups(architecture) for i in range(first + 1, last + 1)}
    return Solution(
        attention=choice[:half],
        ffn=choice[half:],
        fused=tuple(i in fused and not x.empty for i, x in enumerate(architecture.layers)),
        seconds=seconds_of(search, choice),
        bytes=0.0,
        kl=0.0,
    )


def analysed(model: Path, checkpoint: Checkpoint) -> Scores:
    """Scores of the parent on its training text."""
    encoder = tokenizer.load(model)
    ids = encoder.encode("".join(corpus.training_text()[:40])).ids
    samples = token_windows(ids, LENGTH - 1, CALIBRATION)
    data = Data(files=("training text",), samples=len(samples), length=LENGTH, seed=0, tokens=samples.numel())
    return Scores.of(*study.analyze(checkpoint, samples, data, Plan(), study.Settings()))


def conditions(checkpoint: Checkpoint, table: Path | None) -> Conditions:
    costs: Costs = costs_like_70b(checkpoint.architecture)
    widest = None
    if table is not None:
        costs = measured.read(table)
        costs.check(checkpoint.architecture)
        widest = costs.widest
    return Conditions(
        costs=costs, memory=lambda x: x.num_parameters, tp_size=1, kv_element_bytes=2, widest=widest
    )


def compare(
    search: Search, greedy: str, speedup: float, evaluate: Callable[[Proposal], Evaluated]
) -> dict | None:
    """Both ways under one limit, None where greedy selection does not come to it."""
    one = GREEDY[greedy](search, search.now.seconds / speedup)
    if one is None:
        return None
    (other,) = search.propose(Targets(speedup=speedup))
    true = {name: evaluate(x) for name, x in (("greedy", one), ("program", other))}
    kl = {name: x.kl / x.places for name, x in true.items() if x.kl is not None}
    return {
        "greedy_by": greedy,
        "target": speedup,
        **{name: row(x, estimate(kl[name])) for name, x in (("greedy", one), ("program", other))},
        "less_kl": interval(estimate(kl["greedy"] - kl["program"])),
    }


def row(proposal: Proposal, kl: Estimate) -> dict:
    plan = proposal.plan.to_dict()
    for name in ("model", "norm"):
        plan.pop(name)
    plan.get("ffn_channels", {}).update({i: len(x) for i, x in proposal.plan.ffn_channels})
    return {
        "ms": round(proposal.figures.seconds * 1e3, 4),
        "score": round(proposal.kl, 4) if proposal.kl is not None else None,
        "kl": interval(kl),
        "plan": plan,
    }


def interval(x: Estimate) -> list[float | None]:
    """Mean and 95% interval."""
    return [None if value is None else round(value, 4) for value in (x.value, x.low, x.high)]


def measure(table: Path | None = None) -> dict:
    """Rows by what may change, and by target."""
    model = train_parent()
    checkpoint = huggingface.read(model)
    scores, where = analysed(model, checkpoint), conditions(checkpoint, table)
    ids = tokenizer.load(model).encode(corpus.held_out_text()).ids
    samples: Tensor = token_windows(ids, LENGTH, HELD_OUT)
    every_ffn = frozenset(range(len(checkpoint.architecture.layers)))
    rows = []
    for name, pins in (("attention alone", Pins(keep_ffn=every_ffn)), ("all", Pins())):
        search = Search(checkpoint, where, scores, pins)
        for speedup, way in product(SPEEDUPS[name], GREEDY):
            found = compare(
                search, way, speedup, lambda x: score(x.plan.apply(checkpoint), samples, checkpoint)
            )
            rows += [] if found is None else [{"may_change": name, **found}]
    return {
        "machine": machine.describe("torch", "scipy"),
        "costs": where.costs.source,
        "parent_ms": round(search.now.seconds * 1e3, 4),
        "held_out": list(samples.shape),
        "rows": rows,
    }


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", type=Path, help="a table of `ffn-fusion profile` of the demo's parent")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options.profile)
    if options.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return
    sys.stdout.write(f"{result['costs']}; the parent takes {result['parent_ms']} ms\n")
    for x in result["rows"]:
        sys.stdout.write(
            f"\n{x['target']} times as fast, {x['may_change']} may change, greedy by {x['greedy_by']}\n"
        )
        for name in ("greedy", "program"):
            kl, low, high = x[name]["kl"]
            line = f"  {name:8} {x[name]['ms']:8.3f} ms  KL {kl:.4f} [{low:.4f}, {high:.4f}]"
            sys.stdout.write(f"{line}  scores add up to {x[name]['score']:.4f}\n")
        less, low, high = x["less_kl"]
        sys.stdout.write(f"  the program's KL is {less:.4f} less [{low:.4f}, {high:.4f}]\n")


if __name__ == "__main__":
    main()
