"""The real tritonserver of the nvidia-pytriton wheel, started for one repository and stopped cleanly."""

from __future__ import annotations

import contextlib
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
from triton_repo import leftovers, ports, rules, tritonserver
from triton_repo.complaints import last_words, reason
from triton_repo.dialect import ENGINE, LLMAPI
from triton_repo.processes import descendants, end_all
from triton_repo.tritonserver import find_tritonserver

HOST = "127.0.0.1"
GRACE_S = 5
UNLOAD_S = 30.0
KEY = "ffn-fusion-secret"
CONTROL = ("model-repository", "trace", "logging")
MEMORY = ("shared-memory",)


class Server:
    """Serves a repository while the `with` block lasts; `url` is its HTTP address, `grpc_address` host:port.

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
        self._take(http_port, http_port + 1, http_port + 2)
        self._process: subprocess.Popen[bytes] | None = None
        self._family: dict[int, str] = {}
        self._name = leftovers.name()

    def __enter__(self) -> Server:
        self._configs = self._check()
        leftovers.sweep()
        self._take(*ports.choose(self._http_port, self.host))
        self._scratch = Path(tempfile.mkdtemp(prefix=self._name))
        self.log = self._log or self._scratch / "server.log"
        try:
            self._backends = tritonserver.backend_directory(find_tritonserver(), self._scratch)
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _take(self, http_port: int, grpc: int, metrics: int) -> None:
        self._ports = (http_port, grpc, metrics)
        self.port = http_port
        self._own = HOST if self.host == "0.0.0.0" else self.host
        self.url, self.grpc_address = f"http://{self._own}:{http_port}", f"{self._own}:{grpc}"

    def _check(self) -> dict[str, Any]:
        find_tritonserver()
        configs = rules.check(self.repository)
        for name, config in configs.items():
            if config.platform != "ensemble" and config.backend != "python":
                raise UserError(
                    f"{self.repository / name}: needs the backend {config.backend}, which is not here; "
                    "start it in a TensorRT-LLM container"
                )
        tritonserver.check_shared_memory()
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
        self._know_family()

    def restart(self) -> None:
        """Start a new tritonserver in the place of one that has died, or does not answer any more."""
        assert self._process is not None, "start first"
        self._know_family()
        self._process.kill()
        self.stop()
        self.start()

    def reload(self) -> None:
        """Load the models again, as for an engine or a stub that has died; running requests fail."""
        self._know_family()
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
        self._know_family()

    def _know_family(self) -> None:
        """While it lives: of a server that was killed they cannot be found later."""
        if not self.dead:
            self._family |= descendants(self.pid)

    def wait(self, timeout_s: float | None = None) -> None:
        """Block, or so long at most. Raises UserError with its last words when the server dies."""
        assert self._process is not None, "start first"
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return
        raise self._failed("died")

    def probe(self, timeout_s: float) -> str:
        """What a request for one token says: "" for a token, else the error.

        Raises UserError where there was no answer in time.
        """
        dialect = ENGINE if ENGINE.model in self._configs else LLMAPI
        body = json.dumps(dialect.body("a", 1, False, {})).encode()
        path = f"/v2/models/{dialect.model}/generate"
        status, answer = self._request("POST", path, time.monotonic() + timeout_s, body)
        if status == 0:
            raise self._failed("does not listen")
        return "" if status == 200 and b'"error"' not in answer else reason(answer)

    def answers(self, timeout_s: float) -> bool:
        """Whether its HTTP front end does, however busy the models are."""
        try:
            return self._request("GET", "/v2/health/live", time.monotonic() + timeout_s)[0] != 0
        except UserError:
            return False

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
                env=tritonserver.environment(),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=tritonserver.prepare,
            )

    def _load_models(self) -> None:
        deadline = time.monotonic() + self.start_timeout_s
        while self._request("GET", "/v2/health/live", deadline)[0] != 200:
            time.sleep(0.05)
        for name in _top_level(self._configs):
            status, body = self._request("POST", f"/v2/repository/models/{name}/load", deadline)
            if status != 200:
                raise UserError(f"{self.repository / name}: Triton does not load it: {reason(body)}")
        told = self.probe(deadline - time.monotonic())
        if told:
            raise UserError(f"{self.repository}: the first token did not come: {told}")

    def _request(self, method: str, path: str, deadline: float, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body; status 0 where the server does not listen yet."""
        assert self._process is not None, "start first"
        if self._process.poll() is not None:
            raise self._failed("died while starting")
        left = deadline - time.monotonic()
        if left <= 0:
            raise self._failed("did not answer in time")
        connection = http.client.HTTPConnection(self._own, self.port, timeout=left)
        try:
            connection.request(method, path, body, {"Connection": "close", KEY: self._secret})
            response = connection.getresponse()
            return response.status, response.read()
        except TimeoutError:
            raise self._failed("did not answer in time") from None
        except (ConnectionError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def _failed(self, what: str) -> UserError:
        return UserError(f"tritonserver {what}: {last_words(self.log)}")

    def stop(self) -> None:
        """End tritonserver, its stubs and ranks; what runs has `grace_s` seconds."""
        if self._process is not None:
            self._know_family()
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


def _top_level(configs: dict[str, Any]) -> list[str]:
    """What must be loaded: an ensemble loads its steps, and would load them again."""
    steps = {s.model_name for config in configs.values() for s in config.ensemble_scheduling.step}
    return sorted(set(configs) - steps)
