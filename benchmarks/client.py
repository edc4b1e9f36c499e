"""What our client adds to what it measures: how late it sees a token, at one to many clients.

    python -m benchmarks.client [--json]

A process of its own streams tokens as Triton does (chunked HTTP, server-sent events), each with the time at
which it was written; both processes read the same clock. Late is the time from there to our client's mark.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from benchmarks import machine
from triton_repo.client import Endpoint, stream

LEVELS, TOKENS, GAP_S, ROUNDS = (1, 4, 16, 32, 64), 64, 0.01, 3


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One request: a token every `GAP_S`, on a schedule that does not slip."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(x.split(b":")[1]) for x in head.splitlines() if x.lower().startswith(b"content-length"))
    await reader.readexactly(length)
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    begin = time.perf_counter()
    for number in range(1, TOKENS + 1):
        await asyncio.sleep(max(0.0, begin + number * GAP_S - time.perf_counter()))
        event = f"data: {json.dumps({'text_output': repr(time.perf_counter())})}\n\n".encode()
        writer.write(b"%x\r\n%s\r\n" % (len(event), event))
    writer.write(b"0\r\n\r\n")
    await writer.drain()
    writer.close()


async def serve() -> None:
    """Print the port and answer until killed."""
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


def lateness(end: Endpoint, clients: int) -> list[float]:
    """In ms, of all tokens of a round."""

    def one(_: int) -> list[float]:
        return [1e3 * (time.perf_counter() - float(text)) for text in stream(end, "x", max_tokens=TOKENS)]

    with ThreadPoolExecutor(clients) as pool:
        return [x for late in pool.map(one, range(ROUNDS * clients)) for x in late]


def measure() -> dict:
    """Percentiles of lateness at each level."""
    command = [sys.executable, "-m", "benchmarks.client", "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None, "asked for"
            end = Endpoint(f"http://127.0.0.1:{int(server.stdout.readline())}")
            lateness(end, 1)
            rows = [_row(level, lateness(end, level)) for level in LEVELS]
        finally:
            server.kill()
    return {"machine": machine.describe(), "gap_ms": 1e3 * GAP_S, "rows": rows}


def _row(level: int, late: list[float]) -> dict:
    p50, p90, p99 = (round(float(x), 3) for x in np.percentile(late, (50, 90, 99)))
    return {"clients": level, "tokens_per_s": round(level / GAP_S), "p50": p50, "p90": p90, "p99": p99}


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve())
        return
    result = measure()
    if options.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return
    sys.stdout.write(f"late, ms{'clients':>10}{'tokens/s':>10}{'p50':>8}{'p90':>8}{'p99':>8}\n")
    for row in result["rows"]:
        numbers = "".join(f"{row[name]:8.2f}" for name in ("p50", "p90", "p99"))
        sys.stdout.write(f"{'':8}{row['clients']:10}{row['tokens_per_s']:10}{numbers}\n")


if __name__ == "__main__":
    main()
