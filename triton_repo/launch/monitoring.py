"""What Prometheus scrapes and Grafana shows. Every metric is one of METRICS, which says where it was read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from triton_repo.deployment import Deployment

_TRITON = "docs/user_guide/metrics.md of triton-inference-server/server"
_BACKEND = "custom_metrics_reporter.cc of NVIDIA/TensorRT-LLM's triton_backend/inflight_batcher_llm"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """`label` is what tells its series apart beside model and version, `values` what it may be."""

    kind: Literal["counter", "gauge", "histogram"]
    source: str
    label: str | None = None
    values: tuple[str, ...] = ()


METRICS = {
    "nv_inference_request_success": Metric(kind="counter", source=_TRITON),
    "nv_inference_request_failure": Metric(
        kind="counter",
        source=_TRITON,
        label="reason",
        values=("REJECTED", "CANCELED", "BACKEND", "OTHER"),
    ),
    "nv_inference_pending_request_count": Metric(kind="gauge", source=_TRITON),
    "nv_inference_request_duration_us": Metric(kind="counter", source=_TRITON),
    "nv_inference_queue_duration_us": Metric(kind="counter", source=_TRITON),
    # With --metrics-config=histogram_latencies=true, from 24.11 on.
    "nv_inference_first_response_histogram_ms": Metric(kind="histogram", source=_TRITON),
    "nv_gpu_utilization": Metric(kind="gauge", source=_TRITON, label="gpu_uuid"),
    "nv_gpu_memory_used_bytes": Metric(kind="gauge", source=_TRITON, label="gpu_uuid"),
    "nv_trt_llm_request_metrics": Metric(
        kind="gauge",
        source=_BACKEND,
        label="request_type",
        values=("active", "max", "scheduled", "context", "waiting"),
    ),
    "nv_trt_llm_kv_cache_block_metrics": Metric(
        kind="gauge",
        source=_BACKEND,
        label="kv_cache_block_type",
        values=("max", "free", "used", "tokens_per", "reused", "fraction"),
    ),
    "nv_llm_input_token_len": Metric(kind="histogram", source=_BACKEND, label="response_metric_type"),
    "nv_llm_output_token_len": Metric(kind="histogram", source=_BACKEND, label="response_metric_type"),
}
_FIRST = "nv_inference_first_response_histogram_ms"
_REQUESTS = "nv_trt_llm_request_metrics"
_BLOCKS = "nv_trt_llm_kv_cache_block_metrics"
# $model is the dashboard's choice, the others are of the model that holds the engine.
_MODEL = '{model="$model"}'
_ENGINE = '{model="tensorrt_llm"}'


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One graph; `queries` are PromQL by legend. A unit is Grafana's name for it."""

    title: str
    queries: dict[str, str]
    unit: str
    description: str


def _rate(metric: str, selector: str) -> str:
    return f"sum(rate({metric}{selector}[$__rate_interval]))"


def _quantile(share: float) -> str:
    series = f"rate({_FIRST}_bucket{_MODEL}[$__rate_interval])"
    return f"histogram_quantile({share}, sum by (le) ({series}))"


def _inter_token() -> str:
    """Milliseconds: from first response to end, over the tokens that came in that time."""
    total = f"{_rate('nv_inference_request_duration_us', _ENGINE)} / 1000"
    first = _rate(f"{_FIRST}_sum", _ENGINE)
    tokens = _rate("nv_llm_output_token_len_sum", _ENGINE)
    requests = _rate("nv_llm_output_token_len_count", _ENGINE)
    return f"({total} - {first}) / ({tokens} - {requests})"


def _by(label: str, metric: str, *values: str) -> dict[str, str]:
    return {v: f'sum({metric}{{model="tensorrt_llm", {label}="{v}"}})' for v in values}


