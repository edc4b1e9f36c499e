"""The peers' own virtual environment, installed once into the cache directory."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from benchmarks.engine.entries import COMMON, PEERS, Entry
from benchmarks.engine.process import Failed, one_line

Report = Callable[[str], None]
_COMPILATION = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"}  # llama.cpp without its image models


def cache_directory() -> Path:
    """Of these pins and this Python; other ones get another."""
    pins = [*COMMON, *((peer.packages, peer.compiled) for peer in PEERS), platform.python_version()]
    digest = hashlib.sha256(repr(pins).encode()).hexdigest()[:12]
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "ffn-fusion" / f"peers-{digest}"


class Environment:
    """Gives the interpreter a peer runs in. A directory of the user's own is taken as it is."""

    def __init__(self, given: Path | None, report: Report) -> None:
        self.directory = given or cache_directory()
        self._own, self._report = given is None, report
        self.python = self.directory / "bin" / "python"
        self.seconds = 0.0

    def install(self, peers: Sequence[Entry]) -> dict[str, str]:
        """What `peers` need; returns the error of each for which it did not work, in one line."""
        if not self._own:
            missing = f"{self.python}: no such interpreter"
            return {} if self.python.is_file() else {peer.name: missing for peer in peers}
        wanted = [peer for peer in peers if not self._stamp(peer.name).is_file()]
        start = time.monotonic()
        try:
            return self._install(wanted) if wanted else {}
        finally:
            self.seconds = round(time.monotonic() - start, 1)

    def _install(self, wanted: Sequence[Entry]) -> dict[str, str]:
        try:
            self._make()
        except Failed as error:
            return {peer.name: str(error) for peer in wanted}
        with ThreadPoolExecutor() as pool, tempfile.TemporaryDirectory() as wheels:
            compiled = {
                peer.compiled: pool.submit(self._compile, peer.compiled, Path(wheels))
                for peer in wanted
                if peer.compiled
            }
            return self._install_packages(wanted, compiled)

    def _install_packages(self, wanted: Sequence[Entry], compiled: dict[str, Future[Path]]) -> dict[str, str]:
        """pip changes the environment, so one at a time; compilations go on meanwhile."""
        errors: dict[str, str] = {}
        try:
            for packages in COMMON:
                self._pip("install", *packages)
        except Failed as error:
            return {peer.name: str(error) for peer in wanted}
        for peer in wanted:
            try:
                if peer.packages:
                    self._pip("install", *peer.packages)
                if peer.compiled:
                    self._pip("install", str(compiled[peer.compiled].result()))
                self._stamp(peer.name).touch()
            except Failed as error:
                errors[peer.name] = str(error)
        return errors

    def _stamp(self, name: str) -> Path:
        return self.directory / f".installed-{name}"

    def _make(self) -> None:
        made = self._stamp("pip")
        if not made.is_file():
            _run([sys.executable, "-m", "venv", "--clear", str(self.directory)])
            made.touch()

    def _compile(self, package: str, wheels: Path) -> Path:
        """A wheel for this processor. Its build tools come from the package index as well."""
        self._report(f"compiling {package}, some minutes")
        source = ("--no-deps", "--no-cache-dir", "--no-binary", package.partition("==")[0])
        self._pip("wheel", *source, "--wheel-dir", str(wheels), package)
        return next(wheels.glob("*.whl"))

    def _pip(self, command: str, *arguments: str) -> None:
        if command == "install":
            self._report(f"installing {' '.join(Path(x).name for x in arguments)}")
        _run([str(self.python), "-m", "pip", command, "--quiet", "--disable-pip-version-check", *arguments])


def _run(command: list[str]) -> None:
    """Raises Failed with the last error it wrote."""
    environment = {**_COMPILATION, **os.environ}
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment, check=False
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().split("\n")
        errors = [line for line in said if line.startswith(("ERROR", "error"))]
        raise Failed(one_line(f"{' '.join(command[1:5])} ... failed: {(errors or said)[-1]}"))
