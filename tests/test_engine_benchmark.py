"""The engine benchmark's harness: what needs no peer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.engine import figures, models, result
from benchmarks.engine.channel import Job, NotOffered
from benchmarks.engine.entries import ENTRIES, OURS, PEERS, Entry
from benchmarks.engine.environment import Environment, cache_directory
from benchmarks.engine.group import Group, Samples
from benchmarks.engine.process import Failed, Process
from benchmarks.engine.rounds import MEMORY, Runner, turn
from builder import huggingface

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 512,
    "tie_word_embeddings": False,
}

# An engine whose next token is the last one plus one, and whose behaviour its precision tells.
COUNTING = """
import sys
from benchmarks.engine.channel import Engine, NotOffered, Trace, serve

class Counting(Engine):
    packages = ("numpy",)

    def prepare(self, job):
        print("noise on stdout")
        if job.precision == "int8":
            raise NotOffered("no int8")
        return {}

    def load(self, job):
        if job.precision == "bf16":
            raise ValueError("bad weights\\nand more")
        return {"settings": "counts"}

    def generate(self, prompts, count):
        if count == 13:
            sys.exit("out of luck")
        trace = Trace.begin(len(prompts))
        for step in range(1, count + 1):
            trace.add_step([prompt[-1] + step for prompt in prompts])
        return trace