BOTH = (
    Panel(
        title="Time to first token",
        unit="ms",
        queries={
            "mean": f"{_rate(f'{_FIRST}_sum', _MODEL)} / {_rate(f'{_FIRST}_count', _MODEL)}",
            "p50": _quantile(0.5),
            "p95": _quantile(0.95),
            "p99": _quantile(0.99),
        },
        description="From the request to its first response, in the server. A request that does not stream "
        "has one response, the whole text. Quantiles are as fine as the buckets: 100, 500, 2000 and 5000 ms "
        "unless the model's model_metrics say otherwise.",
    ),
    Panel(
        title="Queue",
        unit="short",
        queries={"pending": f"sum by (model) (nv_inference_pending_request_count{_ENGINE})"},
        description="Requests that Triton holds and has not given to the backend.",
    ),
    Panel(
        title="Queue time",
        unit="ms",
        queries={
            "mean": f"{_rate('nv_inference_queue_duration_us', _ENGINE)} / 1000 / "
            f"{_rate('nv_inference_request_success', _ENGINE)}"
        },
        description="Mean time of a request in Triton's queue; waiting inside TensorRT-LLM is not in it.",
    ),
    Panel(
        title="Requests",
        unit="reqps",
        queries={"answered": _rate("nv_inference_request_success", _MODEL)},
        description="Requests that ended well, a second.",
    ),
    Panel(
        title="Failures",
        unit="reqps",
        queries={
            "{{reason}}": f"sum by (reason) (rate(nv_inference_request_failure{_MODEL}[$__rate_interval]))"
        },
        description="Failed requests a second by reason. An ensemble counts its models' failures as OTHER.",
    ),
    Panel(
        title="GPU utilization",
        unit="percentunit",
        queries={"{{gpu_uuid}}": "nv_gpu_utilization"},
        description="Share of time in which a kernel ran, of each GPU that the first rank's host shows.",
    ),
    Panel(
        title="GPU memory",
        unit="bytes",
        queries={"{{gpu_uuid}}": "nv_gpu_memory_used_bytes"},
        description="Used memory of each GPU that the first rank's host shows.",
    ),
)
ENGINE_ONLY = (
    Panel(
        title="Inter-token latency, derived",
        unit="ms",
        queries={"mean": _inter_token()},
        description="No metric tells it: (request duration - time to first response) / (output tokens - "
        "requests). Right where requests stream; others have no time after their first response and pull it "
        "down.",
    ),
    Panel(
        title="Request duration",
        unit="ms",
        queries={
            "mean": f"{_rate('nv_inference_request_duration_us', _MODEL)} / 1000 / "
            f"{_rate('nv_inference_request_success', _MODEL)}"
        },
        description="Mean time from a request to its last token.",
    ),
    Panel(
        title="Tokens",
        unit="short",
        queries={
            "output/s": _rate("nv_llm_output_token_len_sum", _ENGINE),
            "input/s": _rate("nv_llm_input_token_len_sum", _ENGINE),
        },
        description="Tokens a second of the requests that ended; each counts in the moment it ends.",
    ),
    Panel(
        title="Requests in TensorRT-LLM",
        unit="short",
        queries=_by("request_type", _REQUESTS, "active", "scheduled", "context", "waiting"),
        description="Active are all, scheduled those in the running batch, context those in their prompt, "
        "waiting those not scheduled.",
    ),
    Panel(
        title="KV cache",
        unit="percentunit",
        queries={
            "used": " / ".join(
                f'sum({_BLOCKS}{{model="tensorrt_llm", kv_cache_block_type="{kind}"}})'
                for kind in ("used", "max")
            )
        },
        description="Used blocks of all blocks.",
    ),
)


def panels(deployment: Deployment) -> tuple[Panel, ...]:
    """The LLM API's model runs in Python: Triton times only its first response, and counts no tokens.

    (A decoupled Python model is timed to the return of execute: pb_metric_reporter.cc of
    triton-inference-server/python_backend.)
    """
    return BOTH if deployment.flavour == "llmapi" else BOTH[:1] + ENGINE_ONLY + BOTH[1:]


def dashboard(deployment: Deployment) -> dict[str, Any]:
    """A dashboard to import, or to lay where Grafana's provisioning looks."""
    return {
        "title": f"Triton: {deployment.repository.name}",
        "description": "Latency, load and failures of one deployment. Import it, or start compose.yaml with "
        "the profile monitoring.",
        "uid": None,
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "",
        "tags": ["triton"],
        "templating": {"list": [_datasource(), _model(deployment)]},
        "panels": [_graph(number, panel) for number, panel in enumerate(panels(deployment))],
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _model(deployment: Deployment) -> dict[str, Any]:
    """The model that clients ask, which is another one with e.g. a draft."""
    query = "label_values(nv_inference_request_success, model)"
    return {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": query, "refId": "model"},
        "refresh": 2,
        "current": {"text": deployment.text_model, "value": deployment.text_model, "selected": True},
    }


def _graph(number: int, panel: Panel) -> dict[str, Any]:
    """Two in a row of Grafana's 24 columns."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": source,
        "gridPos": {"x": 12 * (number % 2), "y": 8 * (number // 2), "w": 12, "h": 8},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": source, "expr": expression, "legendFormat": legend}
            for i, (legend, expression) in enumerate(panel.queries.items())
        ],
    }


def prometheus(target: str) -> dict[str, Any]:
    """The content of prometheus.yaml: one server's metrics, `target` its host and port."""
    return {
        "global": {"scrape_interval": "5s"},
        "scrape_configs": [{"job_name": "triton", "static_configs": [{"targets": [target]}]}],
    }


def grafana_datasource() -> dict[str, Any]:
    """Grafana's provisioning: the Prometheus of compose.yaml."""
    source = {"name": "Prometheus", "type": "prometheus", "url": "http://prometheus:9090", "isDefault": True}
    return {"apiVersion": 1, "datasources": [source]}


def grafana_dashboards() -> dict[str, Any]:
    """Grafana's provisioning: where the dashboard lies."""
    provider = {"name": "triton", "type": "file", "options": {"path": "/var/lib/grafana/dashboards"}}
    return {"apiVersion": 1, "providers": [provider]}
