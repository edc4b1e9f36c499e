"""Where a deployment runs: its GPUs, nodes, ports and mounted directories."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from builder.errors import UserError
from triton_repo.deployment import Deployment

GPUS_PER_NODE = 8
START_S = 3600  # hundreds of GB may come from a network disk before the first port opens
SHM_GIB = 8  # a limit, not a reservation: NCCL and the Python backend's tensors


# What a mount must not cover; below the second no directory is a user's.
IMAGES_OWN = ("/", "/app", "/opt", "/root", "/run", "/tmp", "/var", "/workspace")
WHOLLY_IMAGES_OWN = (
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/lib",
    "/lib64",
    "/opt/tritonserver",
    "/proc",
    "/sbin",
    "/sys",
    "/usr",
)


class Ports(NamedTuple):
    """What a server listens on."""

    http: int
    grpc: int
    metrics: int


def ports(http_port: int) -> Ports:
    """Three in a row, as 8000, 8001 and 8002 of Triton. Raises UserError where they are no ports."""
    if not 1 <= http_port <= 65533:
        raise UserError(f"http_port: {http_port} is not between 1 and 65533; choose another")
    return Ports(http_port, http_port + 1, http_port + 2)


def num_gpus(deployment: Deployment) -> int:
    """GPUs of all instances; instances may share them where `gpu_ids` says so."""
    named = {gpu for instance in deployment.gpu_ids for gpu in instance}
    return len(named) or deployment.world_size * deployment.instances


def highest_gpu(deployment: Deployment) -> int:
    """The number of the last GPU that an instance uses."""
    named = [gpu for instance in deployment.gpu_ids for gpu in instance]
    return max(named, default=num_gpus(deployment) - 1)


def numbered_from_zero(deployment: Deployment) -> bool:
    """Whether the GPUs are the first ones: a container that has these alone numbers them alike."""
    return highest_gpu(deployment) == num_gpus(deployment) - 1


def num_nodes(deployment: Deployment, gpus_per_node: int) -> int:
    """Nodes that one instance needs. Raises UserError where its ranks do not fit or fill them."""
    if gpus_per_node < 1:
        raise UserError(f"gpus_per_node: {gpus_per_node} is less than 1; give the GPUs of one node")
    world_size = deployment.world_size
    if world_size <= gpus_per_node:
        if num_gpus(deployment) > gpus_per_node:
            raise UserError(
                f"instances: {deployment.instances} of {world_size} ranks need {num_gpus(deployment)} GPUs, "
                f"a node has {gpus_per_node}; lower it and start more servers"
            )
        return 1
    if world_size % gpus_per_node:
        raise UserError(
            f"gpus_per_node: {gpus_per_node} does not divide the {world_size} ranks; "
            "give as many GPUs of each node as do"
        )
    nodes = world_size // gpus_per_node
    # Orchestrator mode spawns ranks on its own node alone, and so does the LLM API with several instances:
    # docs/llama_multi_instance.md and docs/llmapi.md of triton-inference-server/tensorrtllm_backend.
    if deployment.instances > 1:
        raise UserError(f"instances: {deployment.instances} of {nodes} nodes each; start one server for each")
    if deployment.gpu_ids:
        raise UserError(f"gpu_ids: every one of {nodes} nodes numbers its GPUs from 0; leave it out")
    if deployment.draft and deployment.flavour == "engine":
        raise UserError(f"draft: works on one node, {world_size} ranks need {nodes}; leave it out")
    return nodes


def mounts(deployment: Deployment) -> tuple[Path, ...]:
    """The directories a container must see, the repository first; none lies inside another."""
    paths = (deployment.repository, *deployment.directories)
    for path in paths:
        if not path.is_absolute() or set(str(path)) & set(":,\n"):
            raise UserError(
                f"{path}: cannot be mounted; use an absolute path without colon, comma or newline"
            )
    outer = [p for p in paths if not any(p != other and p.is_relative_to(other) for other in paths)]
    return tuple(dict.fromkeys(outer))


def common_parent(deployment: Deployment) -> Path:
    """The directory in which one volume holds all of them. Raises UserError where only the image's own do."""
    parent = Path(os.path.commonpath(mounts(deployment)))
    if str(parent) in IMAGES_OWN or any(parent.is_relative_to(place) for place in WHOLLY_IMAGES_OWN):
        others = ", ".join(map(str, mounts(deployment)[1:]))
        raise UserError(
            f"{deployment.repository}: has no directory but {parent} in common with {others}; a claim "
            "mounted there would hide the image's own files; move them under one directory, e.g. /models"
        )
    return parent
