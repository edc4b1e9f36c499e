"""The analysis against transformers with hooks, against fuse(), and against itself in other orders."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from conftest import TEXT, random_checkpoint, write_llama

from builder import huggingface, text
from builder.analysis import record
from builder.analysis.record import Analysis, Data
from builder.analysis.study import Settings, analyze
from builder.analysis.sums import Sums, cosine_distance
from builder.analysis.sweep import sweep
from builder.analysis.trunk import Trunk
from builder.analysis.variants import dropped_blocks
from builder.analysis.windows import rank_windows
from builder.architecture import FFN, Attention, Layer, Linear
from builder.checkpoint import Checkpoint
from builder.decoder import FeedForward, load
from builder.errors import UserError
from builder.plan import Plan
from builder.surgery.attention import drop_attention
from builder.surgery.ffn import drop_ffn
from builder.surgery.fusion import fuse, remove_empty
from ffn_fusion import main

LAYERS, DROPPED, GROUP, FOLLOWING = 6, (1, 2, 3, 4), (1, 3), 4
SAMPLES, LENGTH, BATCH = 5, 24, 2  # three batches, the last one smaller


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with four KV heads."""
    overrides = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": LAYERS}
    return write_llama(tmp_path_factory.mktemp("analysed") / "m", seed=3, initializer_range=0.1, **overrides)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(TEXT), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def samples(model: Path, text_file: Path) -> torch.Tensor:
    ids = text.read_samples(model, [text_file], SAMPLES, LENGTH, huggingface.read_architecture(model), seed=1)
    assert ids.shape == (SAMPLES, LENGTH)
    return ids


def study(
    checkpoint: Checkpoint, samples: torch.Tensor, plan: Plan | None = None, **settings: object
) -> tuple[Analysis, dict[int, np.ndarray]]:
    data = Data(files=("t",), samples=len(samples), length=samples.shape[1], seed=1, tokens=samples.numel())
    chosen = Settings(**{"batch": BATCH, **settings})
    return analyze(checkpoint, samples, data, plan or Plan(fuse=()), chosen)


@pytest.fixture(scope="module")
def plain(model: Path, samples: torch.Tensor) -> tuple[Analysis, dict[int, np.ndarray]]:
    """The model as it is."""
    return study(huggingface.read(model), samples)


@pytest.fixture(scope="module")
def dropped(model: Path, samples: torch.Tensor) -> Analysis:
    """With four attentions to drop, and the run that they leave."""
    return study(huggingface.read(model), samples, Plan(drop_attention=DROPPED))[0]


class Reference:
    """transformers' model in float64, parts of it taken out by hooks."""

    def __init__(self, directory: Path, samples: torch.Tensor) -> None:
        from transformers import LlamaForCausalLM

        self.model = LlamaForCausalLM.from_pretrained(directory).double().eval()
        self.layers = self.model.model.layers
        self.samples = samples
        self.logits, self.inputs, self.outputs = self.run()

    @contextmanager
    def without(self, attention: tuple[int, ...] = (), ffn: tuple[int, ...] = ()) -> Iterator[None]:
        handles = [
            self.layers[i].self_attn.register_forward_hook(lambda m, x, y: (torch.zeros_like(y[0]), *y[1:]))
            for i in attention
        ]
        handles += [
            self.layers[i].mlp.register_forward_hook(lambda m, x, y: torch.zeros_like(y)) for i in ffn
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def run(self) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        inputs: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []

        def see(module: torch.nn.Module, x: tuple[torch.Tensor], y: torch.Tensor) -> None:
            inputs.append(x[0])
            outputs.append(y[0] if isinstance(y, tuple) else y)

        handles = [layer.register_forward_hook(see) for layer in self.layers]
        logits = self.model(self.samples).logits
        for handle in handles:
            handle.remove()
        return logits, inputs, outputs

    def divergence(self, logits: torch.Tensor) -> float:
        ours, theirs = F.log_softmax(logits, -1), F.log_softmax(self.logits, -1)
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())

    def dependency(self, attention: tuple[int, ...] = ()) -> np.ndarray:
        matrix = np.zeros((LAYERS, LAYERS))
        with self.without(attention):
            _, inputs, outputs = self.run()
        for i in range(LAYERS):
            with self.without((*attention, i), (i,)):
                _, xs, ys = self.run()
            for j in range(i + 1, LAYERS):
                matrix[i, j] = distance(outputs[j] - inputs[j], ys[j] - xs[j])
        return matrix


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((1 - F.cosine_similarity(a, b, dim=-1)).mean())


