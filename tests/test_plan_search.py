"""The mixed-integer search against enumeration, and the `plan` command."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import random_checkpoint, write_llama
from safetensors.numpy import save_file

from builder import huggingface
from builder import plan as plans
from builder.architecture import FFN, Architecture, Attention, Layer, Linear
from builder.cli.fuse import fuse as fuse_command
from builder.cli.plan import plan as plan_command
from builder.errors import UserError
from builder.plan import Plan
from builder.rope import Rope
from builder.search.alternatives import Pins, Scores, space
from builder.search.program import Program
from builder.search.proposal import Conditions, Search, Targets
from builder.trtllm.conversion import MAX_ELEMENTS, check_elements
from ffn_fusion import OneLineErrors

SUPER_49B = Path(__file__).parent / "data" / "nemotron_super_49b_config.json"
WIDTH, KV = 32, 4
COMMANDS = OneLineErrors(commands={"plan": plan_command, "fuse": fuse_command})


@dataclass(frozen=True)
class Affine:
    """Seconds that are affine in KV heads and width, as the program takes them to be."""

    measured: bool = False
    source: str = "a stub"
    per_ffn: float = 2.0

    def attention(self, part: Attention | Linear | None) -> float:
        if isinstance(part, Attention):
            return 3 + 0.25 * part.num_key_value_heads
        return 0.0 if part is None else 1.5

    def ffn(self, part: FFN | Linear | None) -> float:
        if isinstance(part, FFN):
            return self.per_ffn + part.intermediate_size / 16
        return 0.0 if part is None else 1.5

    def outside(self) -> float:
        return 5.0


def toy(num_layers: int) -> Architecture:
    layers = (
        Layer(attention=Attention(num_key_value_heads=KV), ffn=FFN(intermediate_size=WIDTH), members=(index,))
        for index in range(num_layers)
    )
    return Architecture(
        hidden_size=16,
        num_attention_heads=4,
        head_dim=4,
        vocab_size=32,
        max_position_embeddings=64,
        norm_eps=1e-5,
        rope=Rope(theta=1e4),
        tie_word_embeddings=True,
        layers=tuple(layers),
    )


def random_scores(num_layers: int, heads: tuple[int, ...], widths: tuple[int, ...], seed: int) -> Scores:
    rng = np.random.default_rng(seed)
    sizes = [*(("attention", n) for n in heads), *(("ffn", n) for n in widths)]
    return Scores(
        alternatives={
            (layer, part, size): float(rng.uniform(0.01, 1))
            for layer in range(num_layers)
            for part, size in sizes
        },
        fusing={layer: tuple(rng.uniform(0, 0.2, layer)) for layer in range(1, num_layers)},
        channels={layer: rng.uniform(size=WIDTH) for layer in range(num_layers)},
    )


def parameters(architecture: Architecture) -> float:
    return float(architecture.num_parameters)


@dataclass(frozen=True)
class Candidate:
    """One of all models there can be: KV heads and width per layer (0 is none), and its fused runs."""

    heads: tuple[int, ...]
    widths: tuple[int, ...]
    fused: tuple[tuple[int, ...], ...]
    kl: float
    seconds: float
    weights: float


def partitions(members: list[int]) -> Iterator[list[list[int]]]:
    """Every way to cut a list into neighbouring pieces."""
    for cuts in itertools.product((False, True), repeat=max(0, len(members) - 1)):
        pieces = [members[:1]]
        for member, cut in zip(members[1:], cuts, strict=True):
            if cut:
                pieces.append([member])
            else:
                pieces[-1].append(member)
        yield pieces


def lone_runs(heads: tuple[int, ...], widths: tuple[int, ...]) -> list[list[int]]:
    """FFNs with no attention between them, each without its last one."""
    text = "".join("A" if h else "F" if w else "." for h, w in zip(heads, widths, strict=True))
    runs = [[i for i in range(*m.span()) if text[i] == "F"] for m in re.finditer(r"[F.]+", text)]
    return [run[:-1] for run in runs if len(run) > 2]


def every_model(
    num_layers: int,
    heads: tuple[int, ...],
    widths: tuple[int, ...],
    scores: Scores,
    max_width: int,
    costs: Affine,
) -> Iterator[Candidate]:
    """Enumeration, with costs counted from the numbers alone."""
    size, base = 16, parameters(replace(toy(1), layers=()))
    per_layer = list(itertools.product((KV, *heads), (WIDTH, *widths)))
    for chosen in itertools.product(per_layer, repeat=num_layers):
        hs, ws = tuple(h for h, _ in chosen), tuple(w for _, w in chosen)
        if not any(hs):
            continue
        kl = sum(scores.alternatives[i, "attention", h] for i, h in enumerate(hs) if h != KV)
        kl += sum(scores.alternatives[i, "ffn", w] for i, w in enumerate(ws) if w != WIDTH)
        seconds = 5 + sum(3 + 0.25 * h for h in hs if h)
        seconds += sum(costs.per_ffn + w / 16 for w in ws if w)
        weights = base + sum((size + size * 16 * 2 + 2 * size * 4 * h) for h in hs if h)
        weights += sum(size + 3 * size * w for w in ws if w)
        runs = lone_runs(hs, ws)
        for pieces in itertools.product(*(list(partitions(run)) for run in runs)):
            groups = tuple(tuple(g) for run in pieces for g in run if len(g) > 1)
            if any(sum(ws[i] for i in g) > max_width for g in groups):
                continue
            fusing = sum(sum(scores.fusing[i][: i - g[0]]) for g in groups for i in g[1:])
            saved = costs.per_ffn * sum(len(g) - 1 for g in groups)
            yield Candidate(hs, ws, groups, kl + fusing, seconds - saved, weights)


def conditions(**values: object) -> Conditions:
    return Conditions(
        **{"costs": Affine(), "memory": parameters, "tp_size": 1, "kv_element_bytes": 2, **values}  # type: ignore[arg-type]
    )


def least(candidates: list[Candidate], key: str, **limits: float) -> float | None:
    kept = [x for x in candidates if all(getattr(x, n) <= bound + 1e-9 for n, bound in limits.items())]
    return min((getattr(x, key) for x in kept), default=None)


INSTANCES = [
    (4, (2, 0), (16, 0), 10_000, 0),
    (4, (2, 0), (16, 0), 10_000, 1),
    (5, (0,), (0,), 10_000, 2),
    (5, (0,), (16,), 80, 3),
    (6, (0,), (), 64, 4),
    (6, (0,), (0,), 64, 5),
]


@pytest.mark.parametrize(("num_layers", "heads", "widths", "max_width", "seed"), INSTANCES)
def test_program_is_the_best_of_all_models(
    num_layers: int, heads: tuple[int, ...], widths: tuple[int, ...], max_width: int, seed: int
) -> None:
    """The optimum of every model there is, at several bounds on time, weights and KL, to 1e-6."""
    scores, costs = random_scores(num_layers, heads, widths, seed), Affine(per_ffn=2.0 + seed)
    everything = list(every_model(num_layers, heads, widths, scores, max_width, costs))
    whole = space(toy(num_layers), scores, Pins(), max_width)
    program = Program(whole, costs, parameters)
    now = max(x.seconds for x in everything)
    most = max(x.weights for x in everything)
    bounded = 0
    for share in (0.95, 0.8, 0.65, 0.5, 0.3, 0.05):
        expected = least(everything, "kl", seconds=now * share)
        found = program.solve("kl", {"seconds": now * share}, then="seconds")
        assert (found is None) == (expected is None)
        if found and expected is not None:
            assert found.kl == pytest.approx(expected, abs=1e-6)
            assert found.seconds <= now * share * (1 + 1e-6)
            bounded += 1
        limits = {"seconds": now * 0.9, "bytes": most * share}
        expected = least(everything, "kl", seconds=now * 0.9, weights=most * share)
        found = program.solve("kl", limits)
        assert (found is None) == (expected is None)
        assert found is None or found.kl == pytest.approx(expected, abs=1e-6)
        expected = least(everything, "seconds", kl=share)
        found = program.solve("seconds", {"kl": share})
        assert found is not None
        assert found.seconds == pytest.approx(expected, abs=1e-5)
    assert bounded >= 3


@pytest.mark.parametrize("seed", range(4))
def test_true_figures_keep_the_target(seed: int) -> None:
    """What is promised is counted on the architecture that the plan makes, and equals the enumeration's."""
    scores = random_scores(5, (0,), (0, 16), seed)
    everything = list(every_model(5, (0,), (0, 16), scores, 10_000, Affine()))
    search = make_search(toy(5), scores)
    for speedup in (1.2, 1.6, 2.2):
        (best,) = search.propose(Targets(speedup=speedup))
        assert best.speedup >= speedup * (1 - 1e-6)
        assert best.kl == pytest.approx(
            least(everything, "kl", seconds=search.now.seconds / speedup), abs=1e-6
        )
        same = [x for x in everything if matches(x, best.architecture)]
        assert best.figures.seconds == pytest.approx(same[0].seconds)
        assert best.figures.bytes == same[0].weights


