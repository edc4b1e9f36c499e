"""The ports of a server: Triton's three, and those beside them."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

from builder.errors import UserError

CLIENTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST, TRIES = 10_000, 50


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
    first, second, third = _free(3, host)
    return first, second, third


def _free(count: int, host: str) -> list[int]:
    """Ports that nobody has, below those that the kernel gives to clients: until a server has started, a
    client could have got one of these."""
    first_of_clients = int(CLIENTS.read_text().split()[0]) if CLIENTS.is_file() else LOWEST
    candidates = range(LOWEST, first_of_clients)
    with ExitStack() as stack:
        found: list[int] = []
        for port in [*random.sample(candidates, min(len(candidates), TRIES)), *[0] * count]:
            probe = stack.enter_context(socket.socket())
            with suppress(OSError):
                probe.bind((host, port))
                found.append(probe.getsockname()[1])
            if len(found) == count:
                return found
        raise UserError(f"http_port: no {count} ports are free; end what takes them")
