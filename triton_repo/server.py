"""The real tritonserver of the nvidia-pytriton wheel, started for one repository and stopped cleanly."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from builder.errors import UserError
from triton_repo import leftovers, ports, rules
from triton_repo.dialect import ENGINE, LLMAPI
from triton_repo.processes import descendants, end_all
from triton_repo.tritonserver import backend_directory, deepen_stacks, environment, find_tritonserver

HOST = "127.0.0.1"
GRACE_S = 5
UNLOAD_S = 30.0
SHM_NEEDED = 64 << 20  # bytes; each model has its own region, which grows by 64 MB at a time at most
KEY = "ffn-fusion-secret"
CONTROL = ("model-repository", "trace", "logging")
MEMORY = ("shared-memory",)
_PR_SET_PDEATHSIG = 1  # prctl(2)


class Server:
    """Serves a repository while the `with` block lasts; `url` is its HTTP address.

    Ready means that one token came back through the text model. `grace_s` is what running requests get when
    it stops. Clients may load and unload models, set logging and tracing only with `control`, register shared
    memory only with `shared_memory`. Raises UserError when a port is taken, a model does not load, the
    server dies, or `start_timeout_s` passes.
    """

    def __init__(
        self,
        repository: Path,
        *,
        http_port: int = 0,
        host: str = HOST,
        grace_s: int = GRACE_S,
        control: bool = False,
        shared_memory: bool = False,
        log: Path | None = None,
        start_timeout_s: float = 180,
    ) -> None:
        self.repository = repository.resolve()
        self.start_timeout_s, self.host, self.grace_s = start_timeout_s, host, grace_s
        self._restricted = (CONTROL if not control else ()) + (MEMORY if not shared_memory else ())
        self._secret = secrets.token_hex(16)
        self._http_port, self._log = http_port, log
        self._process: subprocess.Popen[bytes] | None = None
        self._family: dict[int, str] = {}
        self._name = leftovers.name()

    def __enter__(self) -> Server:
        self._configs = self._check()
        leftovers.sweep()
        self.port, grpc, metrics = ports.choose(self._http_port, self.host)
        self._own = HOST if self.host == "0.0.0.0" else self.host
        self.url, self.grpc_address = f"http://{self._own}:{self.port}", f"{self._own}:{grpc}"
        self._ports = (self.port, grpc, metrics)
        self._scratch = Path(tempfile.mkdtemp(prefix=self._name))
        self.log = self._log or self._scratch / "server.log"
        try:
            self._backends = backend_directory(find_tritonserver(), self._scratch)
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _check(self) -> dict[str, Any]:
        find_tritonserver()
        configs = rules.check(self.repository)
        for name, config in configs.items():
            if config.platform != "ensemble" and config.backend != "python":
                raise UserError(
                    f"{self.repository / name}: needs the backend {config.backend}, which is not here; "
                    "start it in a TensorRT-LLM container"
                )
        free = shutil.disk_usage(leftovers.SHM).free if leftovers.SHM.is_dir() else 0
        if free < SHM_NEEDED:
            raise UserError(
                f"{leftovers.SHM}: {free >> 20} MB are free, Triton's models need {SHM_NEEDED >> 20}; "
                "remove what fills it, or give the container a larger --shm-size"
            )
        return configs

    @property
    def pid(self) -> int:
        """Of tritonserver."""
        assert self._process is not None, "start first"
        return self._process.pid

    @property
    def dead(self) -> bool:
        """Whether tritonserver has ended."""
        return self._process is None or self._process.poll() is not None

    def start(self) -> None:
        """Start tritonserver and load its models. The ports and the log stay those of the first start."""
        self._launch()
        self._load_models()
        self._family = descendants(self.pid)  # of a killed server they cannot be found later

    def restart(self) -> None:
        """Start a new tritonserver in the place of one that has died."""
        self.stop()
        self.start()

    def reload(self) -> None:
        """Load the models again, as for an engine or a stub that has died; running requests fail."""
        self._family |= descendants(self.pid)
        deadline = time.monotonic() + UNLOAD_S
        body = json.dumps({"parameters": {"unload_dependents": True}}).encode()
        for name in _top_level(self._configs):
            self._request("POST", f"/v2/repository/models/{name}/unload", deadline, body)
        while any(
            self._request("GET", f"/v2/models/{name}/ready", deadline)[0] == 200 for name in self._configs
        ):
            time.sleep(0.1)
        end_all({pid: start for pid, start in self._family.items() if pid in descendants(self.pid)})
        self._load_models()
        self._family |= descendants(self.pid)

    def wait(self, timeout_s: float | None = None) -> None:
        """Block, or so long at most. Raises UserError with its last words when the server dies."""
        assert self._process is not None, "start first"
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return
        raise UserError(self._last_words("died"))

    def probe(self, timeout_s: float) -> str:
        """What a request for one token says: "" for a token, else the error or that none came in time."""
        dialect = ENGINE if ENGINE.model in self._configs else LLMAPI
        body = json.dumps(dialect.body("a", 1, False, {})).encode()
        path = f"/v2/models/{dialect.model}/generate"
        status, answer = self._request("POST", path, time.monotonic() + timeout_s, body)
        return "" if status == 200 and b'"error"' not in answer else _reason(answer)

    def _launch(self) -> None:
        command = [str(find_tritonserver()), f"--model-repository={self.repository}"]
        command += [f"--backend-directory={self._backends}"]
        for name, port in zip(("http", "grpc", "metrics"), self._ports, strict=True):
            command += [f"--{name}-address={self.host}", f"--{name}-port={port}"]
        command += ["--allow-gpu-metrics=false", "--disable-auto-complete-config"]
        command += ["--model-control-mode=explicit", f"--exit-timeout-secs={self.grace_s}"]
        command += [f"--backend-config=python,shm-region-prefix-name={self._name}"]
        if self._restricted:
            rule = f"{','.join(self._restricted)}:{KEY}={self._secret}"
            command += [f"--http-restricted-api={rule}", f"--grpc-restricted-protocol={rule}"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=environment(),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_prepare,
            )

    def _load_models(self) -> None:
        deadline = time.monotonic() + self.start_timeout_s
        while self._request("GET", "/v2/health/live", deadline)[0] != 200:
            time.sleep(0.05)
        for name in _top_level(self._configs):
            status, body = self._request("POST", f"/v2/repository/models/{name}/load", deadline)
            if status != 200:
                raise UserError(f"{self.repository / name}: Triton does not load it: {_reason(body)}")
        told = self.probe(deadline - time.monotonic())
        if told:
            raise UserError(f"{self.repository}: the first token did not come: {told}")

    def _request(self, method: str, path: str, deadline: float, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body; status 0 where the server does not listen yet."""
        assert self._process is not None, "start first"
        if self._process.poll() is not None:
            raise UserError(self._last_words("died while starting"))
        left = deadline - time.monotonic()
        if left <= 0:
            raise UserError(self._last_words("did not answer in time"))
        connection = http.client.HTTPConnection(self._own, self.port, timeout=left)
        try:
            connection.request(method, path, body, {"Connection": "close", KEY: self._secret})
            response = connection.getresponse()
            return response.status, response.read()
        except TimeoutError:
            raise UserError(self._last_words("did not answer in time")) from None
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

    def stop(self) -> None:
        """End tritonserver, its stubs and ranks; what runs has `grace_s` seconds."""
        if self._process is not None:
            self._family |= descendants(self._process.pid)
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(self.grace_s + 10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            end_all(self._family)
            self._process, self._family = None, {}
        leftovers.remove_named(self._name)


def _prepare() -> None:
    """In the child before its program: it stops when the thread that started it is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    deepen_stacks()


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
