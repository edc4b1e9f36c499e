"""aiperf, NVIDIA's load generator, in the place of this package's client.

A run is a process of its own (aiperf has no stable Python interface) that sends our prompts to Triton's
generate_stream and writes one line a request. It counts streamed responses with text as tokens: its own
count tokenizes the text again, and text that repeats what came before would be counted twice.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from builder.errors import UserError
from engines import logged
from engines.mpi import inner_environment
from triton_repo.client import Endpoint
from triton_repo.compare import Comparison, assemble, settings
from triton_repo.load import enough
from triton_repo.measuring import interleave
from triton_repo.rounds import SIDES, AnyRound, RecordedRound

RECORDS = "profile_export.jsonl"
SUMMARY = "profile_export_aiperf.json"
RESPONSES = (
    "Timed by aiperf: inter-token latency is the mean gap between the streamed responses of a request, and "
    "tokens are responses that carry text. Its own files are in runs/."
)


def find() -> Path:
    """The aiperf command: $AIPERF, beside this Python, or on PATH. Raises UserError where there is none."""
    beside = Path(sys.executable).with_name("aiperf")
    found = os.environ.get("AIPERF") or (str(beside) if beside.is_file() else shutil.which("aiperf"))
    if found is None or not os.access(found, os.X_OK):
        raise UserError(
            f"{found or 'aiperf'}: not found; pip install 'ffn-fusion[aiperf]' (Python 3.11 or later), or "
            "set AIPERF to the aiperf command of another environment"
        )
    return Path(found)


def arguments(
    endpoint: Endpoint,
    *,
    tokenizer: Path,
    prompts: Path,
    template: Path,
    requests: int,
    level: int,
    output: Path,
) -> list[str]:
    """aiperf's arguments: every prompt of the file once, in order, `level` requests at once."""
    extra = {"payload_template": str(template), "response_field": "text_output"}
    values = {
        "model": endpoint.model,
        "tokenizer": tokenizer,
        "url": endpoint.url,
        "endpoint-type": "template",
        "custom-endpoint": f"/v2/models/{endpoint.model}/generate_stream",
        "extra-inputs": json.dumps(extra),
        "input-file": prompts,
        "custom-dataset-type": "single_turn",
        "dataset-sampling-strategy": "sequential",
        "request-count": requests,
        "warmup-request-count": max(2, level),
        "concurrency": level,
        "random-seed": 1,
        "artifact-dir": output,
        "ui": "none",
    }
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return ["profile", *words, "--streaming", "--no-gpu-telemetry", "--no-server-metrics"]


def template(endpoint: Endpoint, max_tokens: int) -> str:
    """The body of a request in the endpoint's dialect, for aiperf to fill in the prompt."""
    body = json.dumps(endpoint.dialect.body("PROMPT", max_tokens, True, {}))
    return body.replace('"PROMPT"', "{{ text|tojson }}")


def run(
    endpoint: Endpoint,
    side: str,
    level: int,
    *,
    tokenizer: Path,
    prompts: Sequence[str],
    max_tokens: int,
    directory: Path,
) -> RecordedRound:
    """One round in a new directory. Raises UserError with aiperf's last words and the log."""
    directory.mkdir()
    file, body, log = (directory / name for name in ("prompts.jsonl", "template.jinja", "aiperf.log"))
    file.write_text("".join(json.dumps({"text": p}) + "\n" for p in prompts), encoding="utf-8")
    body.write_text(template(endpoint, max_tokens), encoding="utf-8")
    words = arguments(
        endpoint,
        tokenizer=tokenizer.resolve(),
        prompts=file,
        template=body,
        requests=len(prompts),
        level=level,
        output=directory,
    )
    # Offline, transformers takes the tokenizer's directory for the name of a repository.
    environment = {k: v for k, v in inner_environment().items() if k != "HF_HUB_OFFLINE"}
    code = logged.run([str(find()), *words], log, environment)
    if not (directory / RECORDS).is_file():
        raise UserError(f"aiperf: {logged.last_words(log, code)}; the log is {log}")
    result = read(directory, side, level, len(prompts))
    if code != 0:
        raise UserError(f"aiperf: {logged.last_words(log, code)}; the log is {log}")
    return result


