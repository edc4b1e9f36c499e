"""Two engine directories measured with trtllm-bench, in the rounds, statistics and report of Triton's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engines.trtllm import bench
from engines.trtllm.bench_command import Load
from engines.trtllm.bench_report import Result
from triton_repo.compare import Comparison, assemble
from triton_repo.measuring import interleave
from triton_repo.rounds import SIDES, AnyRound, RecordedRound, Statistics

PERCENTILES_ONLY = (
    "trtllm-bench tells percentiles of a run, not single values: p50, p90 and p99 are medians over the "
    "rounds of each run's own, ratio and interval are of the runs' p50, and inter-token latency is the mean "
    "of a request. Nothing goes through a server."
)


def compare_engines(
    baseline: Path,
    candidate: Path,
    *,
    tokenizer: Path | None,
    runs: Path,
    input_tokens: int,
    max_tokens: int,
    concurrency: Sequence[int] = (1, 32),
    num_requests: int | None = None,
    rounds: int = 5,
    seed: int = 0,
    baseline_facts: dict[str, Any] | None = None,
    candidate_facts: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Measure both engine directories with trtllm-bench, a process a round, each loading the engine anew.

    `runs` is an existing directory for the dataset, reports and logs. Raises UserError where the
    machine or an engine cannot do it, or a run fails.
    """
    version = bench.installed()
    subjects = {
        side: bench.subject(directory, tokenizer, version)
        for side, directory in zip(SIDES, (baseline, candidate), strict=True)
    }
    loads = {
        level: Load(
            concurrency=level,
            requests=num_requests or max(32, 4 * level),
            input_tokens=input_tokens,
            output_tokens=max_tokens,
        )
        for level in concurrency
    }
    for subject in subjects.values():
        for load in loads.values():
            bench.check(subject, load, version)
    dataset = runs / "dataset.jsonl"
    most = max(loads.values(), key=lambda load: load.requests)
    vocab_size = min(subject.manifest.architecture.vocab_size for subject in subjects.values())
    bench.write_dataset(dataset, vocab_size=vocab_size, load=most, seed=seed)

    def run(side: str, level: int, number: int) -> AnyRound:
        name = f"{side}-{level}-{number + 1}"
        result = bench.run(subjects[side], loads[level], version=version, dataset=dataset, name=name)
        return recorded(result, side, level)

    requests = ", ".join(f"{load.requests} at {load.concurrency}" for load in loads.values())
    return assemble(
        interleave(run, concurrency, rounds, progress=progress),
        method=f"with trtllm-bench {version}, without Triton",
        how=f"{rounds} interleaved rounds a side and level (ABBA), each a process of trtllm-bench {version} "
        "that loads the engine anew: its latency mode for 1 request at once, its throughput mode with "
        f"--streaming for more; {input_tokens} random tokens in, {max_tokens} out, {requests} at once, "
        "closed loop, after a warm-up.",
        notes=(PERCENTILES_ONLY,),
        settings={
            "input_tokens": input_tokens,
            "max_tokens": max_tokens,
            "concurrency": list(concurrency),
            "requests": [load.requests for load in loads.values()],
            "rounds": rounds,
            "seed": seed,
        },
        baseline_facts=baseline_facts,
        candidate_facts=candidate_facts,
    )


def recorded(result: Result, side: str, level: int) -> RecordedRound:
    """A trtllm-bench run as a round."""
    summaries = {
        metric: Statistics(**asdict(percentiles), count=result.requests)
        for metric, percentiles in (
            ("ttft_ms", result.ttft_ms),
            ("inter_token_ms", result.token_ms),
            ("latency_ms", result.latency_ms),
        )
    }
    medians = {metric: (summary.p50,) for metric, summary in summaries.items()}
    rates = {"tokens_per_s": (result.tokens_per_s,), "user_tokens_per_s": (result.user_tokens_per_s,)}
    return RecordedRound(
        side=side,
        concurrency=level,
        values={**medians, **rates},
        lengths=(result.output_tokens,),
        summaries=summaries,
    )
