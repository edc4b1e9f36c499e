"""The report of a trtllm-bench run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.errors import UserError
from builder.storage import read_json


@dataclass(frozen=True, kw_only=True)
class Percentiles:
    """Of one run, over its requests, each a value of the sorted list and not interpolated."""

    p50: float
    p90: float
    p99: float
    mean: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run as trtllm-bench reports it; a time per token is the mean of a request.

    `backend` is TRT or Pytorch: what ran, which without --backend is not always what was meant.
    """

    backend: str
    requests: int
    output_tokens: float
    ttft_ms: Percentiles
    token_ms: Percentiles
    latency_ms: Percentiles
    tokens_per_s: float
    user_tokens_per_s: float


def read(file: Path) -> Result:
    """Read a --report_json file (tensorrt_llm/bench/dataclasses/reporting.py).

    Raises UserError naming the field that is missing or no positive number.
    """
    values = read_json(file)
    return Result(
        backend=str(values.get("engine", {}).get("backend")),
        requests=int(_number(file, values, "request_info", "num_requests")),
        output_tokens=_number(file, values, "request_info", "avg_output_length"),
        ttft_ms=_percentiles(file, values, "streaming_metrics", "ttft_percentiles"),
        token_ms=_percentiles(file, values, "streaming_metrics", "tpot_percentiles"),
        latency_ms=_percentiles(file, values, "performance", "request_latency_percentiles_ms"),
        tokens_per_s=_number(file, values, "performance", "system_output_throughput_tok_s"),
        user_tokens_per_s=_number(file, values, "performance", "output_throughput_per_user_tok_s"),
    )


def _percentiles(file: Path, values: Mapping[str, Any], *path: str) -> Percentiles:
    names = {"p50": "p50", "p90": "p90", "p99": "p99", "mean": "average"}
    return Percentiles(**{ours: _number(file, values, *path, theirs) for ours, theirs in names.items()})


def _number(file: Path, values: Any, *path: str) -> float:
    for name in path:
        values = values.get(name) if isinstance(values, Mapping) else None
    if not isinstance(values, int | float) or isinstance(values, bool) or not values > 0:
        raise UserError(f"{file}: {'.'.join(path)} is {values!r}, not a positive number")
    return float(values)
