"""Run with a repository, in a mount namespace whose /dev/shm is small: it fills up while a server runs."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from builder.errors import UserError
from triton_repo.client import Endpoint, generate
from triton_repo.server import Server

LONG = "a " * 2_000_000  # more than the models' memory is at the start
FILLING = Path("/dev/shm/filling")


def said(end: Endpoint, prompt: str) -> str:
    try:
        return generate(end, prompt, max_tokens=5)
    except UserError as error:
        return str(error)


def main() -> None:
    with Server(Path(sys.argv[1]), grace_s=0) as server:
        end = Endpoint(server.url)
        before = generate(end, "a", max_tokens=5)
        with contextlib.suppress(OSError), FILLING.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 20)):
                pass
        sys.stdout.write(f"full: {said(end, LONG)}\n")
        assert generate(end, "a", max_tokens=5) == before
        FILLING.unlink()
        sys.stdout.write(f"free: {said(end, LONG)}\n")
        assert generate(end, "a", max_tokens=5) == before


if __name__ == "__main__":
    main()
