"""compose.yaml: the server, and Prometheus with Grafana in the profile `monitoring`."""

from __future__ import annotations

from typing import Any

from triton_repo.deployment import Deployment
from triton_repo.launch.commands import environment, server_command, stop_timeout_s
from triton_repo.launch.images import image_of
from triton_repo.launch.placement import SHM_GIB, START_S, mounts, num_gpus, numbered_from_zero, ports
from triton_repo.launch.probe import probe_command

PROMETHEUS = "prom/prometheus:v3.2.1"
GRAFANA = "grafana/grafana:11.6.0"
COMMENT = """\
Triton with the GPUs of this host: docker compose up -d
With Prometheus and Grafana on http://127.0.0.1:3000: docker compose --profile monitoring up -d"""


def compose(deployment: Deployment, http_port: int = 8000) -> dict[str, Any]:
    """The content of compose.yaml, for the Compose Specification."""
    return {
        "services": {
            "triton": _literal(_triton(deployment, http_port)),
            "prometheus": _prometheus(),
            "grafana": _grafana(),
        }
    }


def _triton(deployment: Deployment, http_port: int) -> dict[str, Any]:
    return {
        "image": image_of(deployment).name,
        "command": server_command(deployment, http_port),
        "environment": environment(deployment),
        "ports": [f"{port}:{port}" for port in ports(http_port)],
        "volumes": [_bind(str(path), str(path)) for path in mounts(deployment)],
        "shm_size": f"{SHM_GIB}gb",
        "ulimits": {"memlock": -1, "stack": 67108864},
        "deploy": {"resources": {"reservations": {"devices": [_gpus(deployment)]}}},
        "healthcheck": {
            "test": ["CMD", *probe_command(deployment, http_port, timeout_s=25)],
            "interval": "30s",
            "timeout": "30s",
            "retries": 3,
            "start_period": f"{START_S}s",
        },
        "stop_grace_period": f"{stop_timeout_s(deployment)}s",
        "restart": "unless-stopped",
    }


def _gpus(deployment: Deployment) -> dict[str, Any]:
    """All, unless the container numbers its share as the repository does."""
    device: dict[str, Any] = {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    if deployment.gpu_ids and numbered_from_zero(deployment):
        del device["count"]
        device["device_ids"] = [str(gpu) for gpu in range(num_gpus(deployment))]
    return device


def _prometheus() -> dict[str, Any]:
    return {
        "image": PROMETHEUS,
        "profiles": ["monitoring"],
        "ports": ["127.0.0.1:9090:9090"],
        "volumes": [_bind("./prometheus.yaml", "/etc/prometheus/prometheus.yml")],
    }


def _grafana() -> dict[str, Any]:
    """On this host's loopback: anyone there may read it, its administrator change it."""
    provisioning = "/etc/grafana/provisioning"
    return {
        "image": GRAFANA,
        "profiles": ["monitoring"],
        "depends_on": ["prometheus"],
        "environment": {"GF_AUTH_ANONYMOUS_ENABLED": "true", "GF_AUTH_DISABLE_LOGIN_FORM": "true"},
        "ports": ["127.0.0.1:3000:3000"],
        "volumes": [
            _bind("./grafana-datasource.yaml", f"{provisioning}/datasources/prometheus.yaml"),
            _bind("./grafana-dashboards.yaml", f"{provisioning}/dashboards/triton.yaml"),
            _bind("./grafana-dashboard.json", "/var/lib/grafana/dashboards/triton.json"),
        ],
    }


def _bind(source: str, target: str) -> dict[str, Any]:
    """A mount that fails where the source is missing; the short form would make it, owned by root."""
    return {
        "type": "bind",
        "source": source,
        "target": target,
        "read_only": True,
        "bind": {"create_host_path": False},
    }


def _literal(value: Any) -> Any:
    """Compose replaces ${NAME}; a dollar sign of ours is meant as it is."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return value.replace("$", "$$") if isinstance(value, str) else value
