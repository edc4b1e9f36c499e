"""What starts a GPU deployment: golden commands, published schemas, probes and scripts that really run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from builder.errors import UserError
from engines import mpi
from triton_repo.deployment import Deployment
from triton_repo.launch import files, images, monitoring
from triton_repo.launch.commands import (
    TRITONSERVER,
    docker_command,
    environment,
    multi_node_command,
    server_command,
    stop_timeout_s,
)
from triton_repo.launch.compose import compose
from triton_repo.launch.kubernetes import DRAIN_S, object_name
from triton_repo.launch.probe import probe_command
from triton_repo.launch.rendering import continued, one_line, yaml_file
from triton_repo.tritonserver import find_tritonserver

KUBERNETES = "1.33"
IMAGE = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
LEADER = [
    "/opt/tritonserver/bin/tritonserver",
    "--model-repository=/models/repository",
    "--disable-auto-complete-config",
    "--exit-timeout-secs=30",
    "--http-port=8000",
    "--grpc-port=8001",
    "--metrics-port=8002",
    "--metrics-config=histogram_latencies=true",
    "--backend-config=python,shm-region-prefix-name=prefix0_8000_",
]


def worker(rank: int) -> list[str]:
    return [
        *LEADER[:4],
        "--model-control-mode=explicit",
        "--load-model=tensorrt_llm",
        "--allow-http=false",
        "--allow-grpc=false",
        "--allow-metrics=false",
        f"--backend-config=python,shm-region-prefix-name=prefix{rank}_8000_",
    ]


def ranks(number: int) -> list[str]:
    words = ["-n", "1", *LEADER]
    for rank in range(1, number):
        words += [":", "-n", "1", *worker(rank)]
    return words


def deployment(flavour: str = "engine", **changes: Any) -> Deployment:
    values = {
        "repository": Path("/models/repository"),
        "flavour": flavour,
        "tensorrt_llm": "1.2.1",
        "tp_size": 2,
        "pp_size": 1,
        "directories": (Path("/models/engine"), Path("/models/tokenizer")),
    }
    return Deployment(**{**values, **changes})


SINGLE = {
    "engine": deployment(),
    "llmapi": deployment("llmapi"),
    "draft": deployment(draft=True),
    "instances": deployment(instances=2, gpu_ids=((0, 1), (2, 3))),
}
SEVERAL = {"engine": deployment(tp_size=8, pp_size=2), "llmapi": deployment("llmapi", tp_size=16)}


# Images


@pytest.mark.parametrize(
    ("version", "tag"), [("1.2.1", "26.07"), ("1.0.0", "25.10"), ("0.20.0+cu12", "25.07")]
)
def test_image_of_a_release(version: str, tag: str) -> None:
    image = images.image(version)
    assert image.name == f"nvcr.io/nvidia/tritonserver:{tag}-trtllm-python-py3"
    assert (image.tensorrt_llm, image.by_default) == (version.split("+")[0], False)


def test_newest_image_is_chosen_visibly() -> None:
    assert images.image(None) == images.Image(name=IMAGE, tensorrt_llm="1.2.1", by_default=True)
    assert max(images.TAGS.values()) == images.TAGS[images.NEWEST]


def test_release_without_image() -> None:
    with pytest.raises(
        UserError, match=r"^tensorrt_llm: no tritonserver image has 1\.3\.0rc20, .*1\.2\.1.*26\.07"
    ):
        images.image("1.3.0rc20")


# Commands


def test_mpirun_tp8() -> None:
    assert server_command(deployment(tp_size=8)) == [
        "mpirun",
        "--allow-run-as-root",
        "--bind-to",
        "none",
        *ranks(8),
    ]
    assert environment(deployment(tp_size=8)) == {}


def test_servers_of_a_host_share_no_memory() -> None:
    """Of two on other ports no two ranks have one prefix."""
    words = [word for port in (8000, 8010) for word in server_command(deployment(), port)]
    prefixes = [word for word in words if "shm-region-prefix-name" in word]
    assert len(set(prefixes)) == len(prefixes) == 4


def test_mpirun_tp4_pp2_is_the_same_world() -> None:
    assert server_command(deployment(tp_size=4, pp_size=2)) == server_command(deployment(tp_size=8))


def test_llmapi_starts_its_own_workers() -> None:
    expected = [*LEADER[:3], "--exit-timeout-secs=120", *LEADER[4:]]
    assert server_command(deployment("llmapi", tp_size=4)) == expected
    assert environment(deployment("llmapi", draft=True, instances=2)) == {}


@pytest.mark.parametrize(
    ("changes", "gpus"),
    [({"draft": True}, 2), ({"instances": 2}, 4), ({"instances": 2, "gpu_ids": ((4, 5), (6, 7))}, 8)],
)
def test_orchestrator(changes: dict[str, Any], gpus: int) -> None:
    assert server_command(deployment(**changes)) == [
        *("mpirun", "--allow-run-as-root", "--bind-to", "none", "-n", "1"),
        *LEADER,
        "--pinned-memory-pool-byte-size=0",
        "--enable-peer-access=false",
        *(f"--cuda-memory-pool-byte-size={gpu}:0" for gpu in range(gpus)),
    ]
    assert environment(deployment(**changes)) == {
        "TRTLLM_ORCHESTRATOR": "1",
        "TRTLLM_ORCHESTRATOR_SPAWN_PROCESSES": "1",
    }


def test_docker() -> None:
    made = docker_command(deployment(draft=True), http_port=9000)
    head = "docker run --rm --gpus all --shm-size 8g --ulimit memlock=-1 --ulimit stack=67108864"
    assert made[: made.index("mpirun")] == [
        *head.split(),
        *("--stop-timeout", "60"),
        *("-p", "9000:9000", "-p", "9001:9001", "-p", "9002:9002"),
        *("-e", "TRTLLM_ORCHESTRATOR=1", "-e", "TRTLLM_ORCHESTRATOR_SPAWN_PROCESSES=1"),
        *("-v", "/models/repository:/models/repository:ro", "-v", "/models/engine:/models/engine:ro"),
        *("-v", "/models/tokenizer:/models/tokenizer:ro"),
        IMAGE,
    ]
    assert made[made.index("mpirun") :] == server_command(deployment(draft=True), http_port=9000)


@pytest.mark.parametrize(
    ("ids", "gpus"),
    [(((0, 1), (2, 3)), '"device=0,1,2,3"'), (((4, 5), (6, 7)), "all"), (((1, 0),), '"device=0,1"')],
)
def test_docker_keeps_the_numbers_of_gpus(ids: tuple[tuple[int, ...], ...], gpus: str) -> None:
    made = docker_command(deployment(instances=len(ids), gpu_ids=ids))
    assert made[made.index("--gpus") + 1] == gpus


def test_a_directory_inside_another_is_mounted_once() -> None:
    nested = deployment(directories=(Path("/models/repository/engine"), Path("/models/a"), Path("/models/a")))
    made = docker_command(nested)
    volumes = [made[i + 1] for i, word in enumerate(made) if word == "-v"]
    assert volumes == ["/models/repository:/models/repository:ro", "/models/a:/models/a:ro"]


def test_mpirun_over_hosts() -> None:
    made = multi_node_command(SEVERAL["engine"], ("a", "b"), remote_shell="/shell")
    start = ["mpirun", "--allow-run-as-root", "--bind-to", "none"]
    start += ["--mca", "plm_rsh_agent", "/shell", "--host", "a:8,b:8"]
    assert made == [*start, *ranks(16)]


def test_llmapi_over_hosts() -> None:
    made = multi_node_command(SEVERAL["llmapi"], ("a", "b", "c", "d"), gpus_per_node=4)
    start = ["mpirun", "--allow-run-as-root", "--bind-to", "none", "--host", "a:4,b:4,c:4,d:4"]
    start += ["-n", "16", "trtllm-llmapi-launch"]
    assert made == [*start, *server_command(SEVERAL["llmapi"])]


SRUN = [
    *("srun", "--nodes=2", "--ntasks-per-node=8", "--mpi=pmix"),
    "--container-image=nvcr.io#nvidia/tritonserver:26.07-trtllm-python-py3",
    "--container-mounts=/models/repository:/models/repository:ro,/models/engine:/models/engine:ro,"
    "/models/tokenizer:/models/tokenizer:ro",
]


def test_llmapi_under_slurm() -> None:
    expected = [*SRUN, "trtllm-llmapi-launch", *server_command(SEVERAL["llmapi"])]
    assert multi_node_command(SEVERAL["llmapi"]) == expected


@pytest.mark.parametrize("rank", [0, 11])
def test_engine_under_slurm(rank: int, tmp_path: Path) -> None:
    """The line that each task runs, run as that task with echo in the server's place."""
    made = multi_node_command(SEVERAL["engine"])
    assert made[: len(SRUN)] == SRUN
    bash = [word.replace(TRITONSERVER, "printf '%s\\n'") for word in made[len(SRUN) :]]
    bash[-1] = bash[-1].replace("exec printf", "printf")
    task = subprocess.run(
        bash, env={**os.environ, "SLURM_PROCID": str(rank)}, capture_output=True, text=True, check=True
    )
    assert task.stdout.splitlines() == (LEADER if rank == 0 else worker(rank))[1:]


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"tp_size": 6}, {"gpus_per_node": 4}, "gpus_per_node: 4 does not divide the 6 ranks"),
        ({}, {"gpus_per_node": 0}, "gpus_per_node: 0 is less than 1"),
        ({"instances": 5}, {}, "instances: 5 of 2 ranks need 10 GPUs, a node has 8"),
        ({"tp_size": 16, "instances": 2}, {}, "instances: 2 of 2 nodes each"),
        ({"tp_size": 16, "draft": True}, {}, "draft: works on one node, 16 ranks need 2"),
        ({"tp_size": 16, "gpu_ids": (tuple(range(16)),)}, {}, "gpu_ids: every one of 2 nodes numbers"),
        ({"tensorrt_llm": "1.3.0rc20"}, {}, "tensorrt_llm: no tritonserver image has 1.3.0rc20"),
        (
            {"tp_size": 16, "directories": (Path("/other/engine"),)},
            {},
            "/models/repository: has no directory but / in common",
        ),
        ({"directories": (Path("/models/a:b"),)}, {}, "/models/a:b: cannot be mounted"),
        ({"directories": (Path("engine"),)}, {}, "engine: cannot be mounted"),
        ({}, {"http_port": 65534}, "http_port: 65534 is not between 1 and 65533"),
    ],
)
def test_refusals_write_nothing(
    changes: dict[str, Any], arguments: dict[str, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        files.write(deployment(**changes), tmp_path / "launch", **arguments)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_hosts_and_names_of_several_nodes() -> None:
    with pytest.raises(UserError, match=r"^hosts: 1 for 16 ranks, 8 a node; give 2"):
        multi_node_command(SEVERAL["engine"], ("a",))
    with pytest.raises(UserError, match=r"^gpus_per_node: 8 GPUs hold all 2 ranks"):
        multi_node_command(deployment())
    with pytest.raises(UserError, match="cuts it at the spaces"):
        multi_node_command(deployment("llmapi", tp_size=16, repository=Path("/models/my repository")))


def test_mpirun_gives_each_rank_its_words_and_host(tmp_path: Path) -> None:
    """The real mpirun, two hosts of which one is this machine by another name."""
    shell = tmp_path / "shell"
    shell.write_text('#!/bin/bash\nexport REACHED=$1\nexec bash -c "${*:2}"\n')
    server = tmp_path / "server"
    server.write_text('#!/bin/bash\necho "$OMPI_COMM_WORLD_RANK ${REACHED:-here} ${!#}"\n')
    for script in (shell, server):
        script.chmod(0o755)
    hosts = (socket.gethostname(), "elsewhere")
    made = multi_node_command(
        deployment(tp_size=2, pp_size=2), hosts, gpus_per_node=2, remote_shell=str(shell)
    )
    command = [mpi.launcher()[0], *made[1:]]
    command = [str(server) if word == TRITONSERVER else word for word in command]
    quiet = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_"))}
    run = subprocess.run(
        command, env=quiet, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    prefix = "--backend-config=python,shm-region-prefix-name=prefix"
    where = ("here", "here", "elsewhere", "elsewhere")
    assert sorted(run.stdout.splitlines()) == [
        f"{i} {host} {prefix}{i}_8000_" for i, host in enumerate(where)
    ]


# A real tritonserver reads the options


@pytest.mark.parametrize("made", [server_command(SINGLE["llmapi"]), server_command(SINGLE["instances"])])
def test_tritonserver_knows_the_options(made: list[str], tmp_path: Path) -> None:
    said = tritonserver(made[made.index(TRITONSERVER) + 1 :], tmp_path)
    assert "failed to stat file" in said
    assert "unrecognized option" not in said


def test_tritonserver_knows_the_workers_options(tmp_path: Path) -> None:
    made = server_command(deployment())
    said = tritonserver(made[made.index(":") + 4 :], tmp_path)
    assert "failed to stat file" in said
    assert "unrecognized option" not in said


def test_tritonserver_refuses_an_unknown_option(tmp_path: Path) -> None:
    assert "unrecognized option" in tritonserver([*LEADER[1:], "--no-such=1"], tmp_path)


def tritonserver(options: list[str], directory: Path) -> str:
    """What it says about a repository that does not exist, which it reads after its options."""
    local = [f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")]
    elsewhere = [o.replace("/models/repository", str(directory / "none")) for o in options]
    command = [str(find_tritonserver()), *elsewhere, *local, "--allow-gpu-metrics=false"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode != 0
    return run.stdout + run.stderr


# Probes


class Answer(BaseHTTPRequestHandler):
    """Answers every POST alike and keeps what it was asked."""

    status, body = 200, b""
    asked: list[tuple[str, dict[str, Any]]]

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.path, json.loads(content)))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def triton() -> Iterator[tuple[int, type[Answer]]]:
    answer = type("OneAnswer", (Answer,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port, answer
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def probes(flavour: str, port: int) -> dict[str, list[str]]:
    """The probes as the files hold them, read back, for a server on `port`."""
    one = files.contents(SINGLE[flavour], http_port=port, gpus_per_node=8, claim="models")
    several = files.contents(SEVERAL[flavour], http_port=port, gpus_per_node=8, claim="models")
    healthcheck = yaml.safe_load(one["compose.yaml"])["services"]["triton"]["healthcheck"]["test"]
    assert healthcheck[0] == "CMD"
    workload = next(d for d in yaml.safe_load_all(one["kubernetes.yaml"]) if d["kind"] == "Deployment")
    group = next(
        d for d in yaml.safe_load_all(several["leaderworkerset.yaml"]) if d["kind"] == "LeaderWorkerSet"
    )
    pods = (workload["spec"]["template"], group["spec"]["leaderWorkerTemplate"]["leaderTemplate"])
    first, leader = (p["spec"]["containers"][0]["readinessProbe"]["exec"]["command"] for p in pods)
    return {"compose": healthcheck[1:], "kubernetes": first, "leader": leader}


@pytest.mark.parametrize("flavour", ["engine", "llmapi"])
@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (200, b'{"model_name": "m", "text_output": "b"}', 0),
        (200, b'{"error": "generate expects model to produce exactly 1 response"}', 1),
        (200, b'{"text_output": "b", "error": "cut off"}', 1),
        (200, b"{}", 1),
        (200, b"no JSON", 1),
        (500, b'{"error": "Stub process is not healthy."}', 1),
        (500, b'{"text_output": "b"}', 1),
    ],
)
def test_probes_run(
    flavour: str, status: int, body: bytes, code: int, triton: tuple[int, type[Answer]]
) -> None:
    port, answer = triton
    answer.status, answer.body = status, body
    commands = probes(flavour, port)
    assert len(commands) == 3
    assert all("$" not in word for command in commands.values() for word in command)
    for command in commands.values():
        run = subprocess.run(["bash", "-c", shlex.join(command)], capture_output=True, text=True, check=False)
        assert run.returncode == code
        assert len(run.stderr.splitlines()) == code
    model, tokens = {
        "engine": ("ensemble", "max_tokens"),
        "llmapi": ("tensorrt_llm", "sampling_param_max_tokens"),
    }[flavour]
    assert answer.asked == [(f"/v2/models/{model}/generate", {"text_input": "a", tokens: 1})] * 3


def test_probe_of_a_port_where_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        run = subprocess.run(
            probe_command(deployment(), free.getsockname()[1], 5), capture_output=True, text=True, check=False
        )
    assert run.returncode == 1
    assert run.stderr.startswith("ConnectionRefusedError")


# Files


@pytest.mark.parametrize("kind", SINGLE)
def test_one_node(kind: str, tmp_path: Path) -> None:
    written = files.write(SINGLE[kind], tmp_path / "launch", claim="weights")
    assert sorted(path.name for path in written) == sorted(
        [
            *("start.sh", "docker-run.sh", "compose.yaml", "kubernetes.yaml", "prometheus.yaml"),
            *("grafana-dashboard.json", "grafana-dashboards.yaml", "grafana-datasource.yaml"),
        ]
    )
    assert sorted(written) == sorted((tmp_path / "launch").iterdir())
    check_files(written)


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_nodes(kind: str, tmp_path: Path) -> None:
    written = files.write(SEVERAL[kind], tmp_path / "launch")
    assert sorted(path.name for path in written) == [
        *("grafana-dashboard.json", "leaderworkerset.yaml", "prometheus.yaml", "start-multi-node.sh"),
    ]
    check_files(written)


def check_files(written: list[Path]) -> None:
    """Scripts are executable and parse; every file but the JSON says what it is."""
    for path in written:
        text = path.read_text()
        if path.suffix == ".sh":
            assert path.stat().st_mode & stat.S_IXUSR
            assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
            assert text.splitlines()[1].startswith("# ")
        elif path.suffix == ".yaml":
            assert text.startswith("# ")
            assert list(yaml.safe_load_all(text))


@pytest.mark.parametrize("name", ["start.sh", "docker-run.sh"])
def test_scripts_run_the_commands(name: str, tmp_path: Path) -> None:
    """With a program of that name that writes down its words; spaces and quotes in paths survive."""
    odd = deployment(draft=True, directories=(Path("/models/it's an engine"), Path("/models/$HOME")))
    files.write(odd, tmp_path / "launch")
    expected = server_command(odd) if name == "start.sh" else docker_command(odd)
    words, variables = run_with_stub(tmp_path, expected[0], ["bash", str(tmp_path / "launch" / name)])
    assert words == expected[1:]
    if name == "start.sh":
        assert variables["TRTLLM_ORCHESTRATOR"] == "1"


@pytest.mark.parametrize("kind", SINGLE)
def test_start_takes_another_tritonserver(kind: str, tmp_path: Path) -> None:
    """TRITONSERVER stands for the binary, in every rank, and for nothing else."""
    files.write(SINGLE[kind], tmp_path / "launch")
    start, other = ["bash", str(tmp_path / "launch" / "start.sh")], str(tmp_path / "stubs" / "my server")
    expected = [other if word == TRITONSERVER else word for word in server_command(SINGLE[kind])]
    program = "my server" if expected[0] == other else "mpirun"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITONSERVER", other)
        words, _ = run_with_stub(tmp_path, program, start)
    assert words == expected[1:]
    assert other in expected


def run_with_stub(directory: Path, program: str, command: list[str]) -> tuple[list[str], dict[str, str]]:
    """Run a script in which `program` is one that records its arguments and environment."""
    stubs = directory / "stubs"
    stubs.mkdir(exist_ok=True)
    record = directory / "record.json"
    code = f"import json, os, sys; json.dump([sys.argv[1:], dict(os.environ)], open({str(record)!r}, 'w'))"
    (stubs / program).write_text(f"#!{sys.executable}\n{code}\n")
    (stubs / program).chmod(0o755)
    path = os.pathsep.join([str(stubs), os.environ["PATH"]])
    subprocess.run(command, env={**os.environ, "PATH": path}, check=True, timeout=60)
    words, variables = json.loads(record.read_text())
    return words, variables


def test_lines_to_paste() -> None:
    odd = deployment(draft=True, directories=(Path("/models/it's an engine"),))
    lines = files.command_lines(odd)
    assert list(lines) == ["server", "docker"]
    assert lines["server"].startswith("TRTLLM_ORCHESTRATOR=1 TRTLLM_ORCHESTRATOR_SPAWN_PROCESSES=1 mpirun ")
    assert shlex.split(lines["server"])[2:] == server_command(odd)
    assert shlex.split(lines["docker"]) == docker_command(odd)
    assert files.command_lines(SEVERAL["llmapi"]) == {
        "slurm": one_line(multi_node_command(SEVERAL["llmapi"]), {})
    }


def test_continued_lines() -> None:
    made = continued(["a", "b", "--long=" + "x" * 90, "-n", "1", "c", ":", "-n", "1", "it's"])
    assert made == f"a b \\\n    --long={'x' * 90} \\\n    -n 1 c \\\n    : -n 1 'it'\"'\"'s'"


def test_an_existing_directory_is_kept(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    with pytest.raises(UserError, match="launch: exists"):
        files.write(deployment(), tmp_path / "launch")


# Compose


def compose_schema() -> dict[str, Any]:
    schema = resources("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    return json.loads(schema.read_text())


@pytest.mark.parametrize("kind", SINGLE)
def test_compose_is_valid(kind: str) -> None:
    made = yaml.safe_load(yaml_file("", compose(SINGLE[kind])))
    validator = jsonschema.Draft202012Validator(compose_schema())
    assert [error.message for error in validator.iter_errors(made)] == []
    made["services"]["triton"]["healthcheck"]["intervall"] = "30s"
    assert list(validator.iter_errors(made))


def test_compose_services() -> None:
    made = compose(deployment(directories=(Path("/models/$engine"),)))["services"]
    triton = made["triton"]
    assert triton["command"] == server_command(deployment())
    assert [v["source"] for v in triton["volumes"]] == ["/models/repository", "/models/$$engine"]
    assert all(volume["read_only"] for service in made.values() for volume in service["volumes"])
    assert triton["deploy"]["resources"]["reservations"]["devices"] == [
        {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    ]
    exit_timeout = exit_timeout_s(triton["command"])
    assert seconds(triton["stop_grace_period"]) > exit_timeout
    assert seconds(triton["healthcheck"]["start_period"]) >= 1800
    assert {name for name, service in made.items() if service.get("profiles") == ["monitoring"]} == {
        "prometheus",
        "grafana",
    }


def test_compose_mounts_what_is_written(tmp_path: Path) -> None:
    written = {path.name for path in files.write(deployment(), tmp_path / "launch")}
    made = yaml.safe_load((tmp_path / "launch" / "compose.yaml").read_text())["services"]
    sources = [v["source"] for name in ("prometheus", "grafana") for v in made[name]["volumes"]]
    assert len(sources) == 4
    assert {Path(source).name for source in sources} <= written
    prometheus = yaml.safe_load((tmp_path / "launch" / "prometheus.yaml").read_text())
    assert prometheus["scrape_configs"][0]["static_configs"] == [{"targets": ["triton:8002"]}]


def test_compose_names_gpus() -> None:
    made = compose(SINGLE["instances"])["services"]["triton"]["deploy"]["resources"]
    assert made["reservations"]["devices"][0]["device_ids"] == ["0", "1", "2", "3"]


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


def exit_timeout_s(command: list[str]) -> int:
    found = re.search(r"--exit-timeout-secs=(\d+)", " ".join(command))
    assert found is not None
    return int(found[1])


# Kubernetes


def manifests(text: str) -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


@pytest.mark.parametrize("kind", SINGLE)
def test_kubernetes_is_valid(kind: str) -> None:
    text = files.contents(SINGLE[kind], http_port=8000, gpus_per_node=8, claim="models")["kubernetes.yaml"]
    assert "- |\n" in text  # the probe's program can be read
    made = manifests(text)
    assert list(made) == ["Deployment", "Service"]
    for document in made.values():
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    made["Deployment"]["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(made["Deployment"], KUBERNETES, strict=True)


@pytest.mark.parametrize(("kind", "gpus"), [("engine", 2), ("llmapi", 2), ("instances", 4)])
def test_pod(kind: str, gpus: int) -> None:
    text = files.contents(SINGLE[kind], http_port=9000, gpus_per_node=8, claim="weights")["kubernetes.yaml"]
    made = manifests(text)
    template = made["Deployment"]["spec"]["template"]
    pod, container = template["spec"], template["spec"]["containers"][0]
    assert container["args"] == server_command(SINGLE[kind], 9000)
    assert container["resources"] == {"limits": {"nvidia.com/gpu": gpus}}
    assert {v["name"]: v["mountPath"] for v in container["volumeMounts"]} == {
        "models": "/models",
        "shm": "/dev/shm",
    }
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "weights", "readOnly": True}
    assert pod["terminationGracePeriodSeconds"] > DRAIN_S + exit_timeout_s(container["args"])
    assert pod["terminationGracePeriodSeconds"] == DRAIN_S + stop_timeout_s(SINGLE[kind])
    assert container["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800
    assert template["metadata"]["annotations"]["prometheus.io/port"] == "9002"
    assert [p["port"] for p in made["Service"]["spec"]["ports"]] == [9000, 9001, 9002]
    assert made["Service"]["spec"]["selector"] == template["metadata"]["labels"]
    assert {p["targetPort"] for p in made["Service"]["spec"]["ports"]} == {
        p["name"] for p in container["ports"]
    }


def test_the_default_image_is_said() -> None:
    arguments = {"http_port": 8000, "gpus_per_node": 8, "claim": "models"}
    chosen = files.contents(deployment("llmapi", tensorrt_llm=None), **arguments)["kubernetes.yaml"]
    named = files.contents(deployment("llmapi"), **arguments)["kubernetes.yaml"]
    assert "The image is the newest one" in chosen
    assert "newest" not in named


@pytest.mark.parametrize(
    ("name", "expected"),
    [("My_Repo.v2", "triton-my-repo-v2"), ("...", "triton"), ("x" * 80, "triton-" + "x" * 40)],
)
def test_object_names(name: str, expected: str) -> None:
    assert object_name(deployment(repository=Path("/models") / name)) == expected


def group(kind: str) -> dict[str, dict[str, Any]]:
    text = files.contents(SEVERAL[kind], http_port=8000, gpus_per_node=8, claim="models")
    return manifests(text["leaderworkerset.yaml"])


@pytest.mark.parametrize("kind", SEVERAL)
def test_leader_worker_set(kind: str) -> None:
    made = group(kind)
    assert list(made) == ["ConfigMap", "ServiceAccount", "Role", "RoleBinding", "LeaderWorkerSet", "Service"]
    workload = made.pop("LeaderWorkerSet")
    assert workload["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    template = workload["spec"]["leaderWorkerTemplate"]
    assert template["size"] == 2
    pods = [template[name] for name in ("leaderTemplate", "workerTemplate")]
    for pod in pods:
        document = {"apiVersion": "v1", "kind": "Pod", **pod}
        document["metadata"] = {**pod["metadata"], "name": "pod"}
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        assert pod["spec"]["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    for document in made.values():
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    assert [pod["spec"]["automountServiceAccountToken"] for pod in pods] == [True, False]
    account = made["ServiceAccount"]["metadata"]["name"]
    assert pods[0]["spec"]["serviceAccountName"] == account
    assert made["RoleBinding"]["subjects"] == [{"kind": "ServiceAccount", "name": account}]
    workers = [rule["resourceNames"] for rule in made["Role"]["rules"]]
    assert workers == [["triton-repository-0-1"]] * 2
    readable = made["ConfigMap"]["metadata"]["name"], pods[0]["spec"]["volumes"][-1]["configMap"]
    assert readable == ("triton-repository", {"name": "triton-repository", "defaultMode": 0o555})


@pytest.mark.parametrize("kind", SEVERAL)
def test_leader_waits_and_becomes_mpirun(kind: str, tmp_path: Path) -> None:
    """The leader's script with the pod's name in its place, and a kubectl that fails once."""
    template = group(kind)["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
    command = [
        w.replace("$(POD_NAME)", "triton-repository-0") for w in template["spec"]["containers"][0]["args"]
    ]
    assert "$(" not in " ".join(command)
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    (stubs / "kubectl").write_text(f'#!/bin/bash\necho "$*" >> {tmp_path}/asked\n[ -e {tmp_path}/slept ]\n')
    (stubs / "sleep").write_text(f"#!/bin/bash\ntouch {tmp_path}/slept\n")
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    words, _ = run_with_stub(tmp_path, "mpirun", command)
    hosts = ("triton-repository-0", "triton-repository-0-1")
    assert ["mpirun", *words] == multi_node_command(
        SEVERAL[kind], hosts, remote_shell="/etc/remote-shell/kubectl-exec"
    )
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["exec triton-repository-0-1 -- true"] * 2


def test_leader_without_kubectl_says_so(tmp_path: Path) -> None:
    template = group("engine")["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
    _, *rest = template["spec"]["containers"][0]["args"]
    bash = shutil.which("bash")
    assert bash is not None
    run = subprocess.run(
        [bash, *rest], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stderr.startswith("kubectl: not in this image")
    assert len(run.stderr.splitlines()) == 1


def test_remote_shell_runs_the_command_in_the_pod(tmp_path: Path) -> None:
    shell = tmp_path / "kubectl-exec"
    shell.write_text(group("engine")["ConfigMap"]["data"]["kubectl-exec"])
    words, _ = run_with_stub(
        tmp_path, "kubectl", ["bash", str(shell), "pod-1", "a=1;", "orted", "-x", '"y z"']
    )
    assert words == ["exec", "pod-1", "--", "/bin/sh", "-c", 'a=1; orted -x "y z"']


def test_worker_ends_when_told(tmp_path: Path) -> None:
    template = group("engine")["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]["workerTemplate"]
    args = template["spec"]["containers"][0]["args"]
    waiting = subprocess.Popen(
        [*args[:2], f"{args[2].replace('wait', 'echo up; wait')}"], stdout=subprocess.PIPE, text=True
    )
    assert waiting.stdout is not None
    children: list[str] = []
    try:
        assert waiting.stdout.readline() == "up\n"
        children = Path(f"/proc/{waiting.pid}/task/{waiting.pid}/children").read_text().split()
        waiting.terminate()
        assert waiting.wait(10) == 0
    finally:
        waiting.kill()
        waiting.stdout.close()
        for child in children:
            os.kill(int(child), signal.SIGTERM)


# Monitoring

WORD = re.compile(r"[A-Za-z_$][A-Za-z0-9_$]*")
PROMQL = {"sum", "rate", "by", "histogram_quantile"}


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def check_expression(expression: str) -> set[str]:
    """The metrics of an expression: each is known, so are its labels' values and what is done with it."""
    assert expression.count("(") == expression.count(")")
    found = set()
    for name, selector in re.findall(r"\b(nv_[a-z0-9_]+)(?:\{([^}]*)\})?", expression):
        suffix = next(
            (s for s in ("_bucket", "_sum", "_count") if name[: -len(s)] in HISTOGRAMS and name.endswith(s)),
            "",
        )
        metric = monitoring.METRICS[name.removesuffix(suffix)]
        assert bool(suffix) == (metric.kind == "histogram"), name
        counts = metric.kind in ("counter", "histogram")
        assert (f"rate({name}" in expression) == counts, f"{name}: rate of counters, and of them alone"
        for label, value in re.findall(r'(\w+)="([^"]*)"', selector):
            assert label in ("model", metric.label)
            assert label == "model" or value in metric.values
        found.add(name.removesuffix(suffix))
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|by \(\w+\)", "", expression)
    assert {w for w in WORD.findall(bare) if not w.startswith("nv_")} <= PROMQL
    return found


HISTOGRAMS = {name for name, metric in monitoring.METRICS.items() if metric.kind == "histogram"}


@pytest.mark.parametrize("flavour", ["engine", "llmapi"])
def test_dashboard_shows_known_metrics(flavour: str) -> None:
    dashboard = json.loads(json.dumps(monitoring.dashboard(deployment(flavour))))
    found = set().union(*(check_expression(expression) for expression in expressions(dashboard)))
    assert "nv_inference_first_response_histogram_ms" in found
    if flavour == "engine":
        assert found == set(monitoring.METRICS)
    else:
        assert not [name for name in found if name.startswith(("nv_trt_llm_", "nv_llm_"))]


@pytest.mark.parametrize(
    "wrong",
    [
        "sum(rate(nv_no_such_metric[1m]))",
        'sum(nv_trt_llm_request_metrics{request_type="sleeping"})',
        "sum(nv_inference_request_success)",
        "sum(rate(nv_gpu_utilization[1m]))",
        "sum(rate(nv_llm_output_token_len[1m]))",
    ],
)
def test_the_check_of_expressions_finds_mistakes(wrong: str) -> None:
    with pytest.raises((AssertionError, KeyError)):
        check_expression(wrong)


def test_every_metric_names_its_source() -> None:
    assert all(metric.source for metric in monitoring.METRICS.values())


def test_dashboard_layout() -> None:
    dashboard = monitoring.dashboard(deployment())
    assert dashboard["schemaVersion"] == 39
    assert [v["name"] for v in dashboard["templating"]["list"]] == ["datasource", "model"]
    assert dashboard["templating"]["list"][1]["current"]["value"] == "ensemble"
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == 12
    cells = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(cells) == len(panels)
    assert all(panel["description"] and panel["datasource"]["uid"] == "${datasource}" for panel in panels)
    derived = next(panel for panel in panels if "Inter-token" in panel["title"])
    assert "No metric tells it" in derived["description"]


def test_inter_token_latency_of_known_rates() -> None:
    """The expression over numbers: 2 requests/s of 11 tokens, 20 ms to the first and 5 ms for each other."""
    expression = next(
        e for e in expressions(monitoring.dashboard(deployment())) if "output_token_len_count" in e
    )
    rates = {
        "nv_inference_request_duration_us": 2 * (20 + 10 * 5) * 1000,
        "nv_inference_first_response_histogram_ms_sum": 2 * 20,
        "nv_llm_output_token_len_sum": 2 * 11,
        "nv_llm_output_token_len_count": 2,
    }
    number = re.sub(r"sum\(rate\((\w+)\{[^}]*\}\[[^\]]*\]\)\)", lambda m: str(rates[m[1]]), expression)
    assert eval(number, {"__builtins__": {}}) == 5


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"gpu_ids": ((4, 5),)}, "gpu_ids: 4,5 are not in a pod, which numbers its GPUs 0 to 1"),
        ({"directories": (Path("/other/engine"),)}, "has no directory but / in common"),
        (
            {"repository": Path("/opt/repository"), "directories": (Path("/opt/engine"),)},
            "has no directory but /opt in common",
        ),
        (
            {"repository": Path("/usr/share/r"), "directories": (Path("/usr/share/e"),)},
            "has no directory but /usr/share in common",
        ),
    ],
)
def test_what_no_pod_can_have_is_left_out(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    """Docker and scripts mount each directory in its place and see all GPUs."""
    names = {file.name for file in files.write(deployment(**changes), tmp_path / "start")}
    assert {"start.sh", "docker-run.sh", "compose.yaml"} <= names
    assert "kubernetes.yaml" not in names
    assert why in files.left_out(deployment(**changes))["kubernetes.yaml"]
    assert files.left_out(deployment()) == {}
