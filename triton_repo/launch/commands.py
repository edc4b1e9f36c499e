"""The commands that start a server: on one host, in a container, over several nodes.

TensorRT-LLM's own launcher is triton_backend/scripts/launch_triton_server.py; where these commands
differ from what it builds, a comment says why.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from builder.errors import UserError
from triton_repo.deployment import Deployment, Flavour
from triton_repo.launch.images import image_of
from triton_repo.launch.placement import (
    GPUS_PER_NODE,
    SHM_GIB,
    highest_gpu,
    mounts,
    num_gpus,
    num_nodes,
    numbered_from_zero,
    ports,
)

TRITONSERVER = "/opt/tritonserver/bin/tritonserver"
# The images' user is root. Unbound: mpirun would give each rank, with all its threads, one core, and the
# ranks of two servers the same ones.
MPIRUN = ("mpirun", "--allow-run-as-root", "--bind-to", "none")
# Seconds that requests under way have to end. The LLM API ends its worker processes after them.
EXIT_TIMEOUT_S: dict[Flavour, int] = {"engine": 30, "llmapi": 120}


def stop_timeout_s(deployment: Deployment) -> int:
    """Seconds after which a server that was told to stop may be killed."""
    return EXIT_TIMEOUT_S[deployment.flavour] + 30


def orchestrated(deployment: Deployment) -> bool:
    """Whether one process spawns the ranks of several models or instances, else each rank is a server.

    Several instances: docs/llama_multi_instance.md of triton-inference-server/tensorrtllm_backend; a draft
    model: docs/source/legacy/advanced/speculative-decoding.md and examples/draft_target_model/README.md of
    NVIDIA/TensorRT-LLM. Both start the launcher with --multi-model.
    """
    return deployment.flavour == "engine" and (deployment.instances > 1 or deployment.draft)


def environment(deployment: Deployment) -> dict[str, str]:
    """Variables the server needs."""
    if not orchestrated(deployment):
        return {}
    return {"TRTLLM_ORCHESTRATOR": "1", "TRTLLM_ORCHESTRATOR_SPAWN_PROCESSES": "1"}


def server_command(deployment: Deployment, http_port: int = 8000) -> list[str]:
    """Start all ranks on this host, inside the image or where TensorRT-LLM's Triton is installed."""
    leader = _leader(deployment, http_port)
    if deployment.flavour == "llmapi":
        return leader  # LLM spawns its ranks; several instances ask for no mpirun (docs/llmapi.md there)
    if orchestrated(deployment):
        return [*MPIRUN, "-n", "1", *leader, *_no_pools(deployment)]
    return [*MPIRUN, *_ranks(deployment, http_port)]


def docker_command(deployment: Deployment, http_port: int = 8000) -> list[str]:
    """Run the server in the image of the release that built the engine.

    GPUs keep their numbers only where the container has all of them or the first ones.
    """
    some = deployment.gpu_ids and numbered_from_zero(deployment)
    devices = ",".join(map(str, range(num_gpus(deployment))))
    return [
        *("docker", "run", "--rm"),
        *("--gpus", f'"device={devices}"' if some else "all"),
        *("--shm-size", f"{SHM_GIB}g"),
        *("--ulimit", "memlock=-1", "--ulimit", "stack=67108864"),
        *("--stop-timeout", str(stop_timeout_s(deployment))),
        *(word for port in ports(http_port) for word in ("-p", f"{port}:{port}")),
        *(word for item in environment(deployment).items() for word in ("-e", "=".join(item))),
        *(word for path in mounts(deployment) for word in ("-v", f"{path}:{path}:ro")),
        image_of(deployment).name,
        *server_command(deployment, http_port),
    ]


