"""What clients cost that cannot be pushed to, and how late they know the end: five ways to wait for the same scan.

    python -m bench.fallback [--seconds 60] [--clients 200] [--only stream]

An external scan whose producer is steady (a progress event a second) is watched, one way after the other, by clients
that come in its second and third second, each from an address of its own: limits and hints are per client. Nothing is
scaled: a minute is a minute. Who is pushed to is shown how the scan comes along too, every `--progress-every` seconds
(SCANWIRE_PROGRESS_PER_S); those that poll see it as often as they ask. The server has one core, clients and producer
(this process) the other. The CPU time is that of the server process, all threads; one more run that nobody watches
tells what of it is the producer's, and the column "for the clients" is without that. A delay counts from the moment
the producer sends the end.
"""

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
import uvloop

from bench.measure import Server, print_table, serve_scanwire

FIRST_S, ARRIVE_WITHIN_S = 1.0, 2.0  # clients come after the first progress, and not all at once
FIXED_S = 2.0
BACKOFF_FIRST_S, BACKOFF_MOST_S, BACKOFF_GROWTH = 5.0, 30.0, 1.2
LONG_POLL_S = 25


class Asker:
    """One client on one connection, from an address of its own; it reconnects when the server has closed it."""

    def __init__(self, port: int, number: int) -> None:
        self.port = port
        self.address = f"127.1.{number // 250}.{number % 250 + 1}"
        self.requests = self.bytes = 0
        self.knew_at = 0.0
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter | None = None

    async def send(self, path: str, *fields: str) -> None:
        if self.writer is None or self.reader.at_eof():
            self.disconnect()
            self.reader, self.writer = await asyncio.open_connection(
                "127.0.0.1", self.port, local_addr=(self.address, 0), limit=2**20
            )
        head = "\r\n".join((f"GET {path} HTTP/1.1", "Host: 127.0.0.1", *fields, "", "")).encode()
        self.writer.write(head)
        self.requests += 1
        self.bytes += len(head)

    async def ask(self, path: str, *fields: str) -> Any:
        """The JSON body of an answer."""
        await self.send(path, *fields)
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):  # the server had closed it just then: idle for too long
            self.disconnect()
            return await self.ask(path, *fields)
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"a client was refused: {head.decode()}")
        place = head.lower().index(b"content-length:") + 15
        body = await self.reader.readexactly(int(head[place:].split(b"\r\n", 1)[0]))
        self.bytes += len(head) + len(body)
        return orjson.loads(body)

    def note_end(self) -> None:
        self.knew_at = time.monotonic()

    def disconnect(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


Wait = Callable[[Asker, str], Awaitable[None]]


async def wait_by_fixed_polls(asker: Asker, path: str) -> None:
    snapshot = await asker.ask(path)
    while snapshot["end"] is None:
        await asyncio.sleep(FIXED_S)
        snapshot = await asker.ask(path)


async def wait_by_fixed_polls_of_a_script(asker: Asker, path: str) -> None:
    """As `requests.get` in a loop: a connection for each poll."""
    snapshot = await asker.ask(path)
    while snapshot["end"] is None:
        asker.disconnect()
        await asyncio.sleep(FIXED_S)
        snapshot = await asker.ask(path)


async def wait_by_backoff(asker: Asker, path: str) -> None:
    pause_s = BACKOFF_FIRST_S
    while (await asker.ask(path))["end"] is None:
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * BACKOFF_GROWTH, BACKOFF_MOST_S)


async def wait_by_hints(asker: Asker, path: str) -> None:
    snapshot = await asker.ask(path)
    while snapshot["end"] is None:
        await asyncio.sleep(snapshot["poll_after_s"])
        snapshot = await asker.ask(path)


async def wait_by_long_polls(asker: Asker, path: str) -> None:
    snapshot = await asker.ask(path)
    while snapshot["end"] is None:
        snapshot = await asker.ask(f"{path}?after={snapshot['cursor']}", f"Prefer: wait={LONG_POLL_S}")


async def wait_on_stream(asker: Asker, path: str) -> None:
    await asker.send(f"{path}/events", "Accept: text/event-stream")
    while line := await asker.reader.readline():
        asker.bytes += len(line)
        if line == b"event: end\n":
            return
    raise SystemExit("a stream ended without the end")