def matches(candidate: Candidate, architecture: Architecture) -> bool:
    """Whether an architecture holds these layers, fused so."""
    group_of = {i: g for g in candidate.fused for i in g}
    rows = []
    for index, (heads, width) in enumerate(zip(candidate.heads, candidate.widths, strict=True)):
        group = group_of.get(index, (index,))
        if (heads or width) and (not width or group[0] == index):
            rows.append((heads, sum(candidate.widths[i] for i in group), group))
    return rows == [(x.num_key_value_heads, x.intermediate_size, x.members) for x in architecture.layers]


class Stepped(Affine):
    """Not affine: wide FFNs are slower than the sum says, as where they begin to compute."""

    def ffn(self, part: FFN | Linear | None) -> float:
        wide = part.intermediate_size if isinstance(part, FFN) else 0
        return super().ffn(part) + 0.01 * wide**1.2


def test_costs_that_are_not_affine_keep_the_target() -> None:
    scores = random_scores(6, (0,), (0, 16), 7)
    search = make_search(toy(6), scores, costs=Stepped())
    for speedup in (1.1, 1.4, 1.8, 2.5):
        (best,) = search.propose(Targets(speedup=speedup))
        assert search.now.seconds / best.figures.seconds >= speedup * (1 - 1e-6)


def make_search(
    architecture: Architecture, scores: Scores | None, pins: Pins | None = None, **values: object
):
    return Search(random_checkpoint(architecture), conditions(**values), scores, pins)


