"""How many snapshot polls one core answers, beside the same endpoint on FastAPI with SlowAPI.

    python -m bench.poll [--seconds 5] [--connections 32]

The server has one core, the load (a process of its own) the other. Rounds of the servers alternate, and a ratio is
taken from the CPU time of the server process for each answer, which other work on the machine cannot change much.
"""

import argparse
import asyncio
import json
import os
import statistics
import urllib.request
from typing import Any, cast

import uvloop

from bench.measure import Server, print_table, serve, serve_scanwire


class Poller(asyncio.Protocol):
    """One connection that sends the same request again as soon as it is answered."""

    def __init__(self, request: bytes, counts: dict[str, int], expected: bytes) -> None:
        self.request, self.counts, self.expected = request, counts, expected
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, separator, body = self.buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        length = 0
        if not head.startswith(b"HTTP/1.1 304"):
            place = head.lower().index(b"content-length:") + 15
            length = int(head[place:].split(b"\r\n", 1)[0])
        if len(body) >= length:
            self.buffer = body[length:]
            self.counts["answered" if head.startswith(self.expected) else "wrong"] += 1
            self.transport.write(self.request)


async def load(port: int, path: str, extra: str, expected: bytes, connections: int, seconds: float) -> dict[str, int]:
    """Polls for so many seconds; gives the answers counted."""
    counts = {"answered": 0, "wrong": 0}
    request = f"GET {path} HTTP/1.1\r\nHost: localhost:{port}\r\n{extra}\r\n".encode()
    loop = asyncio.get_running_loop()
    transports = [
        (await loop.create_connection(lambda: Poller(request, counts, expected), "127.0.0.1", port))[0]
        for _ in range(connections)
    ]
    await asyncio.sleep(0.5)
    counts.update(answered=0, wrong=0)
    await asyncio.sleep(seconds)
    result = dict(counts)
    for transport in transports:
        transport.abort()
    return result


def fetch(port: int, path: str, method: str = "GET", body: Any = None) -> tuple[Any, str]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer), answer.headers.get("etag", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    first = {cores[0]}

    with (
        serve_scanwire(cpus=first) as own,
        serve("bench.peers.fastapi_slowapi:app", cpus=first) as peer,
    ):
        scan_id = fetch(own.port, "/v1/scans", "POST", {"scanner": "gap-up", "params": {"preset": "relaxed"}})[0]["id"]
        path = f"/v1/scans/{scan_id}"
        snapshot: Any = {"state": ""}
        while snapshot["state"] != "completed":
            snapshot, etag = fetch(own.port, path)
        fetch(peer.port, path, "PUT", snapshot)
        works: list[tuple[str, Server, str, bytes]] = [
            ("FastAPI + SlowAPI, 200", peer, "", b"HTTP/1.1 200"),
            ("Scanwire, 200", own, "", b"HTTP/1.1 200"),
            ("Scanwire, 304", own, f"If-None-Match: {etag}\r\n", b"HTTP/1.1 304"),
        ]
        polls: dict[str, list[float]] = {name: [] for name, *_ in works}
        cpu_us: dict[str, list[float]] = {name: [] for name, *_ in works}
        for _ in range(options.rounds):
            for name, server, extra, expected in works:
                before = server.cpu_s()
                counts = uvloop.run(load(server.port, path, extra, expected, options.connections, options.seconds))
                if counts["wrong"] or not counts["answered"]:
                    raise SystemExit(f"{name}: {counts}")
                # The half second of warm-up is in the CPU time too.
                spent_s = (server.cpu_s() - before) * options.seconds / (options.seconds + 0.5)
                polls[name].append(counts["answered"] / options.seconds)
                cpu_us[name].append(spent_s / counts["answered"] * 1e6)
        base_polls, base_cpu = polls[works[0][0]], cpu_us[works[0][0]]
        print_table(
            f"Snapshot polls on one core, {options.connections} connections, median of {options.rounds} rounds",
            ("server", "polls/s", "× peer", "server CPU µs/poll", "peer's CPU / this"),
            [
                (
                    name,
                    f"{statistics.median(polls[name]):,.0f}",
                    statistics.median(a / b for a, b in zip(polls[name], base_polls, strict=True)),
                    statistics.median(cpu_us[name]),
                    statistics.median(b / a for a, b in zip(cpu_us[name], base_cpu, strict=True)),
                )
                for name, *_ in works
            ],
        )


if __name__ == "__main__":
    main()