def multi_node_command(
    deployment: Deployment,
    hosts: Sequence[str] = (),
    *,
    gpus_per_node: int = GPUS_PER_NODE,
    http_port: int = 8000,
    remote_shell: str | None = None,
) -> list[str]:
    """Start one instance over several nodes; the first one serves.

    With `hosts` through mpirun, which reaches them by `remote_shell HOST COMMAND...` or ssh; without, through
    srun and its pyxis containers. Raises UserError where one node is enough or `hosts` are not as many.
    """
    nodes = num_nodes(deployment, gpus_per_node)
    if nodes == 1:
        raise UserError(
            f"gpus_per_node: {gpus_per_node} GPUs hold all {deployment.world_size} ranks; use one node"
        )
    if deployment.flavour == "llmapi" and len(str(deployment.repository).split()) > 1:
        raise UserError(f"{deployment.repository}: trtllm-llmapi-launch cuts it at the spaces; rename it")
    if not hosts:
        return _srun(deployment, nodes, gpus_per_node, http_port)
    if len(hosts) != nodes:
        raise UserError(
            f"hosts: {len(hosts)} for {deployment.world_size} ranks, {gpus_per_node} a node; give {nodes}"
        )
    # Ranks fill the first host's slots, then the next one's (EKS_Multinode_Triton_TRTLLM of
    # triton-inference-server/tutorials starts them so).
    agent = [] if remote_shell is None else ["--mca", "plm_rsh_agent", remote_shell]
    slots = ",".join(f"{host}:{gpus_per_node}" for host in hosts)
    start = [*MPIRUN, *agent, "--host", slots]
    if deployment.flavour == "engine":
        return [*start, *_ranks(deployment, http_port)]
    return [*start, "-n", str(deployment.world_size), *_llmapi_rank(deployment, http_port)]


def _srun(deployment: Deployment, nodes: int, gpus_per_node: int, http_port: int) -> list[str]:
    """As docs/llmapi.md and README.md (Slurm) of triton-inference-server/tensorrtllm_backend do."""
    binds = ",".join(f"{path}:{path}:ro" for path in mounts(deployment))
    start = [
        *("srun", f"--nodes={nodes}", f"--ntasks-per-node={gpus_per_node}", "--mpi=pmix"),
        f"--container-image={image_of(deployment).name.replace('/', '#', 1)}",
        f"--container-mounts={binds}",
    ]
    if deployment.flavour == "llmapi":
        return [*start, *_llmapi_rank(deployment, http_port)]
    leader = shlex.join(_leader(deployment, http_port))
    worker = f'{shlex.join(_worker(deployment))} "{_shm_prefix("${SLURM_PROCID}", http_port)}"'
    choice = f'if [ "$SLURM_PROCID" -eq 0 ]; then exec {leader}; else exec {worker}; fi'
    return [*start, "bash", "-c", choice]


def _llmapi_rank(deployment: Deployment, http_port: int) -> list[str]:
    """What every rank runs: rank 0 becomes the server, the others wait for its work."""
    return ["trtllm-llmapi-launch", *_leader(deployment, http_port)]


def _ranks(deployment: Deployment, http_port: int) -> list[str]:
    """mpirun's program list of leader mode: one server a rank."""
    words = ["-n", "1", *_leader(deployment, http_port)]
    for rank in range(1, deployment.world_size):
        words += [":", "-n", "1", *_worker(deployment), _shm_prefix(rank, http_port)]
    return words


def _leader(deployment: Deployment, http_port: int) -> list[str]:
    """Rank 0, which loads all models and serves."""
    http, grpc, metrics = ports(http_port)
    return [
        *_server(deployment),
        f"--http-port={http}",
        f"--grpc-port={grpc}",
        f"--metrics-port={metrics}",
        # Time to first response; in Triton from 24.11 on, and all images of TAGS are newer.
        "--metrics-config=histogram_latencies=true",
        _shm_prefix(0, http_port),
    ]


def _worker(deployment: Deployment) -> list[str]:
    """Another rank, which loads the engine alone and does not serve.

    The launcher gives all ranks the same ports and relies on these not returning from loading; Triton's
    Kubernetes tutorials close them.
    """
    closed = [f"--allow-{name}=false" for name in ("http", "grpc", "metrics")]
    return [*_server(deployment), "--model-control-mode=explicit", "--load-model=tensorrt_llm", *closed]


def _server(deployment: Deployment) -> list[str]:
    return [
        TRITONSERVER,
        f"--model-repository={deployment.repository}",
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={EXIT_TIMEOUT_S[deployment.flavour]}",
    ]


def _shm_prefix(rank: int | str, http_port: int) -> str:
    """Ranks of a host share /dev/shm, and so do its servers, which the port tells apart."""
    return f"--backend-config=python,shm-region-prefix-name=prefix{rank}_{http_port}_"


def _no_pools(deployment: Deployment) -> list[str]:
    """The orchestrator keeps no GPU memory for itself; the launcher says so for every GPU of the host."""
    pools = [f"--cuda-memory-pool-byte-size={gpu}:0" for gpu in range(highest_gpu(deployment) + 1)]
    return ["--pinned-memory-pool-byte-size=0", "--enable-peer-access=false", *pools]