def test_keep_one_attention() -> None:
    """However fast the target, a model of no attention is none."""
    scores = random_scores(4, (0,), (), 0)
    (best,) = make_search(toy(4), scores).propose(Targets(min_quality=1e-9))
    assert best.architecture.num_attention_layers == 1


def test_last_of_a_run_stays_alone_and_empty_layers_do_not_end_it() -> None:
    """Layers 1-4 without attention, 2 without FFN: 1 and 3 are one layer, 4 is alone."""
    pins = Pins(plan=Plan(drop_attention=(1, 2, 3, 4), drop_ffn=(2,)))
    (best,) = make_search(toy(5), None, pins).propose(Targets())
    assert best.plan.fuse == ((1, 3),)
    assert [x.members for x in best.architecture.layers] == [(0,), (1, 3), (4,)]
    assert best.groups[0].members == 2
    assert best.groups[0].width == 2 * WIDTH


def test_what_is_not_a_lone_ffn_is_not_fused() -> None:
    """A matrix in the place of an FFN ends a run, an attention as well."""
    layers = list(toy(8).layers)
    for index in (1, 2, 3, 5, 6, 7):
        layers[index] = replace(layers[index], attention=None)
    layers[6] = replace(layers[6], ffn=Linear())
    (best,) = make_search(replace(toy(8), layers=tuple(layers)), None).propose(Targets())
    assert best.plan.fuse == ((1, 2),)


def test_widths_stay_below_the_limit() -> None:
    """7 members under a limit of 3 of them: 3 layers, none wider; the last of the run alone."""
    pins = Pins(plan=Plan(drop_attention=tuple(range(1, 9))))
    search = make_search(toy(9), None, pins, widest=3 * WIDTH)
    (best,) = search.propose(Targets())
    assert len(best.architecture.layers) == 1 + 3 + 1
    assert max(x.intermediate_size for x in best.architecture.layers) <= 3 * WIDTH
    assert best.architecture.layers[-1].members == (8,)


def test_fusing_is_left_out_where_it_costs_more_than_it_is_worth() -> None:
    """A run whose fusing has a high score stays as it is while time allows it."""
    scores = replace(random_scores(5, (0,), (), 0), fusing={i: (0.5,) * i for i in range(1, 5)})
    pins = Pins(plan=Plan(drop_attention=(1, 2, 3)))
    search = make_search(toy(5), scores, pins)
    (slow,) = search.propose(Targets(speedup=1.01))
    assert slow.plan.fuse == ()
    assert slow.fusing_kl == 0
    (fast,) = search.propose(Targets(speedup=search.now.seconds / (slow.figures.seconds - 1)))
    assert fast.kl is not None
    assert slow.kl is not None
    assert fast.kl > slow.kl


def test_pins() -> None:
    """What is decided by hand is kept, and the rest is still the best there is."""
    scores = random_scores(5, (2, 0), (16, 0), 3)
    plan = Plan(drop_attention=(4,), kv_heads=((3, 2),), ffn_channels=((2, tuple(range(8, 24))),))
    pins = Pins(keep_attention=frozenset({0}), keep_ffn=frozenset({1}), plan=plan)
    for speedup in (1.3, 1.8):
        (best,) = make_search(toy(5), scores, pins).propose(Targets(speedup=speedup))
        found = best.plan
        assert 4 in found.drop_attention
        assert 0 not in {*found.drop_attention, *dict(found.kv_heads)}
        assert 1 not in {*found.drop_ffn, *dict(found.ffn_channels)}
        assert dict(found.kv_heads)[3] == 2
        assert dict(found.ffn_channels)[2] == tuple(range(8, 24))
        everything = every_model(5, (2, 0), (16, 0), scores, 10_000, Affine())
        allowed = [
            x
            for x in everything
            if x.heads[0] == KV and x.heads[3:] == (2, 0) and x.widths[1:3] == (WIDTH, 16)
        ]
        seconds = make_search(toy(5), scores).now.seconds / speedup
        assert best.kl == pytest.approx(least(allowed, "kl", seconds=seconds), abs=1e-6)


