"""The three ports of a server."""

from __future__ import annotations

import socket

from builder.errors import UserError


def choose(http_port: int, host: str) -> tuple[int, int, int]:
    """HTTP, gRPC and metrics ports: three in a row from the one asked for, or free ones."""
    if http_port:
        ports = (http_port, http_port + 1, http_port + 2)
        for port in ports:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((host, port))
                except (OSError, OverflowError):
                    raise UserError(f"http_port: port {port} is taken; choose another --http-port") from None
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