@pytest.fixture(scope="module")
def reference(model: Path, samples: torch.Tensor) -> Reference:
    return Reference(model, samples)


def test_importance_is_that_of_transformers(reference: Reference, plain: tuple) -> None:
    """float32 against float64: KL to 1e-3 of itself, distances to 1e-5."""
    for i, layer in enumerate(plain[0].layers):
        for name, attention, ffn in (("attention", (i,), ()), ("ffn", (), (i,)), ("block", (i,), (i,))):
            with reference.without(attention, ffn):
                logits, _, outputs = reference.run()
            found = getattr(layer, name)
            assert found.kl > 1e-3, "the parts of this model matter"
            assert found.kl == pytest.approx(reference.divergence(logits), rel=1e-3)
            assert found.cosine == pytest.approx(distance(reference.outputs[i], outputs[i]), abs=1e-5)


def test_explainability_is_that_of_transformers(reference: Reference, plain: tuple) -> None:
    for i, layer in enumerate(plain[0].layers):
        x, y = reference.inputs[i], reference.outputs[i]
        assert layer.explain.input_output == pytest.approx(distance(x, y), abs=1e-5)
        assert layer.explain.input_contribution == pytest.approx(distance(x, y - x), abs=1e-5)
        ratio = float(((y - x).norm(dim=-1) / x.norm(dim=-1)).mean())
        assert layer.explain.ratio == pytest.approx(ratio, rel=1e-5)


def test_dependency_is_that_of_transformers(reference: Reference, plain: tuple) -> None:
    expected = reference.dependency()
    found = np.array(plain[0].dependency.model)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (found[np.triu_indices(LAYERS, 1)] > 1e-3).all()
    assert (np.tril(found) == 0).all()
    assert plain[0].dependency.dropped is None


def test_dependency_after_the_drops_is_that_of_transformers(
    reference: Reference, dropped: Analysis, plain: tuple
) -> None:
    np.testing.assert_allclose(dropped.dependency.dropped, reference.dependency(DROPPED), atol=1e-5)
    assert dropped.dependency.model == plain[0].dependency.model
    assert dropped.planned_drops == DROPPED


def test_perplexity_is_that_of_transformers(reference: Reference, plain: tuple) -> None:
    targets = reference.samples[:, 1:].flatten()
    loss = F.cross_entropy(reference.logits[:, :-1].flatten(0, 1), targets)
    assert plain[0].baseline.perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_channels_and_narrow_ffns_are_those_of_transformers(reference: Reference, plain: tuple) -> None:
    analysis, channels = plain
    seen: dict[int, torch.Tensor] = {}
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, x, i=i: seen.update({i: x[0].abs()}))
        for i, layer in enumerate(reference.layers)
    ]
    reference.run()
    for handle in handles:
        handle.remove()
    scores = {(x.layer, x.size): x.kl for x in analysis.alternatives if x.part == "ffn" and x.size}
    assert sorted(scores) == sorted((i, width) for i in range(LAYERS) for width in (24, 48))
    for i, layer in enumerate(reference.layers):
        weight = layer.mlp.down_proj.weight
        statistic = seen[i].mean((0, 1)) * weight.norm(dim=0)
        np.testing.assert_allclose(channels[i], statistic.detach(), rtol=1e-4)
        for width in (24, 48):
            least = statistic.argsort()[: 96 - width]
            kept = weight.detach().clone()
            weight.data[:, least] = 0
            assert scores[i, width] == pytest.approx(reference.divergence(reference.run()[0]), rel=1e-3)
            weight.data.copy_(kept)