serve(Counting())
"""


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the counting engine's module."""
    (tmp_path / "counting_engine.py").write_text(COUNTING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "counting_engine"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    models.write(TINY, tmp_path / "model")
    return tmp_path / "model"


def make_job(tmp_path: Path, precision: str) -> Job:
    sizes = {"threads": 1, "prompt": 4, "length": 12, "batch": 2}
    return Job(model="model", work=str(tmp_path), precision=precision, **sizes)


def test_speed_counts_what_comes_after_every_sequence_has_begun() -> None:
    one = figures.speed([[2.0, 2.5, 3.0]])
    assert one == figures.Speed(prefill_s=2.0, decode=2.0)
    staggered = figures.speed([[1.0, 1.5, 2.5, 3.0], [2.0, 2.5, 3.0, 4.0]])
    assert staggered == figures.Speed(prefill_s=2.0, decode=5 / 2)


def test_ratio_is_of_rounds() -> None:
    figure = figures.ratio([10.0, 40.0, 30.0], [5.0, 10.0, 30.0], 2.0)
    assert figure == {"median_of_rounds": 2.0, "of_medians": 3.0, "target": 2.0, "met": True}
    assert "met" not in figures.ratio([1.0], [1.0], None)


def test_agreement_of_tokens() -> None:
    figure = figures.agreement([[1, 2, 3, 4], [5, 9, 7, 8]], [[1, 2, 3, 4], [5, 6, 7, 8]])
    assert figure["common_prefix"] == {"median": 2.5, "min": 1, "max": 4}
    assert (figure["of"], figure["same"]) == (4, 0.875)


@pytest.mark.parametrize(
    ("available", "expected"),
    [
        (45, [["ours", "a", "b", "c"]]),
        (35, [["ours", "a", "b"], ["ours", "c"]]),
        (5, [["ours", "a"], ["ours", "b"], ["ours", "c"]]),
    ],
)
def test_sets_fit_in_memory(available: float, expected: list[list[str]]) -> None:
    assert figures.batches_of(["ours", "a", "b", "c"], 10, available) == expected


def test_each_round_begins_with_another_engine() -> None:
    assert [turn(["a", "b"], n) for n in range(3)] == [["a", "b"], ["b", "a"], ["a", "b"]]


def test_models_are_the_named_sizes(model: Path) -> None:
    sizes = {"254M": 254_313_472, "1B": 1_235_814_400}
    for name, shape in models.SHAPES.items():
        (config := model / f"{name}.json").write_text(json.dumps(models.config(shape)))
        assert huggingface.read_architecture(config).num_parameters == sizes[name]
    assert huggingface.read(model).dtype == "bfloat16"
    whole = huggingface.read_architecture(model).num_parameters
    assert models.read_per_token(model) == whole - 512 * 64


def test_prompts_are_the_same_in_larger_batches() -> None:
    assert models.prompts(32000, 8, 16)[:2] == models.prompts(32000, 2, 16)


def test_a_process_answers_and_tells_why_not(tmp_path: Path, counting: str) -> None:
    process = Process(Path(sys.executable), counting, tmp_path / "log", 1)
    try:
        assert process.ask("prepare", make_job(tmp_path, "fp32"))["versions"].keys() == {"numpy"}
        with pytest.raises(NotOffered, match=r"^no int8$"):
            process.ask("prepare", make_job(tmp_path, "int8"))
        with pytest.raises(Failed, match=r"^ValueError: bad weights$"):
            process.ask("load", make_job(tmp_path, "bf16"))
        process.stop()
        with process.awake():
            assert process.generate([[1, 2], [3, 4]], 2)["tokens"] == [[3, 4], [5, 6]]
        with process.awake(), pytest.raises(Failed, match="died with exit code 1: out of luck"):
            process.generate([[1]], 13)
    finally:
        process.close()
    assert "noise on stdout" in (tmp_path / "log").read_text()


def make_runner(tmp_path: Path, count: int) -> Runner:
    return Runner(
        pythons=dict.fromkeys([*(x.name for x in ENTRIES), MEMORY.name], Path(sys.executable)),
        work=tmp_path / "work",
        threads=1,
        prompt=4,
        count=count,
        batches=[1, 2],
        rounds=lambda batch: 2,
        report=lambda line: None,
    )


def test_a_group_goes_on_without_the_engine_that_fails(tmp_path: Path, counting: str, model: Path) -> None:
    entries = [
        Entry("ours", counting),
        Entry("transformers", counting),
        Entry("onnxruntime", "no_such_module"),
    ]
    group = Group("tiny", "fp32", model)
    make_runner(tmp_path, 6).run(group, entries, 1e12)
    shown = result.of_group(group)
    assert shown["errors"].keys() == {"onnxruntime"}
    assert "No module named no_such_module" in shown["errors"]["onnxruntime"]
    assert shown["batches"].keys() == {"1", "2"}
    for part in shown["batches"].values():
        assert part["rows"].keys() == {"ours", "transformers"}
        assert part["rows"]["ours"]["tokens"]["same"] == 1
        assert part["ratios"].keys() == {"ours/transformers"}
    assert shown["batches"]["1"]["ratios"]["ours/transformers"]["target"] == 2.0
    assert "target" not in shown["batches"]["2"]["ratios"]["ours/transformers"]
    assert not any((tmp_path / "work").iterdir())


def test_an_engine_that_dies_while_measured_has_no_figures(
    tmp_path: Path, counting: str, model: Path
) -> None:
    group = Group("tiny", "fp32", model)
    make_runner(tmp_path, 13).run(group, [Entry("ours", counting)], 1e12)
    assert group.errors == {"ours": "batch 1: died with exit code 1: out of luck"}
    assert result.of_group(group)["batches"]["1"] == {"rows": {}, "ratios": {}}


def test_what_is_not_offered_is_said(tmp_path: Path, counting: str, model: Path) -> None:
    group = Group("tiny", "int8", model)
    make_runner(tmp_path, 6).run(group, [Entry("ours", counting)], 1e12)
    shown = result.of_group(group)
    assert (shown["not_offered"], shown["errors"]) == ({"ours": "no int8"}, {})


def test_text_of_a_result(model: Path) -> None:
    runs = {"ours": [figures.Speed(0.5, 40.0)], "transformers": [figures.Speed(1.0, 20.0)]}
    tokens = {name: [[1, 2]] for name in runs}
    samples = Samples(["ours", "transformers"], {1: runs}, {1: tokens})
    group = Group("254M", "fp32", model, sets=[samples], bandwidth=[50.0], not_offered={"x": "none"})
    group.other_cores = [0.0, 1.5, 2.0]
    whole = {
        "machine": {"processor": "P", "cores": 2},
        "errors": {"llama.cpp": "no compiler"},
        "groups": [result.of_group(group)],
    }
    text = result.show(whole)
    assert "ours/transformers  x 2.00  target 2.0: met" in text
    assert "not offered: none" in text
    assert "others kept 1.5 cores busy" in text
    assert text.endswith("llama.cpp: no compiler")


def test_peers_live_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory().parent == tmp_path / "ffn-fusion"


def test_a_given_environment_is_not_installed_into(tmp_path: Path) -> None:
    environment = Environment(tmp_path, lambda line: None)
    errors = environment.install(PEERS)
    assert errors.keys() == {peer.name for peer in PEERS}
    assert not any(tmp_path.iterdir())


def test_every_peer_has_a_target_and_pinned_packages() -> None:
    assert OURS.target is None
    for peer in PEERS:
        assert peer.target
        assert all("==" in package for package in (*peer.packages, *filter(None, [peer.compiled])))
