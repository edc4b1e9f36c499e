"""A server in the background, and what can happen to it: every process killed, clients that misbehave."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from builder.errors import UserError
from triton_repo import leftovers
from triton_repo.client import Endpoint, generate, model_statistics, stream
from triton_repo.leftovers import SHM, sweep
from triton_repo.ports import choose
from triton_repo.processes import descendants, start_time
from triton_repo.repository import write_repository
from triton_repo.server import Server
from triton_repo.watchdog import Watchdog

PROMPT = "The quick brown fox"
RUNNING = 128  # requests, 32 times the engine's batch


class Machine:
    """The commands as a user has them, with a state directory of their own."""

    def __init__(self, place: Path, repository: Path) -> None:
        self.repository = repository
        self.environment = {**os.environ, "XDG_STATE_HOME": str(place)}
        self.port, self.front = choose(0, "127.0.0.1")[0], choose(0, "127.0.0.1")[0]
        self.url = f"http://127.0.0.1:{self.port}"

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "ffn_fusion", *map(str, arguments)]
        return subprocess.run(line, env=self.environment, capture_output=True, text=True, timeout=120)

    def deploy(self, *options: object) -> subprocess.CompletedProcess[str]:
        return self.run("deploy", self.repository, "--serve", "--detach", "--http-port", self.port, *options)

    def status(self) -> dict[str, Any]:
        (told,) = json.loads(self.run("status", "--json").stdout)["servers"]
        return told

    def models(self) -> int:
        """The status of OpenAI's front end for its list of models."""
        connection = http.client.HTTPConnection("127.0.0.1", self.front, timeout=10)
        connection.request("GET", "/v1/models", headers={"Connection": "close"})
        status = connection.getresponse().status
        connection.close()
        return status