def read(directory: Path, side: str, level: int, requests: int) -> RecordedRound:
    """The requests of a run. Raises UserError for a failed request, or where some are missing."""
    file = directory / RECORDS
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    records = [line for line in lines if line["metadata"]["benchmark_phase"] == "profiling"]
    failed = [record["error"] for record in records if record.get("error")]
    if failed:
        message = " ".join(str(failed[0].get("message")).split())
        raise UserError(f"{file}: {len(failed)} of {requests} requests failed: {message}")
    if len(records) != requests:
        raise UserError(f"{file}: {len(records)} of {requests} requests; see aiperf.log beside it")
    metrics = [record["metrics"] for record in records]
    gaps = [_gaps(file, m) for m in metrics]
    latencies = [_milliseconds(file, m, "request_latency") for m in metrics]
    begin = min(record["metadata"]["request_start_ns"] for record in records)
    end = max(record["metadata"]["request_end_ns"] for record in records)
    lengths = tuple(float(len(g) + 1) for g in gaps)
    return RecordedRound(
        side=side,
        concurrency=level,
        values={
            "ttft_ms": tuple(_milliseconds(file, m, "time_to_first_token") for m in metrics),
            "inter_token_ms": tuple(sum(g) / len(g) for g in gaps),
            "latency_ms": tuple(latencies),
            "tokens_per_s": (1e9 * sum(lengths) / (end - begin),),
            "user_tokens_per_s": tuple(1e3 * n / t for n, t in zip(lengths, latencies, strict=True)),
        },
        lengths=lengths,
    )


def _metric(file: Path, metrics: Mapping[str, Any], name: str) -> Any:
    found = metrics.get(name)
    if found is None:
        raise UserError(f"{file}: {name} is missing; aiperf 0.13 writes it for streamed requests")
    if found["unit"] != "ms":
        raise UserError(f"{file}: {name} is in {found['unit']}, not ms; aiperf 0.13 writes ms")
    return found["value"]


def _milliseconds(file: Path, metrics: Mapping[str, Any], name: str) -> float:
    return float(_metric(file, metrics, name))


def _gaps(file: Path, metrics: Mapping[str, Any]) -> list[float]:
    gaps = [float(gap) for gap in _metric(file, metrics, "inter_chunk_latency")]
    if not sum(gaps) > 0:
        raise UserError(f"{file}: a request has one response with text; ask for more tokens")
    return gaps


def version(directory: Path) -> str:
    """The aiperf that wrote a run."""
    text = (directory / SUMMARY).read_text(encoding="utf-8")
    return str(json.loads(text)["aiperf_version"])


def compare(
    baseline: Endpoint,
    candidate: Endpoint,
    *,
    tokenizer: Path,
    runs: Path,
    prompts: Sequence[str],
    max_tokens: int,
    concurrency: Sequence[int] = (1, 2, 4),
    num_requests: int | None = None,
    rounds: int = 8,
    seed: int = 0,
    baseline_facts: dict[str, Any] | None = None,
    candidate_facts: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Measure both endpoints with aiperf, a process a round, leaving its files in `runs`.

    Raises UserError where aiperf or a request fails.
    """
    find()
    asked = {level: enough(prompts, level, num_requests) for level in concurrency}
    ends = dict(zip(SIDES, (baseline, candidate), strict=True))

    def one(side: str, level: int, number: int) -> AnyRound:
        directory = runs / f"{side}-{level}-{number + 1}"
        return run(
            ends[side],
            side,
            level,
            tokenizer=tokenizer,
            prompts=asked[level],
            max_tokens=max_tokens,
            directory=directory,
        )

    measured = interleave(one, concurrency, rounds, progress=progress)
    used = version(runs / f"{SIDES[0]}-{concurrency[0]}-1")
    return assemble(
        measured,
        method=f"through Triton, by aiperf {used}",
        how=f"{rounds} interleaved rounds a side and level (ABBA), each a process of aiperf {used} that "
        f"sends {', '.join(str(len(x)) for x in asked.values())} requests with {len(prompts)} prompts, "
        f"{max_tokens} tokens each or fewer, closed loop, after a warm-up.",
        notes=(RESPONSES, *notes),
        settings=settings(prompts, [len(x) for x in asked.values()], max_tokens, concurrency, rounds, seed),
        baseline_facts=baseline_facts,
        candidate_facts=candidate_facts,
    )