def test_pooled_kv_heads_are_those_of_transformers(reference: Reference, plain: tuple) -> None:
    """Heads that are all their mean are one head."""
    scores = {(x.layer, x.size): x.kl for x in plain[0].alternatives if x.part == "attention" and x.size}
    assert sorted(scores) == sorted((i, heads) for i in range(LAYERS) for heads in (1, 2))
    for (i, heads), score in scores.items():
        attention = reference.layers[i].self_attn
        kept = [x.weight.detach().clone() for x in (attention.k_proj, attention.v_proj)]
        for x in (attention.k_proj, attention.v_proj):
            means = x.weight.data.view(heads, 4 // heads, 8, 64).mean(1, keepdim=True)
            x.weight.data.copy_(means.expand(heads, 4 // heads, 8, 64).reshape(32, 64))
        assert score == pytest.approx(reference.divergence(reference.run()[0]), rel=1e-3)
        for x, weight in zip((attention.k_proj, attention.v_proj), kept, strict=True):
            x.weight.data.copy_(weight)


def test_kv_head_norms_are_those_of_transformers(reference: Reference, plain: tuple) -> None:
    """A rotation keeps the norm of K."""
    for i, layer in enumerate(reference.layers):
        x = layer.input_layernorm(reference.inputs[i])
        for name, projection in (("k_norm", layer.self_attn.k_proj), ("v_norm", layer.self_attn.v_proj)):
            norms = projection(x).view(SAMPLES, LENGTH, 4, 8).norm(dim=-1).mean((0, 1))
            found = [getattr(head, name) for head in plain[0].layers[i].kv_heads]
            assert found == pytest.approx(norms.tolist(), rel=1e-5)
        v = layer.self_attn.v_proj(x).view(SAMPLES, LENGTH, 4, 8)
        spread = ((v - v.mean(2, keepdim=True)).norm(dim=-1) / v.norm(dim=-1)).mean((0, 1))
        found = [head.v_spread for head in plain[0].layers[i].kv_heads]
        assert found == pytest.approx(spread.tolist(), rel=1e-5)


def test_dropping_is_an_alternative_of_size_none(plain: tuple) -> None:
    analysis = plain[0]
    none = {(x.layer, x.part): x.kl for x in analysis.alternatives if x.size == 0}
    for i, layer in enumerate(analysis.layers):
        assert none[i, "attention"] == layer.attention.kl
        assert none[i, "ffn"] == layer.ffn.kl
    assert len(none) == 2 * LAYERS


def outcome(parent: Checkpoint, child: Checkpoint, samples: torch.Tensor) -> tuple[float, float, float]:
    """KL, perplexity and agreement of two checkpoints in the reference decoder, computed at once."""
    positions = torch.arange(LENGTH).expand(len(samples), -1)
    with torch.no_grad():
        theirs, ours = (F.log_softmax(load(x)(samples, positions), -1) for x in (parent, child))
    loss = F.nll_loss(ours[:, :-1].flatten(0, 1), samples[:, 1:].flatten())
    agreement = (theirs.argmax(-1) == ours.argmax(-1)).float().mean()
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean()), math.exp(loss), float(agreement)


def test_groups_are_what_fuse_makes(model: Path, samples: torch.Tensor, dropped: Analysis) -> None:
    """Folded and stacked weights against members run apart, to 1e-5."""
    parent = huggingface.read(model)
    cut = drop_attention(parent, DROPPED)
    first, last = GROUP
    removed = remove_empty(drop_ffn(cut, range(first, last + 1)))
    children = {
        "sequential": cut,
        "fused": fuse(cut, [GROUP]),
        "removed": removed,
        "reversed": reordered(cut, [0, 3, 2, 1, 4, 5]),
        "fused_with_last": fuse(cut, [(first, FOLLOWING)]),
    }
    (group,) = dropped.groups
    assert (group.first, group.last) == GROUP
    seen = set()
    for name, child in children.items():
        found = getattr(group, name)
        kl, perplexity, agreement = outcome(parent, child, samples)
        assert found.kl == pytest.approx(kl, abs=1e-5, rel=1e-4), name
        assert found.perplexity == pytest.approx(perplexity, rel=1e-5), name
        assert found.top1 == pytest.approx(agreement, abs=1.01 / samples.numel()), name
        seen.add(round(kl, 5))
    assert len(seen) == len(children), "the outcomes differ"


def test_all_that_a_plan_drops_is_dropped(model: Path, samples: torch.Tensor) -> None:
    """An empty layer inside the run, a narrow FFN and pooled heads outside of it."""
    plan = Plan(
        drop_attention=DROPPED,
        drop_ffn=(2,),
        kv_heads=((0, 2),),
        ffn_channels=((5, tuple(range(40))),),
    )
    parent = huggingface.read(model)
    (group,) = study(parent, samples, plan, stream=True)[0].groups
    assert (group.first, group.last) == GROUP
    for name, child in (("sequential", replace(plan, fuse=())), ("fused", plan)):
        kl, perplexity, _ = outcome(parent, child.apply(parent), samples)
        assert getattr(group, name).kl == pytest.approx(kl, abs=1e-5, rel=1e-4)
        assert getattr(group, name).perplexity == pytest.approx(perplexity, rel=1e-5)


def reordered(checkpoint: Checkpoint, order: list[int]) -> Checkpoint:
    tensors = dict(checkpoint.outside_layers())
    for new, old in enumerate(order):
        tensors |= {f"layers.{new}.{name}": x for name, x in checkpoint.layer(old).items()}
    layers = tuple(checkpoint.architecture.layers[i] for i in order)
    return replace(checkpoint, architecture=replace(checkpoint.architecture, layers=layers), tensors=tensors)


def test_runs_that_are_there_are_compared_too(model: Path, samples: torch.Tensor) -> None:
    """A model whose attention is gone already needs no plan."""
    cut = drop_attention(huggingface.read(model), DROPPED)
    (group,) = study(cut, samples, Plan())[0].groups
    assert (group.first, group.last) == GROUP
    assert (group.sequential.kl, group.sequential.top1) == (0, 1)
    kl, perplexity, _ = outcome(cut, fuse(cut, [GROUP]), samples)
    assert group.fused.kl == pytest.approx(kl, abs=1e-5)
    assert group.fused.perplexity == pytest.approx(perplexity, rel=1e-5)


@pytest.mark.parametrize("settings", [{"stream": True}, {"passes": 3}, {"stream": True, "passes": 2}])
def test_other_orders_say_exactly_the_same(
    model: Path, samples: torch.Tensor, dropped: Analysis, settings: dict
) -> None:
    plan = Plan(drop_attention=DROPPED)
    other = study(huggingface.read(model), samples, plan, **settings)[0]
    if "passes" in settings:  # the model itself is run more often
        other = replace(other, evaluations=dropped.evaluations)
    assert other == dropped


def test_streaming_holds_one_block(model: Path, samples: torch.Tensor) -> None:
    trunk = Trunk(huggingface.read(model), resident=False)
    sweep(trunk, trunk.embed(samples.split(BATCH)), [], Sums(), name="model")
    assert trunk._blocks == {}
    assert trunk.block(0) is not trunk.block(0)


def test_what_a_plan_drops_is_not_read_again(model: Path) -> None:
    checkpoint = huggingface.read(model)
    whole = Trunk(checkpoint, resident=True)
    cut = Trunk(drop_attention(checkpoint, DROPPED), resident=True, over=whole)
    assert all(cut.block(i) is whole.block(i) for i in range(LAYERS))


def test_cost_of_the_dependency(model: Path, samples: torch.Tensor, plain: tuple) -> None:
    """m (m + 1) / 2 blocks a batch, by count and by the record."""
    calls = 0

    def count(module: torch.nn.Module, x: object, y: object) -> None:
        nonlocal calls
        calls += isinstance(module, FeedForward)

    trunk = Trunk(huggingface.read(model), resident=True)
    hidden = trunk.embed(samples.split(BATCH))
    handle = torch.nn.modules.module.register_module_forward_hook(count)
    sweep(trunk, hidden, dropped_blocks(trunk.checkpoint.architecture), Sums(), name="model")
    handle.remove()
    assert calls == 3 * LAYERS * (LAYERS + 1) // 2
    assert plain[0].evaluations.dependency == calls


def test_progress_counts_what_is_run(model: Path, samples: torch.Tensor) -> None:
    done, totals = [], []

    @contextmanager
    def bar(total: int) -> Iterator[object]:
        totals.append(total)
        yield done.append

    data = Data(files=(), samples=SAMPLES, length=LENGTH, seed=1, tokens=samples.numel())
    settings = Settings(batch=BATCH, passes=2)
    plan = Plan(drop_attention=DROPPED)
    analyze(huggingface.read(model), samples, data, plan, settings, bar=bar)
    assert totals == [sum(done)]


def test_every_kind_of_block(samples: torch.Tensor, model: Path) -> None:
    """Attention or FFN alone, matrices, and a layer that is empty."""
    kv = Attention(num_key_value_heads=2)
    halves = [
        (kv, FFN(intermediate_size=40)),
        (kv, None),
        (None, FFN(intermediate_size=24)),
        (None, None),
        (Linear(), FFN(intermediate_size=32)),
        (kv, Linear()),
        (None, Linear()),
    ]
    layers = tuple(Layer(attention=a, ffn=f, members=(i,)) for i, (a, f) in enumerate(halves))
    checkpoint = random_checkpoint(replace(huggingface.read_architecture(model), layers=layers))
    analysis = study(checkpoint, samples)[0]
    matrix = np.array(analysis.dependency.model)
    assert (matrix[3] == 0).all()
    assert (matrix[:, 3] == 0).all()
    for i, (layer, (attention, ffn)) in enumerate(zip(analysis.layers, halves, strict=True)):
        assert (layer.attention is None, layer.ffn is None) == (attention is None, ffn is None)
        left = [j for j in range(len(halves)) if j != i]
        kl = outcome(checkpoint, reordered(checkpoint, left), samples)[0] if attention or ffn else 0
        assert layer.block.kl == pytest.approx(kl, abs=1e-5, rel=1e-4)
        for name, part in (("attention", attention), ("ffn", ffn)):
            if part is not None:
                child = drop_attention(checkpoint, {i}) if name == "attention" else drop_ffn(checkpoint, {i})
                kl = outcome(checkpoint, child, samples)[0]
                assert getattr(layer, name).kl == pytest.approx(kl, abs=1e-5, rel=1e-4)
    assert analysis.layers[3].block == record.Importance(cosine=0, kl=0)


def test_half_precision_runs_in_its_own(tmp_path: Path, samples: torch.Tensor) -> None:
    checkpoint = huggingface.read(write_llama(tmp_path / "m", dtype="bfloat16", num_hidden_layers=3))
    analysis = study(checkpoint, samples)[0]
    positions = torch.arange(LENGTH).expand(SAMPLES, -1)
    logits = load(checkpoint)(samples, positions).float()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), samples[:, 1:].flatten())
    assert analysis.baseline.perplexity == pytest.approx(math.exp(loss), rel=1e-3)


