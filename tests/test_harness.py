"""lm-eval's tasks: our decoder against lm-eval's own transformers model, and evaluate's command line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from builder import huggingface
from builder.decoder import load
from builder.plan import Plan
from ffn_fusion import main

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

QUESTIONS = [
    {"question": "The quick brown", "choices": [" fox", " dog", " lazy"], "answer": 0},
    {"question": "def main(argv):", "choices": [" return 0", " jumps", " café"], "answer": 0},
    {"question": "jumps over the lazy", "choices": [" 日本語", " dog.", " main"], "answer": 1},
    {"question": "naïve", "choices": [" quick", " café", " over the"], "answer": 1},
    {"question": "x" * 700, "choices": [" y", " z and more"], "answer": 1},  # longer than the model
]
YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{rest}
"""
CHOICES = """doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]"""
WORDS = """doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["q", " the"], do_sample: false, max_gen_toks: 24}
metric_list: [{metric: exact_match}]"""
ROLLING = """doc_to_target: "{{question}}{{choices[0]}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """Models so small are slower on more, on a machine that has other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def datasets_here(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tables that datasets converts stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    data = directory / "questions.jsonl"
    data.write_text("".join(json.dumps(x) + "\n" for x in QUESTIONS), encoding="utf-8")
    kinds = {"tiny_choice": ("multiple_choice", CHOICES), "tiny_words": ("generate_until", WORDS)}
    kinds["tiny_rolling"] = ("loglikelihood_rolling", ROLLING)
    for name, (kind, rest) in kinds.items():
        text = YAML.format(name=name, file=data, kind=kind, rest=rest)
        (directory / f"{name}.yaml").write_text(text, encoding="utf-8")
    return directory


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


def instances(kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def both(tiny_hf: Path) -> tuple[Any, Any]:
    """Our model and lm-eval's own of the same directory."""
    from lm_eval.models.huggingface import HFLM

    from builder.harness import Model

    theirs = HFLM(pretrained=str(tiny_hf), device="cpu", dtype="float32", batch_size=2)
    return Model(huggingface.read(tiny_hf), tiny_hf, batch=2), theirs


def test_loglikelihoods_are_transformers(both: tuple[Any, Any]) -> None:
    pairs = [(x["question"], choice) for x in QUESTIONS for choice in x["choices"]]
    pairs += [("", "The quick"), ("trailing space ", "fox"), ("a", " brown fox")]
    ours, theirs = (model.loglikelihood(instances("loglikelihood", *pairs)) for model in both)
    for (text, greedy), (wanted, also) in zip(ours, theirs, strict=True):
        assert text == pytest.approx(wanted, abs=1e-3, rel=1e-4)
        assert greedy == also
    assert len({round(x, 2) for x, _ in ours}) > 10


def test_documents_longer_than_the_model(both: tuple[Any, Any]) -> None:
    texts = [(TEXT,) for TEXT in ("short", "The quick brown fox. " * 120, "日本語 " * 200)]
    ours, theirs = (model.loglikelihood_rolling(instances("loglikelihood_rolling", *texts)) for model in both)
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_generations_are_transformers(both: tuple[Any, Any]) -> None:
    """Prompts of several lengths, in batches, with stop strings and without."""
    prompts = ["The quick", "def main", "a", "The lazy", "naïve café " * 60]
    for until in ([], ["e"], [" the", "q"]):
        asked = [(p, {"until": until, "do_sample": False, "max_gen_toks": 20}) for p in prompts]
        ours, theirs = (model.generate_until(instances("generate_until", *asked)) for model in both)
        assert [x.rstrip("�") for x in ours] == [x.rstrip("�") for x in theirs]
        assert all(not any(stop in text for stop in until) for text in ours)
        assert any(ours)


def test_the_cache_changes_nothing(tiny_hf: Path) -> None:
    """Of a model with attention-free layers, a fused one and blocks in parallel."""
    from builder.kv_cache import with_cache

    plan = Plan(drop_attention=(2, 3), fuse=((2, 3),), parallel=((4, 5),))
    decoder = load(plan.apply(huggingface.read(tiny_hf)), torch.float32)
    assert decoder.architecture.parallel
    tokens = torch.randint(0, 320, (3, 20), generator=torch.Generator().manual_seed(0))
    places = torch.arange(20).expand(3, -1)
    whole, cached = decoder(tokens, places), with_cache(decoder)
    steps = [slice(0, 8), *(slice(i, i + 1) for i in range(8, 20))]
    told = torch.cat([cached(tokens[:, x], places[:, x]) for x in steps], 1)
    torch.testing.assert_close(told, whole, atol=1e-4, rtol=1e-4)
    assert cached.lm_head.weight.data_ptr() == decoder.lm_head.weight.data_ptr()


def test_tasks_beside_the_parent(tiny_hf: Path, tasks: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = ("tiny_choice", "tiny_words", "tiny_rolling")
    options = [x for name in names for x in ("--task", name)]
    result = run(tiny_hf, *options, "--task-dir", tasks, "--drop-attention", "2-5", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    model = HFLM(pretrained=str(tiny_hf), device="cpu", dtype="float32")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    wanted = simple_evaluate(model=model, tasks=list(names), task_manager=manager, bootstrap_iters=0)
    for name in names:
        for metric, value in told["parent_tasks"][name].items():
            assert value["value"] == pytest.approx(wanted["results"][name][f"{metric},none"], rel=1e-4)
    assert set(told["tasks"]["tiny_choice"]) == {"acc", "acc_norm"}
    assert told["tasks"]["tiny_rolling"] != told["parent_tasks"]["tiny_rolling"]
    assert told["task_settings"] == {"shots": None, "limit": None, "directory": str(tasks)}
    assert "perplexity" not in told


def test_a_table_of_tasks(tiny_hf: Path, tasks: Path) -> None:
    result = run(tiny_hf, "--task", "tiny_choice", "--task-dir", tasks, "--limit", 2)
    assert result.exit_code == 0, result.output
    assert re.search(r"^tiny_choice +acc +\d", result.stdout, re.M), result.stdout
    assert "+-" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --data, --task, or both"),
        (("--data", "x", "--shots", "2"), "belong to --task"),
        (("--task", "no-such-task"), "task: 'no-such-task' is unknown"),
        (("--task", "broken"), "task broken: .*missing.jsonl"),
        (("--task", "sampled"), "asks for sampling"),
        (("--task", "tiny_zero", "--shots", "2"), "num_fewshot 0"),
        (("--task", "unsafe"), "runs code that the model writes"),
    ],
)
def test_wrong_use(tiny_hf: Path, tasks: Path, arguments: tuple[str, ...], message: str) -> None:
    gone = YAML.format(name="broken", file=tasks / "missing.jsonl", kind="multiple_choice", rest=CHOICES)
    (tasks / "broken.yaml").write_text(gone, encoding="utf-8")
    words = WORDS.replace("do_sample: false", "do_sample: true, temperature: 1.0")
    drawn = YAML.format(name="sampled", file=tasks / "questions.jsonl", kind="generate_until", rest=words)
    (tasks / "sampled.yaml").write_text(drawn, encoding="utf-8")
    zero = YAML.format(name="tiny_zero", file=tasks / "questions.jsonl", kind="multiple_choice", rest=CHOICES)
    (tasks / "tiny_zero.yaml").write_text(f"{zero}\nnum_fewshot: 0\n", encoding="utf-8")
    unsafe = zero.replace("tiny_zero", "unsafe") + "\nunsafe_code: true\n"
    (tasks / "unsafe.yaml").write_text(unsafe, encoding="utf-8")
    given = (*arguments, "--task-dir", tasks) if arguments[:1] == ("--task",) else arguments
    result = run(tiny_hf, *given)
    assert result.exit_code == (2 if "--task" not in arguments else 1)
    assert re.search(message, result.stderr), result.stderr
    if result.exit_code == 1:
        *bars, last = result.stderr.strip().splitlines()
        assert last.startswith("error: task")
        assert all("it/s" in line or not line for line in bars)  # of a tqdm imported before this test


def test_without_the_extra(tiny_hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = run(tiny_hf, "--task", "mmlu")
    assert result.exit_code == 1
    assert result.stderr == "error: lm_eval is missing; pip install 'ffn-fusion[lm-eval]'\n"
