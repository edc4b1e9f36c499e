"""leaderworkerset.yaml: one instance over several nodes, a pod for each.

mpirun in the leader's pod starts the ranks of the others through `kubectl exec`, as Triton's tutorial
EKS_Multinode_Triton_TRTLLM does; that and the service account are all it needs of the cluster, and no pod
runs an ssh server.
"""

from __future__ import annotations

import shlex
from typing import Any

from triton_repo.deployment import Deployment
from triton_repo.launch.commands import multi_node_command
from triton_repo.launch.images import image_of
from triton_repo.launch.kubernetes import (
    comment,
    container,
    object_name,
    pod_spec,
    scraped,
    service,
    serving_container,
)
from triton_repo.launch.placement import num_nodes
from triton_repo.launch.rendering import continued

LEADER = "leaderworkerset.sigs.k8s.io/worker-index"
NAME = "leaderworkerset.sigs.k8s.io/name"
SHELL_DIRECTORY = "/etc/remote-shell"
REMOTE_SHELL = """\
#!/bin/bash
# HOST COMMAND...: mpirun's way to the other pods.
exec kubectl exec "$1" -- /bin/sh -c "${*:2}"
"""
WORKER = """\
trap 'exit 0' TERM
sleep infinity &
wait
"""


def head(deployment: Deployment, claim: str) -> str:
    """The head of the manifest: what the cluster and the image must have beyond a single node's."""
    base = image_of(deployment).name
    return (
        f"{comment(deployment, claim)}\n"
        "Needs LeaderWorkerSet (lws.sigs.k8s.io) in the cluster, a claim that all nodes can mount, and\n"
        f"kubectl in the image: build one FROM {base}\n"
        "with kubectl on PATH and name it here in both places.\n"
        "Without your network's own resource (EFA, RDMA) in the limits NCCL goes over TCP.\n"
        "For more replicas, name their pods in the Role as well."
    )


def manifests(
    deployment: Deployment, *, http_port: int, gpus_per_node: int, claim: str
) -> list[dict[str, Any]]:
    """The LeaderWorkerSet, its Service, and what lets the leader reach the workers."""
    nodes = num_nodes(deployment, gpus_per_node)
    name = object_name(deployment)
    workload = {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": name},
        "spec": {
            "replicas": 1,
            "startupPolicy": "LeaderCreated",  # the leader is ready only after the workers are
            "leaderWorkerTemplate": {
                "size": nodes,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": _leader(deployment, nodes, http_port, gpus_per_node, claim),
                "workerTemplate": _worker(deployment, gpus_per_node, claim),
            },
        },
    }
    address = service(name, http_port, {NAME: name, LEADER: "0"})
    return [*_access(name, nodes), workload, address]


def _leader(
    deployment: Deployment, nodes: int, http_port: int, gpus_per_node: int, claim: str
) -> dict[str, Any]:
    # Kubernetes puts the pod's name in the place of $(POD_NAME); the workers' names are made from it.
    hosts = ["$(POD_NAME)", *(f"$(POD_NAME)-{node}" for node in range(1, nodes))]
    command = multi_node_command(
        deployment,
        hosts,
        gpus_per_node=gpus_per_node,
        http_port=http_port,
        remote_shell=f"{SHELL_DIRECTORY}/kubectl-exec",
    )
    serving = serving_container(deployment, http_port, gpus_per_node)
    serving["args"] = ["bash", "-c", _start(deployment, hosts[1:], command)]
    serving["env"].append({"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}})
    serving["volumeMounts"].append({"name": "remote-shell", "mountPath": SHELL_DIRECTORY, "readOnly": True})
    spec = pod_spec(deployment, serving, claim)
    name = object_name(deployment)
    spec |= {"automountServiceAccountToken": True, "serviceAccountName": name}
    spec["volumes"].append({"name": "remote-shell", "configMap": {"name": name, "defaultMode": 0o555}})
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/component": "leader"}
    return {"metadata": {"labels": labels, "annotations": scraped(http_port)}, "spec": spec}


def _start(deployment: Deployment, workers: list[str], command: list[str]) -> str:
    """The leader's script: check the image, wait for the workers, become mpirun."""
    missing = (
        "kubectl: not in this image, and mpirun reaches the other nodes through it; "
        f"build an image with it FROM {image_of(deployment).name}"
    )
    return (
        "set -eu\n"
        f"command -v kubectl > /dev/null || {{ echo {shlex.quote(missing)} >&2; exit 1; }}\n"
        f"for pod in {shlex.join(workers)}; do\n"
        '  until kubectl exec "$pod" -- true; do\n'
        '    echo "waiting for $pod"\n'
        "    sleep 5\n"
        "  done\n"
        "done\n"
        f"exec {continued(command, '  ')}\n"
    )


def _worker(deployment: Deployment, gpus_per_node: int, claim: str) -> dict[str, Any]:
    """A pod that waits for mpirun to start its ranks."""
    waiting = {**container(deployment, gpus_per_node), "args": ["bash", "-c", WORKER]}
    labels = {
        "app.kubernetes.io/name": object_name(deployment),
        "app.kubernetes.io/component": "worker",
    }
    return {"metadata": {"labels": labels}, "spec": pod_spec(deployment, waiting, claim)}


def _access(name: str, nodes: int) -> list[dict[str, Any]]:
    """The remote shell, and the right to run it in the workers' pods alone."""
    metadata = {"name": name}
    pods = [f"{name}-0-{node}" for node in range(1, nodes)]
    group = "rbac.authorization.k8s.io"
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata,
            "data": {"kubectl-exec": REMOTE_SHELL},
        },
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {
            "apiVersion": f"{group}/v1",
            "kind": "Role",
            "metadata": metadata,
            "rules": [
                {"apiGroups": [""], "resources": ["pods"], "resourceNames": pods, "verbs": ["get"]},
                # kubectl asks with POST or, through a web socket, with GET.
                {
                    "apiGroups": [""],
                    "resources": ["pods/exec"],
                    "resourceNames": pods,
                    "verbs": ["create", "get"],
                },
            ],
        },
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": {"apiGroup": group, "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name}],
        },
    ]