def test_a_model_that_is_not_sound_is_refused(model: Path, samples: torch.Tensor) -> None:
    from builder.tensors import Constant

    checkpoint = huggingface.read(model)
    name = "layers.2.ffn.down.weight"
    broken = Constant(np.full(checkpoint.tensors[name].shape, np.nan, np.float32), "float32")
    with pytest.raises(UserError, match=r"layer 2: .* is not finite on this text; the model is not sound"):
        study(replace(checkpoint, tensors={**checkpoint.tensors, name: broken}), samples)


def test_cosine_distance_of_small_angles_and_zeros() -> None:
    """Angles down to 1e-4, where 1 - cos has lost its digits in float32."""
    angles = torch.tensor([0.0, 1e-4, 1e-3, 0.5, math.pi / 2, math.pi])
    a = torch.tensor([1.0, 0.0]).expand(6, 2) * 3
    b = torch.stack((angles.cos(), angles.sin()), -1) * 7
    expected = 1 - angles.double().cos()
    torch.testing.assert_close(cosine_distance(a, b).double(), expected, rtol=1e-3, atol=1e-12)
    zero = torch.zeros(1, 2)
    assert cosine_distance(zero, zero).item() == 0
    assert cosine_distance(zero, a[:1]).item() == pytest.approx(1)
    assert cosine_distance(a[:1], zero).item() == pytest.approx(1)