def test_groups_by_hand() -> None:
    """A group given by hand holds what it says, the last FFN of its run too, and nothing joins it."""
    pins = Pins(plan=Plan(drop_attention=(1, 2, 3, 4, 5), fuse=((4, 5),)))
    (best,) = make_search(toy(6), None, pins).propose(Targets())
    assert best.plan.fuse == ((1, 3), (4, 5))
    with pytest.raises(UserError, match=r"fuse: group 2-3 crosses layer 2, which keeps its attention"):
        make_search(toy(6), None, Pins(plan=Plan(fuse=((2, 3),))))
    with pytest.raises(UserError, match=r"fuse: group 1-4 is 128 wide"):
        make_search(toy(6), None, Pins(plan=replace(pins.plan, fuse=((1, 4),))), widest=96)


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        (Pins(keep_attention=frozenset({9})), "keep_attention: layer 9 does not exist; the model has 0-3"),
        (Pins(plan=Plan(drop_ffn=(4,))), "drop_ffn: layer 4 does not exist; the model has 0-3"),
        (
            Pins(keep_attention=frozenset({2}), plan=Plan(drop_attention=(2,))),
            "keep_attention: layer 2 is changed by hand as well; name it once",
        ),
        (Pins(plan=Plan(model="f" * 64)), "--plan: made for model ffffffffffff"),
    ],
)
def test_pins_that_do_not_fit(pins: Pins, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make_search(toy(4), None, pins)


@pytest.mark.parametrize("difference", [1, 3])
def test_diverse_solutions(difference: int) -> None:
    """Each is the best of those that differ enough from all before it."""
    scores = replace(random_scores(4, (0,), (0,), 5), fusing={i: (0.0,) * i for i in range(4)})
    search = make_search(toy(4), scores)
    proposals = search.propose(Targets(speedup=1.4), solutions=5, difference=difference)
    everything = [
        x
        for x in every_model(4, (0,), (0,), scores, 10_000, Affine())
        if x.seconds <= search.now.seconds / 1.4 + 1e-9
    ]
    taken: list[tuple[int, ...]] = []
    for proposal in proposals:
        far = [x for x in everything if all(distance(x, other) >= difference for other in taken)]
        assert proposal.kl == pytest.approx(least(far, "kl"), abs=1e-6)
        plan = proposal.plan
        kept = ([i not in plan.drop_attention for i in range(4)], [i not in plan.drop_ffn for i in range(4)])
        taken.append((*kept[0], *kept[1]))
    assert len(proposals) == 5


def distance(candidate: Candidate, other: tuple[int, ...]) -> int:
    mine = [bool(x) for x in (*candidate.heads, *candidate.widths)]
    return sum(a != b for a, b in zip(mine, other, strict=True))


def test_out_of_reach_says_the_closest() -> None:
    """The closest is the best of the enumeration."""
    scores = random_scores(4, (0,), (0,), 6)
    search = make_search(toy(4), scores)
    everything = list(every_model(4, (0,), (0,), scores, 10_000, Affine()))
    fastest = search.now.seconds / (least(everything, "seconds") or 0)
    with pytest.raises(
        UserError, match=rf"--target-speedup: 50 cannot be met; the closest is {fastest:.4g} times"
    ):
        search.propose(Targets(speedup=50))
    with pytest.raises(
        UserError, match=r"--max-latency: 1 ms cannot be met; the closest is .* \(estimated\)"
    ):
        search.propose(Targets(max_seconds=1e-3))
    smallest = (least(everything, "weights") or 0) / 1e9
    with pytest.raises(UserError, match=rf"--max-memory: 1e-09 GB .* closest is {smallest:.4g} GB"):
        search.propose(Targets(max_bytes=1))
    bound = search.now.seconds / 1.5
    kl = least(everything, "kl", seconds=bound) or 0
    message = rf"--(target-speedup: 1.5 .*targets kept|min-quality: 0.999 .* closest is {math.exp(-kl):.4g})"
    with pytest.raises(UserError, match=message):
        search.propose(Targets(speedup=1.5, min_quality=0.999))


def test_quality_alone_bounds_the_fastest() -> None:
    scores = random_scores(5, (0,), (16, 0), 8)
    search = make_search(toy(5), scores)
    everything = list(every_model(5, (0,), (16, 0), scores, 10_000, Affine()))
    for quality in (0.95, 0.7, 0.4):
        (best,) = search.propose(Targets(min_quality=quality))
        assert best.kl is not None
        assert math.exp(-best.kl) >= quality * (1 - 1e-6)
        assert best.figures.seconds == pytest.approx(least(everything, "seconds", kl=-math.log(quality)))


def test_narrowed_ffns_keep_the_most_important_channels() -> None:
    scores = Scores(
        alternatives={(1, "ffn", 4): 0.1},
        channels={1: np.array([5, 1, 7, 7, 0, 9, 2, 7, *([1.5] * (WIDTH - 8))], dtype=np.float32)},
    )
    (best,) = make_search(toy(2), scores).propose(Targets(speedup=1.01))
    assert best.plan.ffn_channels == ((1, (2, 3, 5, 7)),)


# The command


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(plan_command, [str(x) for x in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_super_49b_from_its_bare_config(tmp_path: Path) -> None:
    """The runs that NVIDIA's own paper fuses: 6, 7 and 11 are too short, 51 and 70 the last of theirs."""
    output = tmp_path / "plan.yaml"
    result = json.loads(run(SUPER_49B, "--tp", 8, "--json", "-o", output))
    (solution,) = result["solutions"]
    assert solution["plan"]["fuse"] == [[42, 50], [53, 69]]
    assert solution["plan"]["drop_attention"] == []
    assert (
        solution["expected"]["all_reduces_per_token"]["now"] - 24
        == (solution["expected"]["all_reduces_per_token"]["planned"])
    )
    assert solution["speedup"]["basis"] == "estimated"
    assert solution["speedup"]["value"] > 1
    assert solution["quality"]["kl"] is None
    assert plans.read(output).fuse == ((42, 50), (53, 69))


def test_groups_within_tensorrts_limit(tmp_path: Path) -> None:
    """Of Llama 3.1 70B's FFNs 4 fit at TP 1: 9 members are 3 layers at least. What does not fit is said."""
    values = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "torch_dtype": "bfloat16",
    }
    config = tmp_path / "config.json"
    config.write_text(json.dumps(values))
    options = ("--drop-attention", "42-51", "--tp", 1, "--dtype", "bfloat16", "--json")
    result = json.loads(run(config, *options))
    (solution,) = result["solutions"]
    assert solution["expected"]["layers"]["planned"] == 70 + 3 + 1
    assert max(x["elements"] for x in solution["groups"]) <= MAX_ELEMENTS
    assert any("do not fit into the GPU's" in x for x in result["notes"])
    plan = Plan(drop_attention=tuple(range(42, 52)), fuse=tuple(map(tuple, solution["plan"]["fuse"])))
    check_elements(plan.apply(huggingface.declared(config)).architecture, 1, True)


@dataclass(frozen=True)
class Floor(Affine):
    """No FFN is faster than issuing its kernels; wide ones take as long as reading their weights."""

    def ffn(self, part: FFN | Linear | None) -> float:
        wide = part.intermediate_size if isinstance(part, FFN) else 0
        return max(6.0, 2.5 + wide / 16) if wide else 0.0


@pytest.mark.parametrize("seed", range(3))
def test_program_is_exact_for_convex_costs(seed: int) -> None:
    """Costs with a floor: narrow FFNs fuse for nothing. The enumeration counts them group by group."""
    scores, costs = random_scores(6, (0,), (16,), seed), Floor()
    flat = every_model(6, (0,), (16,), scores, 10_000, Affine(per_ffn=0.0))
    everything = []
    for x in flat:
        inside = {i for g in x.fused for i in g}
        groups = [*x.fused, *((i,) for i, w in enumerate(x.widths) if w and i not in inside)]
        ffns = sum(costs.ffn(FFN(intermediate_size=sum(x.widths[i] for i in g))) for g in groups)
        everything.append(replace(x, seconds=x.seconds - sum(x.widths) / 16 + ffns))
    program = Program(space(toy(6), scores, Pins(), 10_000), costs, parameters)
    now = 5 + 6 * (
        costs.attention(Attention(num_key_value_heads=KV)) + costs.ffn(FFN(intermediate_size=WIDTH))
    )
    for share in (0.9, 0.75, 0.6, 0.45):
        found = program.solve("kl", {"seconds": now * share})
        assert found is not None
        assert found.kl == pytest.approx(least(everything, "kl", seconds=now * share), abs=1e-6)
    fastest = program.solve("seconds", {})
    assert fastest is not None
    assert fastest.seconds == pytest.approx(least(everything, "seconds"))


@pytest.mark.parametrize("way", ["shares", "steps", "fused"])
def test_the_benchmarks_greedy_selection_is_no_better(way: str) -> None:
    """Under the same limit, on several models, and worse on some of them."""
    from benchmarks.plan import GREEDY

    pairs = []
    for seed in range(6):
        search = make_search(toy(6), random_scores(6, (2, 0), (16, 0), seed))
        one = GREEDY[way](search, search.now.seconds / 1.4)
        if one is None:
            continue
        assert one.figures.seconds <= search.now.seconds / 1.4
        (other,) = search.propose(Targets(speedup=1.4))
        pairs.append((one.kl or 0, other.kl or 0))
    assert all(other <= one + 1e-6 for one, other in pairs)
    assert any(other < one - 1e-3 for one, other in pairs)


# The command, with an analysis


def write_analysis(directory: Path, model: Path, *, digest: str | None = None) -> Path:
    """An analysis of a model of 6 layers whose last attentions are worth little."""
    from builder.analysis import record

    checkpoint = huggingface.read(model)
    layers = checkpoint.architecture.layers
    importance = [0.9, 0.5, 0.04, 0.03, 0.02, 0.01]
    alternatives = [
        record.Alternative(layer=i, part=part, size=size, kl=kl * share)
        for i, kl in enumerate(importance)
        for part, size, share in (("attention", 0, 1), ("attention", 1, 0.5), ("ffn", 0, 5), ("ffn", 48, 2))
    ]
    matrix = tuple(tuple(0.1 if j > i else 0.0 for j in range(6)) for i in range(6))
    analysis = record.Analysis(
        model=digest or checkpoint.digest,
        num_layers=6,
        data=record.Data(files=("text.txt",), samples=1, length=8, seed=0, tokens=8),
        baseline=record.Baseline(perplexity=10.0),
        layers=tuple(
            record.LayerAnalysis(
                attention=record.Importance(cosine=0.1, kl=kl),
                ffn=record.Importance(cosine=0.1, kl=5 * kl),
                block=record.Importance(cosine=0.1, kl=6 * kl),
                explain=record.Explain(input_output=0.1, ratio=0.1, input_contribution=0.9),
                kv_heads=None,
            )
            for kl in importance
        ),
        alternatives=tuple(alternatives),
        planned_drops=(),
        dependency=record.Dependency(model=matrix, dropped=None),
        windows=(),
        groups=(),
        evaluations=record.Evaluations(
            dependency=0, dependency_dropped=0, importance=0, alternatives=0, groups=0, statistics=0
        ),
    )
    directory.mkdir()
    (directory / record.FILE).write_text(json.dumps(analysis.to_dict()))
    channels = {
        f"layers.{i}.ffn": np.arange(x.intermediate_size, dtype=np.float32) for i, x in enumerate(layers)
    }
    save_file(channels, directory / record.CHANNELS)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("plan") / "m")


@pytest.fixture(scope="module")
def analysis(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_analysis(tmp_path_factory.mktemp("analysis") / "a", model)


def test_fuse_makes_what_was_promised(model: Path, analysis: Path, tmp_path: Path) -> None:
    """`fuse --plan` reads the plan; layers and all-reduces of what it writes are those that were promised."""
    file = tmp_path / "plan.yaml"
    options = ("--analysis", analysis, "--tp", 2, "--target-speedup", 1.2, "--json", "-o", file)
    result = json.loads(run(model, *options))
    (solution,) = result["solutions"]
    assert result["files"] == [str(file)]
    assert solution["speedup"]["value"] >= 1.2
    assert solution["plan"]["fuse"]
    fused = CliRunner().invoke(
        COMMANDS, ["fuse", str(model), "--plan", str(file), "-o", str(tmp_path / "f"), "--json"]
    )
    assert fused.exit_code == 0, fused.output
    made = huggingface.read_architecture(tmp_path / "f")
    expected = solution["expected"]
    assert len(made.layers) == expected["layers"]["planned"] < 6
    assert made.all_reduces_per_token(2) == expected["all_reduces_per_token"]["planned"]
    assert made.kv_cache_bytes_per_token(1) == expected["kv_bytes_per_token"]["planned"]
    assert solution["plan"]["model"] == huggingface.read(model).digest


def test_quality_is_the_sum_of_the_scores(model: Path, analysis: Path) -> None:
    """Scores of what is dropped, and of fusing: M is 0.1, so 2 (k sqrt(0.1))^2 of losing an FFN after k."""
    result = json.loads(run(model, "--analysis", analysis, "--tp", 2, "--target-speedup", 1.2, "--json"))
    (solution,) = result["solutions"]
    plan, importance = solution["plan"], [0.9, 0.5, 0.04, 0.03, 0.02, 0.01]
    kl = sum(importance[i] for i in plan["drop_attention"])
    kl += sum(5 * importance[i] for i in plan.get("drop_ffn", ()))
    kl += sum(importance[i] / 2 for i in plan.get("kv_heads", ()))
    kl += sum(importance[i] * 2 for i in plan.get("ffn_channels", ()))
    fusing = sum(
        5 * importance[i] * min(1, 0.2 * (i - first) ** 2)
        for first, last in plan["fuse"]
        for i in range(first + 1, last + 1)
    )
    assert solution["quality"]["of_fusing"] == pytest.approx(fusing)
    assert solution["quality"]["kl"] == pytest.approx(kl + fusing)
    assert solution["quality"]["min_quality"] == pytest.approx(math.exp(-kl - fusing))


def test_measured_groups_set_the_scale_of_fusing(model: Path, tmp_path: Path) -> None:
    """An analysis that fused 2-4 and lost 0.05 scores that group at 0.05."""
    directory = write_analysis(tmp_path / "a", model)
    file = directory / "analysis.json"
    values = json.loads(file.read_text())
    fidelity = {"perplexity": 10.0, "top1": 0.9}
    values["groups"] = [
        {
            "first": 2,
            "last": 4,
            "fused_with_last": None,
            **{n: {"kl": 0.1, **fidelity} for n in ("sequential", "reversed", "removed")},
            "fused": {"kl": 0.15, **fidelity},
        }
    ]
    file.write_text(json.dumps(values))
    fixed = tmp_path / "fixed.yaml"
    plans.write(Plan(drop_attention=(2, 3, 4, 5), fuse=((2, 4),)), fixed)
    options = ("--analysis", directory, "--tp", 1, "--plan", fixed, "--target-speedup", 1.05, "--json")
    (solution,) = json.loads(run(model, *options))["solutions"]
    assert solution["quality"]["of_fusing"] == pytest.approx(0.05)


def test_text(model: Path, analysis: Path) -> None:
    text = run(model, "--analysis", analysis, "--tp", 2)
    assert "no target was given: --target-speedup 1.25" in text
    assert re.search(r"drop attention +\d", text)
    for name, basis in (
        ("ms per token", "estimated"),
        ("KV bytes per token", "counted"),
        ("KL to", "estimated"),
    ):
        assert re.search(rf"{name}.*{basis}", text), text
    assert "times are estimated for H100, TP 2" in text


def test_several_solutions(model: Path, analysis: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    options = ("--target-speedup", 1.2, "--solutions", 3, "--difference", 2, "--json", "-o", file)
    result = json.loads(run(model, "--analysis", analysis, "--tp", 1, *options))
    assert [Path(x).name for x in result["files"]] == ["plan.yaml", "plan-2.yaml", "plan-3.yaml"]
    found = [x["plan"] for x in result["solutions"]]
    assert [plans.read(Path(x)).to_dict()["drop_attention"] for x in result["files"]] == [
        x["drop_attention"] for x in found
    ]
    costs = [x["quality"]["kl"] for x in result["solutions"]]
    assert costs == sorted(costs)
    for one, other in itertools.combinations(found, 2):
        assert one != other


def test_pins_of_the_command(model: Path, analysis: Path) -> None:
    options = ("--keep-attention", "5", "--drop-attention", "1", "--keep-ffn", "0-5")
    result = json.loads(
        run(model, "--analysis", analysis, "--tp", 1, "--target-speedup", 1.2, *options, "--json")
    )
    plan = result["solutions"][0]["plan"]
    assert 1 in plan["drop_attention"]
    assert 5 not in {*plan["drop_attention"], *plan.get("kv_heads", {})}
    assert "drop_ffn" not in plan
    assert "ffn_channels" not in plan


def profile(directory: Path, **changes: object) -> Path:
    """A table as `profile` writes it, of the tiny model."""
    values = {
        "version": 1,
        "model": "m",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "head_dim": 16,
        "vocab_size": 320,
        "tp_size": 1,
        "batch": 1,
        "context": 64,
        "dtype": "float32",
        "quant": None,
        "device": "cpu",
        "outside": 1e-4,
        "attention": [[1, 4e-5], [2, 5e-5]],
        "ffn": [[24, 1e-5], [288, 6e-5]],
        "noise": 0.0,
        "hardware": {},
        "versions": {},
        "method": {},
        **changes,
    }
    file = directory / "profile.json"
    file.write_text(json.dumps(values))
    return file


def test_measured_costs(model: Path, analysis: Path, tmp_path: Path) -> None:
    """A table takes the place of the estimates, is said to, and bounds how wide a group may be."""
    table = profile(tmp_path)
    options = ("--analysis", analysis, "--context", 64, "--profile", table, "--drop-attention", "1-5")
    options = (*options, "--keep-ffn", "0-5", "--keep-attention", "0")
    result = json.loads(run(model, *options, "--target-speedup", 1.9, "--json"))
    (solution,) = result["solutions"]
    assert result["costs"] == {"measured": True, "source": f"measured: {table}"}
    assert solution["speedup"]["basis"] == "measured"
    assert solution["expected"]["gpu_bytes"]["basis"] == "estimated"
    assert solution["groups"]
    assert max(x["width"] for x in solution["groups"]) <= 288
    per_ffn = 1e-5 + (96 - 24) * 5e-5 / (288 - 24)
    now = solution["expected"]["ms_per_token"]["now"]
    assert now == pytest.approx(1e3 * (1e-4 + 6 * (5e-5 + per_ffn)))


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--target-speedup", "100"), 1, "--target-speedup: 100 cannot be met; the closest is"),
        (("--max-memory", "0.000001"), 1, "--max-memory: 1e-06 GB cannot be met; the closest is"),
        (("--max-latency", "0.5"), 1, "--max-latency: 0.5 ms cannot be met; the closest is"),
        (("--target-speedup", "0"), 2, "--target-speedup"),
        (("--min-quality", "1.5"), 2, "--min-quality"),
        (("--target-speedup", "nan"), 2, "nan is not a finite number"),
        (("--max-latency", "inf"), 2, "inf is not a finite number"),
        (("--min-quality", "nan"), 2, "nan is not a finite number"),
        (("--drop-attention", "0-5"), 1, "no attention would be left"),
        (("--context", "1" + 330 * "0"), 2, "--context"),
        (("--gpu", "tpu"), 2, "'tpu' is not one of"),
        (("--keep-attention", "9"), 1, "keep_attention: layer 9 does not exist"),
        (("--keep-attention", "x"), 1, "'x' is not a layer number"),
        (("--keep-attention", "2", "--drop-attention", "2"), 1, "keep_attention: layer 2 is changed by hand"),
        (("--plan", "missing.yaml"), 1, "missing.yaml: cannot be read"),
        (("--tp", "3"), 1, "tp_size: 3 does not divide num_attention_heads 4"),
    ],
)
def test_bad_options(model: Path, analysis: Path, options: tuple[str, ...], code: int, message: str) -> None:
    result = CliRunner().invoke(
        COMMANDS, ["plan", str(model), "--analysis", str(analysis), "--tp", "2", *options]
    )
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "other targets" not in result.output


def test_bad_inputs(model: Path, tmp_path: Path) -> None:
    """Each is one line that names what is wrong."""
    other = write_analysis(tmp_path / "other", model, digest="e" * 64)
    message = fails(model, "--analysis", other)
    assert "other: made for model eeeeeeeeeeee, this one is" in message
    assert "none: missing" in fails(model, "--analysis", tmp_path / "none")
    (tmp_path / "plan.yaml").write_text("")
    assert "plan.yaml: exists" in fails(SUPER_49B, "--tp", 8, "-o", tmp_path / "plan.yaml")
    assert "no such directory" in fails(SUPER_49B, "--tp", 8, "-o", tmp_path / "no" / "plan.yaml")
    assert "no such model directory" in fails(tmp_path / "nowhere")
    assert "with --analysis it may drop" in fails(SUPER_49B, "--tp", 8, "--target-speedup", 2)
    windows = tmp_path / "windows.yaml"
    plans.write(Plan(parallel=((1, 2),)), windows)
    assert "--plan: parallel is not searched with" in fails(model, "--tp", 1, "--plan", windows)
    for options in (("--analysis", tmp_path), ("--min-quality", 0.9)):
        assert "Error" in run(SUPER_49B, *options, code=2)


def test_memory_that_nothing_can_change() -> None:
    assert "--max-memory: 5 GB cannot be met; the closest is" in fails(
        SUPER_49B, "--tp", 8, "--max-memory", 5
    )


@pytest.mark.parametrize(
    ("drops", "groups", "message"),
    [
        ("3-5", [[3, 99]], "fuse: group 3-99 is no run of two or more of the layers 0-5"),
        ("0-3", [[-1, 3]], "fuse: group -1-3 is no run of two or more"),
        ("3-5", [[3, 3]], "fuse: group 3-3 is no run"),
        ("2-5", [[2, 4], [3, 5]], "fuse: group 3-5 overlaps another"),
    ],
)
def test_groups_that_do_not_fit(
    model: Path, tmp_path: Path, drops: str, groups: object, message: str
) -> None:
    file = tmp_path / "given.yaml"
    file.write_text(json.dumps({"drop_attention": drops, "fuse": groups}))
    assert message in fails(model, "--tp", 1, "--plan", file)


def test_a_group_with_a_dropped_ffn_in_it(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "given.yaml"
    file.write_text(json.dumps({"drop_attention": "2-5", "drop_ffn": [2], "fuse": [[2, 4]]}))
    result = json.loads(run(model, "--tp", 1, "--plan", file, "--json"))
    assert [(x["first"], x["last"], x["members"]) for x in result["solutions"][0]["groups"]] == [(3, 4, 2)]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("alternatives", 0, "kl"), math.nan, "kl is nan, which nothing measures"),
        (("alternatives", 0, "kl"), -5, "kl is -5, which nothing measures"),
        (("alternatives", 0, "kl"), math.inf, "kl is inf"),
        (("alternatives", 0, "kl"), 10**400, "kl is 1000"),
        (("alternatives", 0, "layer"), 99, "layer 99 does not exist, there are 0-5"),
        (("alternatives", 0, "size"), -1, "size below 0"),
        (("planned_drops",), [True], "is not a list of int"),
        (("dependency", "model"), [[0.0]], "dependency.model has 1 rows for 6 layers"),
        (("dependency", "model", 0, 1), math.nan, "dependency has nan"),
        (("layers", 0, "ffn"), None, "layer 0 is another one than the model's"),
    ],
)
def test_an_analysis_that_is_not_sound(
    model: Path, tmp_path: Path, path: tuple[Any, ...], value: object, message: str
) -> None:
    directory = write_analysis(tmp_path / "broken", model)
    values = place = json.loads((directory / "analysis.json").read_text())
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (directory / "analysis.json").write_text(json.dumps(values))
    assert message in fails(model, "--analysis", directory, "--tp", 2)


def fails(*arguments: object) -> str:
    """The one line of a command that fails."""
    result = CliRunner().invoke(COMMANDS, ["plan", *(str(x) for x in arguments)])
    assert result.exit_code == 1, result.output
    assert result.output.count("\n") == 1
    return result.output


def test_what_the_solver_prints_is_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    """C code's own stdout, buffered or not, is lost inside and works again after it."""
    import ctypes

    from builder.search.quiet import stdout_of_libraries_dropped

    library = ctypes.CDLL(None)
    with stdout_of_libraries_dropped():
        library.puts(b"inside")
    library.puts(b"after")
    library.fflush(None)
    assert capfd.readouterr().out == "after\n"


def test_help_needs_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from click.testing import CliRunner; from builder.cli.plan import plan; "
        "assert CliRunner().invoke(plan, ['--help']).exit_code == 0; assert 'torch' not in sys.modules; "
        "assert 'scipy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
