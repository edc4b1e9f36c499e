"""A GPU repository served from inside TensorRT-LLM's container, in the foreground."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from builder.errors import UserError
from engines.trtllm import preflight, release
from triton_repo.client import Endpoint, generate
from triton_repo.deployment import Deployment
from triton_repo.dialect import DIALECTS
from triton_repo.launch import commands, images
from triton_repo.launch.placement import START_S, num_gpus, ports
from triton_repo.processes import descendants, end_all

PERIOD_S = 2.0
REPORT_S = 60.0


def check(deployment: Deployment, http_port: int) -> None:
    """Raise UserError with the first thing that keeps the server from starting here."""
    for port in ports(http_port):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                raise UserError(f"http_port: port {port} is taken; choose another --http-port") from None
    if not Path(commands.TRITONSERVER).is_file():
        image = images.image_of(deployment).name
        raise UserError(f"{commands.TRITONSERVER}: missing; run this inside {image}, or start it with docker")
    version = release.installed()
    if deployment.flavour == "engine" and version != deployment.tensorrt_llm:
        raise UserError(
            f"tensorrt_llm: {version} is installed, the engine was built by {deployment.tensorrt_llm}; use "
            f"{images.image_of(deployment).name}"
        )
    if deployment.flavour == "llmapi" and not release.has_pytorch_backend(version):
        raise UserError(f"tensorrt_llm: {version} has no PyTorch backend, 1.0 and later do")
    found, needed = preflight.hopper(), num_gpus(deployment)
    if len(found) < needed:
        raise UserError(f"gpu: {needed} needed, {len(found)} visible; lower TP or the instances")


def serve(deployment: Deployment, http_port: int, report: Callable[[str], None]) -> None:
    """Start all ranks, wait for a token, then until interrupted.

    Raises UserError where something is missing, the server ends, or no token comes in time.
    """
    check(deployment, http_port)
    command = commands.server_command(deployment, http_port)
    environment = {**os.environ, **commands.environment(deployment)}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True)
    family: dict[int, str] = {}
    try:
        _wait_for_token(process, deployment, http_port, report)
        family.update(descendants(process.pid))  # of a killed server they cannot be found later
        report(f"serving {deployment.repository} on http://127.0.0.1:{http_port}")
        code = process.wait()
        raise UserError(f"tritonserver: ended with status {code}; its output is above")
    except KeyboardInterrupt:
        return
    finally:
        _stop(process, family, commands.stop_timeout_s(deployment))


def _wait_for_token(
    process: subprocess.Popen[bytes], deployment: Deployment, http_port: int, report: Callable[[str], None]
) -> None:
    dialect = DIALECTS[deployment.flavour]
    end = Endpoint(f"http://127.0.0.1:{http_port}", deployment.text_model, dialect=dialect)
    start, last, told = time.monotonic(), "", time.monotonic()
    while time.monotonic() - start < START_S:
        if process.poll() is not None:
            raise UserError(f"tritonserver: ended with status {process.returncode}; its output is above")
        try:
            generate(end, "a", max_tokens=1)
        except UserError as error:  # not listening, or still loading
            last = str(error)
        else:
            return
        if time.monotonic() - told > REPORT_S:
            told = time.monotonic()
            report(f"no token yet after {told - start:.0f} s: {last}")
        time.sleep(PERIOD_S)
    raise UserError(f"tritonserver: gave no token within {START_S:.0f} s: {last}")


def _stop(process: subprocess.Popen[bytes], family: dict[int, str], timeout_s: float) -> None:
    """End the server and all its ranks."""
    family |= descendants(process.pid)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    end_all(family)