def test_windows_are_the_greedy_choice(model: Path) -> None:
    """Against all windows written out."""
    rng = np.random.default_rng(0)
    layers = list(huggingface.read_architecture(model).layers) * 4
    layers[9] = replace(layers[9], attention=None)
    architecture = replace(huggingface.read_architecture(model), layers=tuple(layers))
    matrix = np.round(np.triu(rng.random((24, 24)), 1), 1)  # with ties
    found = rank_windows(architecture, matrix, 4)
    scores = {}
    for first in range(21):
        members = range(first, first + 4)
        if 9 not in members:
            entries = [matrix[i, j] for i, j in combinations(members, 2)]
            scores[first] = (max(entries), sum(entries))
    taken: list[int] = []
    while scores:
        best = min(scores, key=lambda first: (*np.round(scores[first], 9), first))
        taken.append(best)
        scores = {first: s for first, s in scores.items() if abs(first - best) >= 4}
    assert len(taken) > 3
    assert [w.first for w in found] == taken
    assert all(w.last == w.first + 3 for w in found)
    assert rank_windows(replace(architecture, layers=tuple(layers[:3])), matrix[:3, :3], 4) == ()


def test_record_round_trip(dropped: Analysis, tmp_path: Path) -> None:
    from builder.analysis.study import save

    channels = {0: np.arange(3.0), 12: np.array([0.5, 2.0])}
    save(dropped, channels, tmp_path)
    assert record.read(tmp_path) == dropped
    assert record.read(tmp_path / "analysis.json") == dropped
    found = record.read_channels(tmp_path)
    assert list(found) == [0, 12]
    assert all(np.array_equal(found[i], channels[i]) for i in channels)
    values = json.loads((tmp_path / "analysis.json").read_text())
    assert values["version"] == 1
    assert values["data"] == {
        "files": ["t"],
        "samples": SAMPLES,
        "length": LENGTH,
        "seed": 1,
        "tokens": SAMPLES * LENGTH,
    }
    assert set(values["groups"][0]["fused"]) == {"kl", "perplexity", "top1"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2, this release reads 1; run `analyze` again"),
        ({"version": None}, "version None"),
        ({"num_layers": "six"}, "num_layers is 'six', not a int"),
        ({"num_layers": 7}, "6 layers, num_layers says 7"),
        ({"layers": {}}, "'{}' is not a list"),
        ({"colour": 1}, "'colour' is missing or unknown"),
        ({"baseline": {}}, "'perplexity' is missing or unknown"),
        ({"baseline": {"perplexity": True}}, "perplexity is True, not a float"),
        ({"dependency": {"model": [[0.0, 1.0]], "dropped": None}}, "dependency is not square"),
        ({"dependency": {"model": [["a"]], "dropped": None}}, "'a' is not a number"),
        ({"planned_drops": ["1"]}, "is not a list of int"),
        (
            {"alternatives": [{"layer": 0, "part": "norm", "size": 0, "kl": 0.5}]},
            "part is 'norm', not attention or ffn",
        ),
        ({"data": []}, "'Data' is missing or unknown"),
    ],
)
def test_broken_records_are_refused(dropped: Analysis, tmp_path: Path, change: dict, words: str) -> None:
    file = tmp_path / "analysis.json"
    file.write_text(json.dumps(dropped.to_dict() | change))
    with pytest.raises(UserError) as caught:
        record.read(file)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_record_that_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"analysis\.json: missing"):
        record.read(tmp_path / "analysis.json")
    (tmp_path / "analysis.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        record.read(tmp_path)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["analyze", *map(str, arguments)])


def small(model: Path, text_file: Path, output: Path) -> list[object]:
    return [model, "--data", text_file, "--samples", 5, "--length", 24, "--batch", 2, "-o", output]


def test_the_command(model: Path, text_file: Path, tmp_path: Path, dropped: Analysis) -> None:
    output = tmp_path / "a"
    result = run(*small(model, text_file, output), "--seed", 1, "--drop-attention", "1-4", "--json")
    assert result.exit_code == 0, result.output
    found = record.read(output)
    assert replace(found, data=dropped.data) == replace(dropped, model=found.model)
    assert found.model == huggingface.read(model).digest
    assert found.data.files == (str(text_file),)
    shown = json.loads(result.stdout)
    assert shown["groups"][0]["fused"]["kl"] == found.groups[0].fused.kl
    assert sorted(p.name for p in output.iterdir()) == [
        "analysis.html",
        "analysis.json",
        "channels.safetensors",
        "dependency.png",
        "dependency_dropped.png",
        "explain.png",
        "groups.png",
        "importance.png",
    ]
    assert list(record.read_channels(output)) == list(range(LAYERS))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_command_in_words(model: Path, text_file: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("drop_attention: 1-4\nfuse: [[1, 4]]\n")
    arguments = small(model, text_file, tmp_path / "a")
    arguments[arguments.index("--samples") + 1] = 5000
    result = run(*arguments, "--plan", plan, "--widths", "none")
    assert result.exit_code == 0, result.output
    assert "The text has no more: 5000 samples were asked for." in result.stdout
    assert "Fusing 1-4 costs" in result.stdout
    found = record.read(tmp_path / "a")
    assert found.groups[0].fused_with_last is None
    assert not any(x.part == "ffn" and x.size for x in found.alternatives)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 tokens, shorter than one sample of 24"),
        (b"short", "shorter than one sample of 24; give more text or a smaller --length"),
        (b"caf\xe9" * 100, "not UTF-8 text"),
        (None, "cannot be read: No such file"),
    ],
)
def test_bad_text_is_one_line(model: Path, tmp_path: Path, content: bytes | None, words: str) -> None:
    file = tmp_path / "bad.txt"
    if content is not None:
        file.write_bytes(content)
    assert_fails(run(*small(model, file, tmp_path / "a")), 1, words, "bad.txt")
    assert not (tmp_path / "a").exists()


