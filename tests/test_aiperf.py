"""compare-latency --load-generator aiperf: what aiperf is told, and what it wrote on a real run.

data/aiperf is from aiperf 0.13.0 against tritonserver 2.51 with the embedded engine of a tiny model, cut to
the metrics named here. The last test runs the real aiperf where it is installed or AIPERF names it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from builder.errors import UserError
from ffn_fusion import main
from triton_repo import aiperf
from triton_repo.client import Endpoint
from triton_repo.dialect import LLMAPI
from triton_repo.server import Server

DATA = Path(__file__).parent / "data" / "aiperf"
END = Endpoint("http://127.0.0.1:8000")


def test_golden_arguments() -> None:
    files = {name: Path(f"/{name}") for name in ("tokenizer", "prompts", "template", "output")}
    assert aiperf.arguments(END, requests=4, level=8, **files) == [
        *("profile", "--model", "ensemble", "--tokenizer", "/tokenizer", "--url", "http://127.0.0.1:8000"),
        *("--endpoint-type", "template", "--custom-endpoint", "/v2/models/ensemble/generate_stream"),
        *("--extra-inputs", '{"payload_template": "/template", "response_field": "text_output"}'),
        *("--input-file", "/prompts", "--custom-dataset-type", "single_turn"),
        *("--dataset-sampling-strategy", "sequential", "--request-count", "4"),
        *("--warmup-request-count", "8", "--concurrency", "8", "--random-seed", "1"),
        *("--artifact-dir", "/output", "--ui", "none"),
        *("--streaming", "--no-gpu-telemetry", "--no-server-metrics"),
    ]


def test_golden_templates() -> None:
    assert aiperf.template(END, 16) == '{"text_input": {{ text|tojson }}, "max_tokens": 16, "stream": true}'
    assert aiperf.template(replace(END, model="tensorrt_llm", dialect=LLMAPI), 16) == (
        '{"text_input": {{ text|tojson }}, "sampling_param_max_tokens": 16, "streaming": true}'
    )


def test_template_keeps_a_prompt_as_it_is() -> None:
    from jinja2 import Environment

    prompt = 'a "quote", <tag>, \\ and {{ braces }}\n日本語'
    body = Environment(autoescape=True).from_string(aiperf.template(END, 3)).render(text=prompt)
    assert json.loads(body) == {"text_input": prompt, "max_tokens": 3, "stream": True}


def test_a_real_run_is_read() -> None:
    result = aiperf.read(DATA, "baseline", 2, requests=4)
    summary = json.loads((DATA / aiperf.SUMMARY).read_text())
    # Not what warmed up: aiperf's own averages are of the four requests that count.
    for ours, theirs in (("ttft_ms", "time_to_first_token"), ("latency_ms", "request_latency")):
        assert len(result.values[ours]) == summary[theirs]["count"] == 4
        assert sum(result.values[ours]) / 4 == pytest.approx(summary[theirs]["avg"])
    for gap, ttft, latency, length in zip(
        *(result.values[name] for name in ("inter_token_ms", "ttft_ms", "latency_ms")),
        result.lengths,
        strict=True,
    ):
        assert ttft + gap * (length - 1) == pytest.approx(latency, rel=1e-3)
    seconds = summary["benchmark_duration"]["avg"]
    assert result.values["tokens_per_s"][0] == pytest.approx(sum(result.lengths) / seconds, rel=1e-3)
    assert aiperf.version(DATA) == "0.13.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: {**r, "error": {"message": "data: {max_input_len is 96}\n\n"}},
            "4 of 4 requests failed: ",
        ),
        (lambda r: {**r, "metrics": {}}, "inter_chunk_latency is missing"),
        (lambda r: {**r, "metadata": {"benchmark_phase": "warmup"}}, "0 of 4 requests"),
        (
            lambda r: {**r, "metrics": {**r["metrics"], "request_latency": {"value": 1, "unit": "s"}}},
            "request_latency is in s, not ms",
        ),
        (
            lambda r: {**r, "metrics": {**r["metrics"], "inter_chunk_latency": {"value": [], "unit": "ms"}}},
            "a request has one response with text",
        ),
    ],
)
def test_other_records_are_refused(tmp_path: Path, change, message: str) -> None:
    records = [json.loads(line) for line in (DATA / aiperf.RECORDS).read_text().splitlines()]
    counted = [r for r in records if r["metadata"]["benchmark_phase"] == "profiling"]
    (tmp_path / aiperf.RECORDS).write_text("\n".join(json.dumps(change(r)) for r in counted))
    with pytest.raises(UserError, match=message) as raised:
        aiperf.read(tmp_path, "baseline", 2, requests=4)
    assert "\n" not in str(raised.value)


def script(file: Path, text: str) -> str:
    file.write_text(f"#!{sys.executable}\n{text}")
    file.chmod(stat.S_IRWXU)
    return str(file)


def test_failed_aiperf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "print('aiperf.exceptions.TokenizerError: no such thing'); print('Log: x'); raise SystemExit(1)"
    monkeypatch.setenv("AIPERF", script(tmp_path / "aiperf", words))
    with pytest.raises(
        UserError, match=r"aiperf: aiperf\.exceptions\.TokenizerError: no such thing; the log"
    ):
        aiperf.run(
            END, "baseline", 1, tokenizer=tmp_path, prompts=["a"], max_tokens=4, directory=tmp_path / "r"
        )
    assert json.loads((tmp_path / "r" / "prompts.jsonl").read_text()) == {"text": "a"}


def test_missing_aiperf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIPERF", str(tmp_path / "none"))
    arguments = ["compare-latency", "http://a", "http://b", "-o", str(tmp_path / "r")]
    arguments += ["--load-generator", "aiperf", "--tokenizer", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert f"{tmp_path / 'none'}: not found; pip install 'ffn-fusion[aiperf]'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    monkeypatch.delenv("AIPERF")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match="aiperf: not found; pip install"):
        aiperf.find()


def installed() -> bool:
    return bool(os.environ.get("AIPERF")) or importlib.util.find_spec("aiperf") is not None


@pytest.mark.skipif(not installed(), reason="aiperf is not installed and AIPERF names none")
def test_real_aiperf(tiny_engine: Path, tiny_hf: Path, tmp_path: Path) -> None:
    from triton_repo.repository import write_repository

    write_repository(tiny_engine, tiny_hf, tmp_path / "repository")
    with Server(tmp_path / "repository") as server:
        arguments = ["compare-latency", server.url, server.url, "-o", str(tmp_path / "report"), "--json"]
        arguments += ["--load-generator", "aiperf", "--tokenizer", str(tiny_hf), "--rounds", "2"]
        result = CliRunner().invoke(main, [*arguments, "--concurrency", "2", "--max-tokens", "24"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    rows = {row["metric"]: row for row in values["rows"]}
    assert set(rows) == {"ttft_ms", "inter_token_ms", "latency_ms", "tokens_per_s", "user_tokens_per_s"}
    assert rows["latency_ms"]["baseline"]["count"] == 2 * 4
    assert rows["latency_ms"]["baseline"]["p50"] > rows["ttft_ms"]["baseline"]["p50"] > 0
    assert values["method"].startswith("through Triton, by aiperf 0.")
    assert (tmp_path / "report" / "runs" / "candidate-2-2" / aiperf.SUMMARY).is_file()
