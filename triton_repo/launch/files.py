"""A directory with every file that starts and watches a deployment, and the lines to paste."""

from __future__ import annotations

from pathlib import Path

from builder.errors import UserError
from builder.storage import json_bytes, output_directory
from triton_repo.deployment import Deployment
from triton_repo.launch import compose, kubernetes, leaderworkerset, monitoring
from triton_repo.launch.commands import (
    TRITONSERVER,
    docker_command,
    environment,
    multi_node_command,
    server_command,
)
from triton_repo.launch.images import image_of
from triton_repo.launch.placement import GPUS_PER_NODE, num_nodes, ports
from triton_repo.launch.rendering import one_line, shell_script, yaml_file

PROMETHEUS = (
    "What Prometheus scrapes: --config.file=prometheus.yaml. Elsewhere than in compose.yaml, mend targets."
)


def command_lines(
    deployment: Deployment, *, http_port: int = 8000, gpus_per_node: int = GPUS_PER_NODE
) -> dict[str, str]:
    """Commands to paste: `server` (inside the image) and `docker`, or `slurm` for several nodes."""
    if num_nodes(deployment, gpus_per_node) > 1:
        command = multi_node_command(deployment, gpus_per_node=gpus_per_node, http_port=http_port)
        return {"slurm": one_line(command, {})}
    return {
        "server": one_line(server_command(deployment, http_port), environment(deployment)),
        "docker": one_line(docker_command(deployment, http_port), {}),
    }


def write(
    deployment: Deployment,
    directory: Path,
    *,
    http_port: int = 8000,
    gpus_per_node: int = GPUS_PER_NODE,
    claim: str = "models",
) -> list[Path]:
    """Write the files for one node, or for several where an instance needs them; all or nothing.

    `left_out` says what is not among them.

    Raises UserError where the deployment does not fit the nodes, no image has its release, or a claim
    cannot hold its directories.
    """
    texts = contents(deployment, http_port=http_port, gpus_per_node=gpus_per_node, claim=claim)
    with output_directory(directory) as partial:
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
            if name.endswith(".sh"):
                (partial / name).chmod(0o755)
    return [directory / name for name in texts]


def contents(deployment: Deployment, *, http_port: int, gpus_per_node: int, claim: str) -> dict[str, str]:
    """The files by name."""
    several = num_nodes(deployment, gpus_per_node) > 1
    files = _several_nodes if several else _one_node
    host = kubernetes.object_name(deployment) if several else "triton"
    target = f"{host}:{ports(http_port).metrics}"
    return {
        **files(deployment, http_port, gpus_per_node, claim),
        "prometheus.yaml": yaml_file(PROMETHEUS, monitoring.prometheus(target)),
        "grafana-dashboard.json": json_bytes(monitoring.dashboard(deployment)).decode(),
    }


def _one_node(deployment: Deployment, http_port: int, gpus_per_node: int, claim: str) -> dict[str, str]:
    name = image_of(deployment).name
    return {
        "start.sh": shell_script(
            f"Starts Triton on this host. Run it inside\n{name}.\n"
            "TRITONSERVER, where it is set, names another binary.",
            server_command(deployment, http_port),
            environment(deployment),
            {"TRITONSERVER": TRITONSERVER},
        ),
        "docker-run.sh": shell_script(
            "Starts Triton in a container of this host; docker stop ends it.",
            docker_command(deployment, http_port),
            {},
        ),
        "compose.yaml": yaml_file(compose.COMMENT, compose.compose(deployment, http_port)),
        **_kubernetes(deployment, http_port, gpus_per_node, claim),
        "grafana-datasource.yaml": yaml_file(
            "Grafana's data source, for compose.yaml", monitoring.grafana_datasource()
        ),
        "grafana-dashboards.yaml": yaml_file(
            "Where Grafana finds the dashboard, for compose.yaml", monitoring.grafana_dashboards()
        ),
    }


def left_out(deployment: Deployment) -> dict[str, str]:
    """The files of one node that cannot be had for this deployment, and why."""
    try:
        kubernetes.check_pod(deployment)
    except UserError as error:
        return {"kubernetes.yaml": str(error)}
    return {}


def _kubernetes(deployment: Deployment, http_port: int, gpus_per_node: int, claim: str) -> dict[str, str]:
    if left_out(deployment):
        return {}
    manifests = kubernetes.manifests(
        deployment, http_port=http_port, gpus_per_node=gpus_per_node, claim=claim
    )
    return {"kubernetes.yaml": yaml_file(kubernetes.comment(deployment, claim), *manifests)}


def _several_nodes(deployment: Deployment, http_port: int, gpus_per_node: int, claim: str) -> dict[str, str]:
    command = multi_node_command(deployment, gpus_per_node=gpus_per_node, http_port=http_port)
    manifests = leaderworkerset.manifests(
        deployment, http_port=http_port, gpus_per_node=gpus_per_node, claim=claim
    )
    return {
        "start-multi-node.sh": shell_script(
            "Starts Triton over the nodes of a Slurm allocation that has pyxis; the first task serves.\n"
            "Run it inside salloc, or give it to sbatch with the nodes and GPUs.",
            command,
            {},
        ),
        "leaderworkerset.yaml": yaml_file(leaderworkerset.head(deployment, claim), *manifests),
    }