def test_tokens_outside_the_vocabulary(tmp_path: Path, text_file: Path) -> None:
    model = write_llama(tmp_path / "m", vocab_size=280, num_hidden_layers=2)
    result = run(*small(model, text_file, tmp_path / "a"))
    assert_fails(result, 1, "outside vocab_size 280; it is not this model's tokenizer")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--drop-attention", "9"], 1, "drop_attention: layer 9 does not exist"),
        (["--group", "1-3"], 1, "crosses layer 1, which has attention"),
        (["--drop-attention", "1-4", "--group", "1-2", "--group", "2-3"], 1, "overlaps another"),
        (["--plan", "none.yaml"], 1, "none.yaml: cannot be read"),
        (["--plan", "x.yaml", "--group", "1-3"], 2, "--plan says it all"),
        (["--widths", "half"], 2, "'half' is not a list of shares"),
        (["--widths", "0.5,2"], 2, "'0.5,2' has a share outside 0 to 1"),
        (["--length", "1"], 2, "1 is not in the range"),
    ],
)
def test_wrong_use_is_one_line(
    model: Path, text_file: Path, tmp_path: Path, options: list, code: int, words: str
) -> None:
    assert_fails(run(*small(model, text_file, tmp_path / "a"), *options), code, words)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("model: 0123456789abcdef", "plan: made for model 0123456789ab, this one is"),
        ("norm: last", "norm 'last' is not analysed; set it to fold"),
        ("parallel: [[0, 1]]", "parallel windows are not analysed"),
    ],
)
def test_plans_that_do_not_fit(model: Path, text_file: Path, tmp_path: Path, plan: str, words: str) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(plan)
    assert_fails(run(*small(model, text_file, tmp_path / "a"), "--plan", file), 1, words)