WAYS: dict[str, tuple[str, Wait]] = {
    "fixed": (f"(a) polls every {FIXED_S:g} s", wait_by_fixed_polls),
    "script": ("(a) the same, each on a new connection", wait_by_fixed_polls_of_a_script),
    "backoff": ("(b) the playbook's backoff", wait_by_backoff),
    "hints": ("(c) polls by `poll_after_s`", wait_by_hints),
    "long": ("(d) long polls", wait_by_long_polls),
    "stream": ("(e) server-sent events", wait_on_stream),
}


def measure_cpu_s(server: Server) -> float:
    """User and system time of all threads, in nanosecond steps where /proc/…/stat has hundredths."""
    tasks = Path(f"/proc/{server.pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


async def post(server: Server, path: str, body: Any, token: str = "") -> Any:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    data = orjson.dumps(body)
    fields = f"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\nConnection: close"
    if token:
        fields += f"\r\nAuthorization: Bearer {token}"
    writer.write(f"POST {path} HTTP/1.1\r\n{fields}\r\n\r\n".encode() + data)
    head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    if not head.startswith(b"HTTP/1.1 202"):
        raise SystemExit(f"the producer was refused: {head.decode()} {answer.decode()}")
    return orjson.loads(answer)


async def produce(server: Server, scan: Any, seconds: int) -> float:
    """A unit of work a second, and the end with the last of them; gives when that was sent."""
    path, token, began = scan["links"]["events"], scan["producer_token"], time.monotonic()
    for done in range(1, seconds):
        await asyncio.sleep(began + done - time.monotonic())
        await post(server, path, {"type": "progress", "done": done}, token)
    await asyncio.sleep(began + seconds - time.monotonic())
    ended = time.monotonic()
    await post(server, path, [{"type": "progress", "done": seconds}, {"type": "end", "state": "completed"}], token)
    return ended


async def watch(asker: Asker, wait: Wait, path: str, arrives_s: float) -> None:
    await asyncio.sleep(arrives_s)
    await wait(asker, path)
    asker.note_end()
    asker.disconnect()


async def run(server: Server, seconds: int, clients: int, wait: Wait) -> tuple[list[Asker], float, float]:
    """The clients, when the end was sent, and the CPU time of the server."""
    params = {"title": "A steady scan", "total": seconds, "unit": "steps"}
    askers = [Asker(server.port, number) for number in range(clients)]
    before = measure_cpu_s(server)
    scan = await post(server, "/v1/scans", {"scanner": "external", "params": params})
    arrivals = [FIRST_S + ARRIVE_WITHIN_S * number / max(1, clients) for number in range(clients)]
    watching = [
        asyncio.create_task(watch(asker, wait, scan["links"]["self"], at))
        for asker, at in zip(askers, arrivals, strict=True)
    ]
    ended = await produce(server, scan, seconds)
    await asyncio.gather(*watching)
    return askers, ended, measure_cpu_s(server) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--progress-every", type=float, default=10, help="seconds; 1 is as often as it comes")
    parser.add_argument("--only", choices=WAYS, action="append", help="one way, or several; all when left out")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})

    rows: list[tuple[object, ...]] = []
    env = {"SCANWIRE_PROGRESS_PER_S": str(1 / options.progress_every)}
    for name in ("nobody", *(options.only or WAYS)):
        title, wait = WAYS.get(name, ("nobody watches", wait_on_stream))
        with serve_scanwire(cpus={cores[0]}, env=env) as server:
            clients = options.clients if name in WAYS else 0
            askers, ended, cpu_s = uvloop.run(run(server, options.seconds, clients, wait))
        if name not in WAYS:
            idle_s = cpu_s
            rows.append((title, 0, "", cpu_s, "", "", "", ""))
            continue
        requests = sum(asker.requests for asker in askers)
        delays = [(asker.knew_at - ended) * 1000 for asker in askers]
        if min(delays) < 0:
            raise SystemExit(f"{title}: a client knew the end before it was sent")
        mb = sum(asker.bytes for asker in askers) / 1e6
        rows.append(
            (
                title,
                requests,
                requests / clients,
                cpu_s,
                (cpu_s - idle_s) * 1000,
                mb,
                f"{statistics.mean(delays):,.0f}",
                f"{max(delays):,.0f}",
            )
        )
    print(f"Streams are shown progress every {options.progress_every:g} s.")
    headers = ("how", "requests", "a client", "CPU s", "ms for the clients", "MB", "delay ms, mean", "worst")
    print_table(f"{options.clients} clients wait for a scan of {options.seconds} s", headers, rows)


if __name__ == "__main__":
    main()
