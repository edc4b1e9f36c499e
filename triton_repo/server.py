"""The real tritonserver of the nvidia-pytriton wheel, started for one repository and stopped cleanly."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from builder.errors import UserError
from triton_repo import rules
from triton_repo.dialect import ENGINE, LLMAPI
from triton_repo.processes import descendants, end_all

HOST = "127.0.0.1"
EXIT_TIMEOUT_S = 5
SHM = Path("/dev/shm")


def find_tritonserver() -> Path:
    """The tritonserver binary. Raises UserError where the wheel or the stub for this Python is missing."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("tritonserver is missing; pip install 'ffn-fusion[triton]'")
    root = Path(spec.submodule_search_locations[0]) / "tritonserver"
    stub = _stub(root)
    if not stub.is_file():
        raise UserError(f"{stub}: missing; use Python 3.10 to 3.12, for which nvidia-pytriton ships a stub")
    return root / "bin" / "tritonserver"


def _stub(root: Path) -> Path:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return root / "python_backend_stubs" / version / "triton_python_backend_stub"


class Server:
    """Serves a repository on loopback while the `with` block lasts; `url` is its HTTP address.

    Ready means that one token came back through the ensemble. Raises UserError when a port is taken,
    a model does not load, the server dies, or `start_timeout_s` passes.
    """

    def __init__(self, repository: Path, *, http_port: int = 0, start_timeout_s: float = 180) -> None:
        self.repository = repository.resolve()
        self.start_timeout_s = start_timeout_s
        self._http_port = http_port
        self._process: subprocess.Popen[bytes] | None = None
        self._family: dict[int, str] = {}
        self._shm_prefix = f"ffn_fusion_{uuid.uuid4().hex[:12]}_"

    def __enter__(self) -> Server:
        binary = find_tritonserver()
        configs = rules.check(self.repository)
        for name, config in configs.items():
            if config.platform != "ensemble" and config.backend != "python":
                raise UserError(
                    f"{self.repository / name}: needs the backend {config.backend}, which is not here; "
                    "start it in a TensorRT-LLM container"
                )
        self.port, grpc, metrics = _ports(self._http_port)
        self.url, self.grpc_address = f"http://{HOST}:{self.port}", f"{HOST}:{grpc}"
        self._scratch = Path(tempfile.mkdtemp(prefix="ffn-fusion-triton-"))
        try:
            self.log = self._scratch / "server.log"
            backends = _backend_directory(binary, self._scratch)
            self._start(binary, backends, (self.port, grpc, metrics))
            self._load_models(configs)
            assert self._process is not None, "started"
            self._family = descendants(self._process.pid)  # of a killed server they cannot be found later
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def wait(self) -> None:
        """Block until interrupted. Raises UserError with its last words when the server dies."""
        assert self._process is not None, "start first"
        try:
            self._process.wait()
        except KeyboardInterrupt:
            return
        raise UserError(self._last_words("died"))

    def _start(self, binary: Path, backends: Path, ports: tuple[int, int, int]) -> None:
        command = [str(binary), f"--model-repository={self.repository}", f"--backend-directory={backends}"]
        for name, port in zip(("http", "grpc", "metrics"), ports, strict=True):
            command += [f"--{name}-address={HOST}", f"--{name}-port={port}"]
        command += [
            "--allow-gpu-metrics=false",
            "--disable-auto-complete-config",
            "--model-control-mode=explicit",
        ]
        command += [f"--exit-timeout-secs={EXIT_TIMEOUT_S}"]
        command += [f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}"]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=_environment(),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _load_models(self, configs: dict[str, Any]) -> None:
        deadline = time.monotonic() + self.start_timeout_s
        while self._request("GET", "/v2/health/live", deadline)[0] != 200:
            time.sleep(0.05)
        for name in _top_level(configs):
            status, body = self._request("POST", f"/v2/repository/models/{name}/load", deadline)
            if status != 200:
                raise UserError(f"{self.repository / name}: Triton does not load it: {_reason(body)}")
        dialect = ENGINE if ENGINE.model in configs else LLMAPI
        body = json.dumps(dialect.body("a", 1, False, {})).encode()
        status, answer = self._request("POST", f"/v2/models/{dialect.model}/generate", deadline, body)
        if status != 200 or b'"error"' in answer:
            raise UserError(f"{self.repository}: the first token did not come: {_reason(answer)}")

    def _request(self, method: str, path: str, deadline: float, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body; status 0 where the server does not listen yet."""
        assert self._process is not None, "start first"
        if self._process.poll() is not None:
            raise UserError(self._last_words("died while starting"))
        left = deadline - time.monotonic()
        if left <= 0:
            raise UserError(self._last_words(f"was not ready within {self.start_timeout_s:.0f} s"))
        connection = http.client.HTTPConnection(HOST, self.port, timeout=left)
        try:
            connection.request(method, path, body, {"Connection": "close"})
            response = connection.getresponse()
            return response.status, response.read()
        except TimeoutError:
            raise UserError(self._last_words(f"was not ready within {self.start_timeout_s:.0f} s")) from None
        except (ConnectionError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def _last_words(self, what: str) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [
            line for line in lines if line.startswith("E") and "CUDA" not in line and "Cuda" not in line
        ]
        last = (errors or lines or ["no output"])[-1]
        return f"tritonserver {what}: {last.split('] ', 1)[-1]}"

    def _stop(self) -> None:
        if self._process is not None:
            self._family |= descendants(self._process.pid)
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(EXIT_TIMEOUT_S + 10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            end_all(self._family)
            self._process = None
        for leftover in SHM.glob(f"{self._shm_prefix}*"):
            leftover.unlink(missing_ok=True)
        shutil.rmtree(self._scratch, ignore_errors=True)


def _top_level(configs: dict[str, Any]) -> list[str]:
    """What must be loaded: an ensemble loads its steps, and would load them again."""
    steps = {s.model_name for config in configs.values() for s in config.ensemble_scheduling.step}
    return sorted(set(configs) - steps)


def _reason(body: bytes) -> str:
    """The last line of an error: of a Python traceback, what was raised."""
    text = body.decode("utf-8", "replace")
    try:
        value: Any = json.loads(text)
        text = str(value.get("error", text)) if isinstance(value, dict) else text
    except ValueError:
        pass
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no answer"]
    raised = [line for line in lines if "Error: " in line]
    return raised[-1] if raised else lines[-1] if len(lines) == 1 else " ".join(lines)[:300]


def _ports(http_port: int) -> tuple[int, int, int]:
    """HTTP, gRPC and metrics ports: three in a row from the one asked for, or free ones."""
    if http_port:
        ports = (http_port, http_port + 1, http_port + 2)
        for port in ports:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((HOST, port))
                except (OSError, OverflowError):
                    raise UserError(f"http_port: port {port} is taken; choose another --http-port") from None
        return ports
    probes = [socket.socket() for _ in range(3)]
    try:
        for probe in probes:
            probe.bind((HOST, 0))
        first, second, third = (probe.getsockname()[1] for probe in probes)
        return first, second, third
    finally:
        for probe in probes:
            probe.close()


def _backend_directory(binary: Path, scratch: Path) -> Path:
    """The Python backend with this Python's stub, laid out so that the stub finds the wheel's libraries.

    The stub's rpath is $ORIGIN/../../../../nvidia_pytriton.libs. A stub that misses a library would
    leave the server waiting for ever, so its libraries are checked here.
    """
    root = binary.parent.parent
    libraries = root.parent.parent / "nvidia_pytriton.libs"
    backends = scratch / "a" / "b" / "c"
    python = backends / "python"
    python.mkdir(parents=True)
    (scratch / "nvidia_pytriton.libs").symlink_to(libraries)
    for file in (*(root / "backends" / "python").iterdir(), _stub(root)):
        if file.is_file():
            shutil.copy2(file, python / file.name)
    stub = python / "triton_python_backend_stub"
    check = subprocess.run(["ldd", stub], env=_environment(), capture_output=True, text=True, check=False)
    missing = [line.split()[0] for line in check.stdout.splitlines() if "not found" in line]
    if missing:
        raise UserError(
            f"triton_python_backend_stub: {missing[0]} is missing; install a Python built with it"
        )
    return backends


def _environment() -> dict[str, str]:
    """PATH begins with this Python, which the stub embeds; its library directory is searched as well."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_"))}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # a repository stays as it was written
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    directory = sysconfig.get_config_var("LIBDIR")
    if directory and list(Path(directory).glob("libpython3*.so*")):
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(
            filter(None, [directory, environment.get("LD_LIBRARY_PATH")])
        )
    return environment