@pytest.fixture(scope="module")
def repository(tiny_engine: Path, tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("repositories") / "chat"
    write_repository(tiny_engine, tiny_hf, output)
    return output


@pytest.fixture(scope="module")
def machine(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    made = Machine(tmp_path_factory.mktemp("state"), repository)
    started = made.deploy("--grace", 8)
    assert started.returncode == 0, started.stderr
    assert f"serving {repository} on {made.url} as chat" in started.stdout
    yield made
    made.run("stop", "--all")


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def process(machine: Machine, words: str) -> int:
    """The one process of the server whose command line has these words."""
    (found,) = [pid for pid in descendants(machine.status()["pid"]) if words in command(pid)]
    return found


def until(what: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.2)


def steps(machine: Machine, model: str = "postprocessing", after_s: float = 0) -> int:
    """How many pieces of text postprocessing has made, or what another model has done."""
    time.sleep(after_s)
    told = model_statistics(Endpoint(machine.url)) or []
    (found,) = [x["inference_stats"]["success"]["count"] for x in told if x["name"] == model]
    return int(found)


def test_status_and_logs(machine: Machine) -> None:
    expected = generate(Endpoint(machine.url), PROMPT, max_tokens=5)
    assert expected
    told = machine.status()
    assert (told["name"], told["state"], told["repaired"]) == ("chat", "serving", 0)
    assert told["answered"] >= 2
    text = machine.run("status").stdout
    assert "chat" in text
    assert machine.url in text
    assert "Started HTTPService" in machine.run("logs", "--triton").stdout
    again = machine.deploy()
    assert again.returncode == 1
    assert "name: 'chat' runs already on" in again.stderr
    other = machine.deploy("--name", "other")
    assert other.returncode == 1
    assert f"port {machine.port} is taken" in other.stderr
    assert [x["name"] for x in json.loads(machine.run("status", "--json").stdout)["servers"]] == ["chat"]


def test_models_and_memory_are_not_for_clients(machine: Machine) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", machine.port, timeout=10)
    for method, path in (
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/repository/models/ensemble/unload"),
        ("GET", "/v2/systemsharedmemory/status"),
        ("POST", "/v2/systemsharedmemory/region/x/register"),
        ("GET", "/v2/logging"),
        ("GET", "/v2/trace/setting"),
    ):
        connection.request(method, path, b"{}")
        response = connection.getresponse()
        response.read()
        assert response.status == 403, path
    connection.close()
    import tritonclient.grpc as grpc

    client = grpc.InferenceServerClient(f"127.0.0.1:{machine.port + 1}")
    with pytest.raises(grpc.InferenceServerException, match="restricted"):
        client.unload_model("ensemble")
    with pytest.raises(grpc.InferenceServerException, match="restricted"):
        client.register_system_shared_memory("x", "/x", 1)
    client.close()
    assert generate(Endpoint(machine.url), PROMPT, max_tokens=2)


def test_half_a_request_and_a_client_that_goes(machine: Machine) -> None:
    """A request that never ends, idle connections and a stream cut off hold up nobody."""
    held = [socket.create_connection(("127.0.0.1", machine.port)) for _ in range(3)]
    held[0].sendall(b"POST /v2/models/ensemble/generate HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
    for _ in range(8):  # twice the engine's batch
        running = stream(Endpoint(machine.url), PROMPT, max_tokens=60)
        next(running)
        running.close()
    begin = time.monotonic()
    assert generate(Endpoint(machine.url), PROMPT, max_tokens=4)
    assert time.monotonic() - begin < 10
    for one in held:
        one.close()


def test_work_for_clients_that_have_gone_stops(machine: Machine) -> None:
    """Eight streams of 100 tokens are given up after the first, without an id and with one."""
    before = steps(machine)
    for i in range(8):
        body = {"text_input": PROMPT, "max_tokens": 100, "min_tokens": 100, "stream": True}
        connection = http.client.HTTPConnection("127.0.0.1", machine.port, timeout=60)
        connection.request(
            "POST",
            "/v2/models/ensemble/generate_stream",
            json.dumps(body if i % 2 else {**body, "id": f"stream-{i}"}),
        )
        answer = connection.getresponse()
        assert answer.readline().startswith(b"data:")
        answer.close()
        connection.close()
    until(lambda: steps(machine) == steps(machine, after_s=0.5))
    assert 8 <= steps(machine) - before < 400
    text = "".join(stream(Endpoint(machine.url), PROMPT, max_tokens=100, min_tokens=100))
    assert text == generate(Endpoint(machine.url), PROMPT, max_tokens=100, min_tokens=100)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("engines.embedded.worker", "the engine died: rank 0 ended by SIGKILL; loading the models again"),
        ("tensorrt_llm/1/model.py", "is not healthy; loading the models again"),
        ("bin/tritonserver", "tritonserver died"),
    ],
)
def test_what_is_killed_comes_back(machine: Machine, words: str, said: str) -> None:
    end, before = Endpoint(machine.url), machine.status()
    expected = generate(end, PROMPT, max_tokens=12)
    os.kill(process(machine, words), signal.SIGKILL)
    until(lambda: machine.status()["repaired"] == before["repaired"] + 1)
    until(lambda: machine.status()["state"] == "serving")
    assert generate(end, PROMPT, max_tokens=12) == expected
    assert said in machine.run("logs").stdout
    assert machine.status()["pid"] == before["pid"]


def test_it_gives_up_after_so_many_repairs(machine: Machine) -> None:
    """The fourth within ten minutes; nothing stays behind, and the record says why."""
    told = machine.status()
    family = descendants(told["pid"])
    os.kill(process(machine, "bin/tritonserver"), signal.SIGKILL)
    until(lambda: machine.status()["state"] == "dead")
    assert "3 repairs within 600 s were not enough" in machine.run("logs").stdout
    until(lambda: all(start_time(pid) != start for pid, start in family.items()))
    stopped = machine.run("stop", "chat")
    assert stopped.stdout == "chat: had died; forgotten\n"
    assert "no server runs in the background" in machine.run("status").stdout
    assert machine.run("stop").returncode == 1


def test_a_killed_front_comes_back(machine: Machine) -> None:
    """OpenAI's API beside the server."""
    machine.run("stop", "--all")
    started = machine.deploy("--grace", 60, "--openai-port", machine.front)
    assert started.returncode == 0, started.stderr
    assert machine.models() == 200
    os.kill(process(machine, "serve-openai"), signal.SIGKILL)
    until(lambda: machine.status()["repaired"] == 1)
    until(lambda: machine.status()["state"] == "serving")
    assert machine.models() == 200
    assert "openai: ended with -9; starting it again" in machine.run("logs").stdout
    other = machine.run("deploy", machine.repository, "--serve", "--openai-port", machine.front)
    assert f"openai_port: port {machine.front} is taken; choose another --openai-port" in other.stderr


def test_stop_under_load_lets_running_requests_end(machine: Machine) -> None:
    """And refuses new ones; OpenAI's API beside the server ends with it."""
    end = Endpoint(machine.url)
    expected = generate(end, PROMPT, max_tokens=100)
    before = steps(machine, "preprocessing")

    def whole(_: int) -> str:
        return "".join(stream(end, PROMPT, max_tokens=100))

    with ThreadPoolExecutor(2 * RUNNING) as clients:
        running = [clients.submit(whole, i) for i in range(RUNNING)]
        until(lambda: steps(machine, "preprocessing") >= before + RUNNING)
        stopping = threading.Thread(target=machine.run, args=("stop",))
        stopping.start()
        refused: list[Future[str]] = []  # but for those that come before the server has the signal
        while not any(x.done() and x.exception() for x in refused):
            refused.append(clients.submit(generate, end, PROMPT, max_tokens=1))
            time.sleep(0.1)
        assert not all(x.done() for x in running)
        assert [x.result() for x in running] == [expected] * RUNNING
    assert isinstance(refused[-1].exception(), UserError)  # at once, not after the running ones
    stopping.join(90)
    with pytest.raises(UserError, match="connection refused"):
        generate(end, PROMPT, max_tokens=1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", machine.front))


def test_all_killed_at_once_is_swept_by_the_next(machine: Machine) -> None:
    """The supervisor, tritonserver, stubs and ranks; another server's leftovers stay.

    A name is taken from the moment its server starts.
    """
    machine.run("stop", "--all")
    assert machine.deploy().returncode == 0
    told = machine.status()
    family = descendants(told["pid"])
    theirs = set(SHM.glob("ffn-fusion-*"))
    mine = SHM / f"{leftovers.name()}x"
    mine.write_text("of a server that this process looks after")
    for pid in (told["pid"], *family):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: all(start_time(pid) != start for pid, start in family.items()))
    left = {x for x in theirs if x.exists() and f"-{told['pid']}-" in x.name}
    assert left
    starting = threading.Thread(target=machine.deploy, args=("--openai-port", machine.front))
    starting.start()
    until(lambda: "starting" in machine.run("status").stdout)
    second = machine.deploy()
    assert (second.returncode, "runs already" in second.stderr) == (1, True), second.stderr
    starting.join(60)
    assert machine.models() == 200
    assert not any(x.exists() for x in left)
    assert mine.exists()
    assert generate(Endpoint(machine.url), PROMPT, max_tokens=2)
    mine.unlink()


def test_a_killed_supervisor_takes_its_server_with_it(machine: Machine) -> None:
    told = machine.status()
    family = descendants(told["pid"])
    assert any("serve-openai" in command(pid) for pid in family)
    os.kill(told["pid"], signal.SIGKILL)
    until(lambda: all(start_time(pid) != start for pid, start in family.items()))
    assert machine.status()["state"] == "dead"
    sweep()
    assert not list(SHM.glob(f"ffn-fusion-*-{told['pid']}-*"))


@pytest.mark.parametrize("words", ["bin/tritonserver", "preprocessing/1/model.py"])
def test_a_server_that_hangs_is_started_again(repository: Path, words: str) -> None:
    """A slow answer alone is that of a busy one: here the front end does not say that it lives, or a model
    works at nothing."""
    told: list[str] = []
    with Server(repository, grace_s=0) as server:
        expected = generate(Endpoint(server.url), PROMPT, max_tokens=5)
        before = server.pid
        (stopped,) = [pid for pid in (before, *descendants(before)) if words in command(pid).split(" --")[0]]
        os.kill(stopped, signal.SIGSTOP)
        dog = Watchdog(
            server=server,
            tell=lambda line, state: told.append(f"{state}: {line}"),
            period_s=0.1,
            patience_s=0.5,
            silence_s=2,
        )
        while "serving: serving again" not in told:
            dog.look()
        assert "did not answer in time" in told[0]
        assert told[0].endswith("; starting the server again")
        assert server.pid != before
        assert not start_time(stopped)
        assert generate(Endpoint(server.url), PROMPT, max_tokens=5) == expected


def with_shared_memory(size: str, *command: object) -> subprocess.CompletedProcess[str]:
    """Run in a mount namespace of its own; skips where the machine allows none."""
    mount = f"mount -t tmpfs -o size={size} tmpfs {SHM} && exec {shlex.join(map(str, command))}"
    line = ["unshare", "--mount", "sh", "-c", mount]
    told = subprocess.run(line, capture_output=True, text=True, timeout=60)
    if "unshare" in told.stderr or "mount" in told.stderr:
        pytest.skip(f"no mount namespace here: {told.stderr.strip()}")
    return told


def test_full_shared_memory(repository: Path) -> None:
    serve = ("-m", "ffn_fusion", "deploy", repository, "--serve", "--http-port", 0)
    told = with_shared_memory("16m", sys.executable, *serve)
    assert told.returncode == 1
    assert "/dev/shm: 16 MB are free, Triton's models need 64" in told.stderr


def test_shared_memory_that_fills_up_while_it_serves(repository: Path) -> None:
    """What needs more is refused, the rest goes on."""
    script = Path(__file__).with_name("filled_memory.py")
    told = with_shared_memory("200m", sys.executable, script, repository)
    assert told.returncode == 0, told.stderr
    full, free = told.stdout.splitlines()
    assert full.startswith("full: http://127.0.0.1")
    assert "Failed to increase the shared memory pool size" in full
    assert "text_input: " in free


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--detach",), 2, "--detach belongs to --serve"),
        (("--serve", "--name", "x"), 2, "--name belongs to --detach"),
        (("--serve", "--host", "localhost"), 1, "host: 'localhost' is no IP address"),
        (("--serve", "--detach", "--name", "a/b"), 1, "name: 'a/b' is no name of a server"),
        (("--serve", "--host", "203.0.113.7"), 1, "warning: whoever reaches 203.0.113.7"),
    ],
)
def test_wrong_use(machine: Machine, options: tuple[str, ...], code: int, message: str) -> None:
    told = machine.run("deploy", machine.repository, *options)
    assert told.returncode == code
    assert message in told.stderr
