"""kubernetes.yaml: one server on one node, and the parts of a pod that it shares with several nodes."""

from __future__ import annotations

import re
from typing import Any

from builder.errors import UserError
from triton_repo.deployment import Deployment
from triton_repo.launch.commands import environment, server_command, stop_timeout_s
from triton_repo.launch.images import image_of
from triton_repo.launch.placement import (
    SHM_GIB,
    START_S,
    common_parent,
    num_gpus,
    num_nodes,
    numbered_from_zero,
    ports,
)
from triton_repo.launch.probe import probe_command

DRAIN_S = 30  # mpirun ends its ranks at once when it is told to stop, so requests under way end before that


def object_name(deployment: Deployment) -> str:
    """Of the Deployment and the Service: the repository's, as Kubernetes spells names."""
    words = re.sub("[^a-z0-9]+", "-", deployment.repository.name.lower())[:40].strip("-")
    return f"triton-{words}".rstrip("-")


def comment(deployment: Deployment, claim: str) -> str:
    """The head of a manifest."""
    parent = common_parent(deployment)
    chosen = image_of(deployment)
    default = (
        "\nThe image is the newest one: none has the release that was checked." if chosen.by_default else ""
    )
    return (
        f"Triton for {object_name(deployment)}: kubectl apply -f THIS_FILE\n"
        f"The claim {claim} must exist and hold at its root what {parent} holds here; it is mounted there, "
        f"read only.{default}"
    )


def manifests(
    deployment: Deployment, *, http_port: int, gpus_per_node: int, claim: str
) -> list[dict[str, Any]]:
    """A Deployment and its Service. Raises UserError where a node or a claim cannot hold it."""
    if num_nodes(deployment, gpus_per_node) > 1:
        raise UserError(
            f"gpus_per_node: {deployment.world_size} ranks need several nodes of {gpus_per_node} GPUs"
        )
    name, gpus = object_name(deployment), num_gpus(deployment)
    labels = {"app.kubernetes.io/name": name}
    container = {
        **serving_container(deployment, http_port, gpus),
        "args": server_command(deployment, http_port),  # after the image's own entrypoint
    }
    workload = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": 1,
            # A new pod finds no GPUs before an old one has given up its own.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
            "progressDeadlineSeconds": START_S + 600,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels, "annotations": scraped(http_port)},
                "spec": pod_spec(deployment, container, claim),
            },
        },
    }
    return [workload, service(name, http_port, labels)]


def pod_spec(deployment: Deployment, container: dict[str, Any], claim: str) -> dict[str, Any]:
    """A pod with the claim, shared memory, and no rights in the cluster."""
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": DRAIN_S + stop_timeout_s(deployment),
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [container],
        "volumes": [
            {"name": "models", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{SHM_GIB}Gi"}},
        ],
    }


def check_pod(deployment: Deployment) -> None:
    """Raises UserError where a pod numbers the GPUs otherwise, or no claim can hold the directories."""
    if not numbered_from_zero(deployment):
        named = ";".join(",".join(map(str, instance)) for instance in deployment.gpu_ids)
        raise UserError(
            f"gpu_ids: {named} are not in a pod, which numbers its GPUs 0 to {num_gpus(deployment) - 1}; "
            "write the repository with these"
        )
    common_parent(deployment)


def container(deployment: Deployment, gpus: int) -> dict[str, Any]:
    """The image with its mounts and GPUs. Raises UserError as `check_pod` does."""
    check_pod(deployment)
    parent = str(common_parent(deployment))
    return {
        "name": "triton",
        "image": image_of(deployment).name,
        "env": [{"name": name, "value": value} for name, value in environment(deployment).items()],
        "resources": {"limits": {"nvidia.com/gpu": gpus}},
        "securityContext": {"allowPrivilegeEscalation": False},
        "volumeMounts": [
            {"name": "models", "mountPath": parent, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def serving_container(deployment: Deployment, http_port: int, gpus: int) -> dict[str, Any]:
    """The container that serves, from when its models are loaded; ready means that a token came."""
    http, grpc, metrics = ports(http_port)
    return {
        **container(deployment, gpus),
        "ports": [
            {"name": "http", "containerPort": http},
            {"name": "grpc", "containerPort": grpc},
            {"name": "metrics", "containerPort": metrics},
        ],
        "startupProbe": {
            "httpGet": {"path": "/v2/health/ready", "port": "http"},
            "periodSeconds": 10,
            "failureThreshold": START_S // 10,
        },
        "livenessProbe": {
            "httpGet": {"path": "/v2/health/live", "port": "http"},
            "periodSeconds": 10,
            "timeoutSeconds": 5,
            "failureThreshold": 6,
        },
        "readinessProbe": {
            "exec": {"command": probe_command(deployment, http_port, timeout_s=25)},
            "periodSeconds": 30,
            "timeoutSeconds": 30,
            "failureThreshold": 3,
        },
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(DRAIN_S)]}}},
    }


def scraped(http_port: int) -> dict[str, str]:
    """Annotations by which a Prometheus in the cluster finds the metrics."""
    return {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(ports(http_port).metrics),
        "prometheus.io/path": "/metrics",
    }


def service(name: str, http_port: int, selector: dict[str, str]) -> dict[str, Any]:
    """The address inside the cluster, with the ports of the server."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/name": name}},
        "spec": {
            "selector": selector,
            "ports": [
                {"name": kind, "port": port, "targetPort": kind}
                for kind, port in zip(("http", "grpc", "metrics"), ports(http_port), strict=True)
            ],
        },
    }
