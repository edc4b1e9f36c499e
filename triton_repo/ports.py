"""The ports of a server: Triton's three, and those beside them."""

from __future__ import annotations

import socket

from builder.errors import UserError


def check(port: int, host: str, name: str) -> None:
    """Raises UserError where nobody can listen there; `name` is that of the option, with underscores."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError):
            flag = name.replace("_", "-")
            raise UserError(f"{name}: port {port} is taken; choose another --{flag}") from None


def choose(http_port: int, host: str) -> tuple[int, int, int]:
    """HTTP, gRPC and metrics ports: three in a row from the one asked for, or free ones."""
    if http_port:
        ports = (http_port, http_port + 1, http_port + 2)
        for port in ports:
            check(port, host, "http_port")
        return ports
    probes = [socket.socket() for _ in range(3)]
    try:
        for probe in probes:
            probe.bind((host, 0))
        first, second, third = (probe.getsockname()[1] for probe in probes)
        return first, second, third
    finally:
        for probe in probes:
            probe.close()