def test_output_and_data_are_asked_for(model: Path, text_file: Path, tmp_path: Path) -> None:
    assert_fails(run(model, "-o", tmp_path / "a"), 2, "Missing option '--data'")
    assert_fails(run(model, "--data", text_file), 2, "Missing option '-o'")
    (tmp_path / "a").mkdir()
    assert_fails(run(*small(model, text_file, tmp_path / "a")), 1, "a: exists; remove it")
    assert_fails(run(*small(model, text_file, tmp_path / "b" / "a")), 1, "no such directory; create it")


def assert_fails(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    if code == 1:
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[-1]


def mpirun(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    tools = Path(sys.executable).parent
    command = [str(tools / "mpirun"), "--oversubscribe", "--allow-run-as-root", "-n", str(processes)]
    command += [str(tools / "ffn-fusion"), "analyze", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_three_processes_say_the_same(
    model: Path, text_file: Path, tmp_path: Path, dropped: Analysis
) -> None:
    """Two batches, so that one process has none; sums in another order, products of other shapes: to 1e-4."""
    arguments = small(model, text_file, tmp_path / "a")
    arguments[arguments.index("--batch") + 1] = 3
    result = mpirun(3, *arguments, "--seed", 1, "--drop-attention", "1-4")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Perplexity ") == 1
    found = record.read(tmp_path / "a")
    compare(found.to_dict(), dropped.to_dict(), skip={"files", "evaluations", "model", "top1"})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def compare(found: object, expected: object, skip: set[str]) -> None:
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        for key in set(expected) - skip:
            compare(found[key], expected[key], skip)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            compare(a, b, skip)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    else:
        assert found == expected


def test_failures_of_two_processes_are_told_once(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    result = mpirun(2, *small(model, tmp_path / "empty.txt", tmp_path / "a"))
    assert result.returncode == 1
    assert result.stderr.count("error: ") == 1
    assert "shorter than one sample" in result.stderr
