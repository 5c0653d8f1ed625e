"""The rule that nothing stays behind: clients come over every transport and leave in every way, again and again, and
the server is afterwards as it was before."""

import asyncio
import contextlib
import gc
import os
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from app.core.scan import State
from app.push.guard import Bounds
from bench.measure import read_memory_mb
from tests.chaos.test_peers import HANDSHAKE, SSE, mask
from tests.conftest import until
from tests.peers import Peer, meet
from tests.serving import Serving, serve
from tests.test_push import add_scan
from tests.test_scan import QUEUED, STARTED, ended
from tests.test_wire import count_held

CLIENTS = 100
# 200 take some minutes: set SCANWIRE_TEST_CYCLES for them.
CYCLES = int(os.environ.get("SCANWIRE_TEST_CYCLES", "6"))
WARM_UP = 2  # cycles in which what is loaded or cached once comes
SCAN = "s_again"
KEEP_ALIVE = "HttpToolsProtocol.timeout_keep_alive_handler"
# What holds its place until the client leaves, or the scan ends.
STAYING = {
    "event-stream": (f"/v1/scans/{SCAN}/events", (SSE,)),
    "x-ndjson": (f"/v1/scans/{SCAN}/events", ("Accept: application/x-ndjson",)),
    "websocket": (f"/v1/ws?scan={SCAN}", HANDSHAKE),
    "long-poll": (f"/v1/scans/{SCAN}", ("Prefer: wait=50",)),
}
TRANSPORTS = (*STAYING, "poll")
OWN = ("app.", "uvicorn.", "starlette.", "sse_starlette.", "websockets.", "_asyncio.", "asyncio.locks.")
WAYS = ("politely", "close", "reset", "in mid-request")


class Client(NamedTuple):
    transport: str
    way: str
    peer: Peer

    @property
    def stays(self) -> bool:
        return self.transport in STAYING and self.way != "in mid-request"

    async def come(self, cursor: str, fields: tuple[str, ...]) -> None:
        """Asks, and is given what there is."""
        path, own = STAYING.get(self.transport, (f"/v1/scans/{SCAN}", ()))
        if self.transport == "long-poll":
            path += f"?after={cursor}"
        if self.way == "in mid-request":
            if self.transport == "websocket":
                await self.peer.ask(path, *own, *fields)
                await self.peer.read_head()
                await self.peer.send(mask(1, b'{"op":"ping"}')[:9])
            else:
                await self.peer.send(f"GET {path} HTTP/1.1\r\nHost: {self.peer.host}\r\nX-Half".encode())
            return
        await self.peer.ask(path, *own, *fields)
        if self.transport in ("event-stream", "x-ndjson", "websocket"):
            await self.peer.read_until(b'"started"')

    async def leave(self) -> None:
        if self.way == "politely":
            if self.transport == "websocket":
                await self.peer.send(mask(8, b"\x03\xe8"))
                assert b"\x88\x02\x03\xe8" in await self.peer.read_rest()
            elif self.transport in ("event-stream", "x-ndjson"):
                assert b'"completed"' in await self.peer.read_until(b"\r\n0\r\n\r\n")
            else:
                assert (await self.peer.read_answer())[0].split()[1] == b"200"
            self.peer.close()
        elif self.way == "close":
            self.peer.close()
        else:
            self.peer.reset()


async def cycle(serving: Serving) -> None:
    """All come, most leave, the scan ends, and the polite ones hear of it and leave."""
    log, limits = serving.service.log, serving.service.limits
    await add_scan(log, SCAN, QUEUED, STARTED)
    cursor = f"{log.epoch}-{log.shown_n}"
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for number in range(CLIENTS):
            peer = await stack.enter_async_context(meet(serving.url))
            clients.append(
                Client(TRANSPORTS[number % len(TRANSPORTS)], WAYS[number // len(TRANSPORTS) % len(WAYS)], peer)
            )
        for number, client in enumerate(clients):
            await client.come(cursor, (f"X-Forwarded-For: 192.0.2.{number}",))
        halves = sum(client.transport == "websocket" and not client.stays for client in clients)
        staying = [client for client in clients if client.stays]
        await until(lambda: limits.statistics().streams == len(staying) + halves)
        for client in clients:
            if client.way != "politely":
                await client.leave()
        await until(lambda: limits.statistics().streams == sum(client.way == "politely" for client in staying))
        await log.append(SCAN, ended(State.COMPLETED))
        for client in clients:
            if client.way == "politely":
                await client.leave()
    await log.remove(SCAN)


class Kept(NamedTuple):
    """What a process has at one moment, by kind. All of it comes back to what it was."""

    tasks: int
    files: int  # open file descriptors, of both ends of a connection
    timers: Counter[str]  # that will fire, by what they call
    held: list[int]  # leases, sessions, subscribers, channels
    connections: dict[str, int]  # by client
    scans: int

    @classmethod
    def take_stock(cls, serving: Serving, bounds: Bounds) -> "Kept":
        scheduled: Any = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
        timers = [handle._callback.__qualname__ for handle in scheduled if not handle.cancelled()]
        return cls(
            len(asyncio.all_tasks()),
            len(os.listdir("/proc/self/fd")),
            Counter(timers),
            count_held(serving),
            dict(bounds.connections),
            serving.service.log.statistics().scans,
        )


async def settle(serving: Serving, bounds: Bounds, wanted: Kept | None) -> Kept:
    """What is kept once the reaper had its turns; waits for it to be what is wanted."""
    limits, sessions = serving.service.limits, serving.service.sessions
    async with asyncio.timeout(20):
        while sessions.statistics().sessions or limits.statistics().buckets:
            await serving.service.reaper.reap()
            await asyncio.sleep(0)
    # A timeout of the test's own would be among the timers.
    deadline = asyncio.get_running_loop().time() + 20
    while True:
        kept = Kept.take_stock(serving, bounds)
        is_settled = kept == wanted if wanted is not None else not any(kept.held) and KEEP_ALIVE not in kept.timers
        if is_settled or asyncio.get_running_loop().time() > deadline:
            return kept
        await asyncio.sleep(0)


def name_type(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def count_objects() -> Counter[str]:
    gc.collect()
    return Counter(map(name_type, gc.get_objects()))


@contextlib.asynccontextmanager
async def serve_watched(
    folder: Path, prices: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Serving, list[Bounds]]]:
    """A server for which each peer's address counts, with the counts that its connections share."""
    made: list[Bounds] = []

    def make(settings: Any, name_client: Any, connections: Any) -> Bounds:
        made.append(Bounds(settings, lambda address: f"ip:{address}", connections))
        return made[-1]

    monkeypatch.setattr("app.application.Bounds", make)
    settings: dict[str, Any] = {
        "workers": 1,
        "session_idle_s": 0.001,
        "reap_every_s": 1000,
        "trusted_proxies": ("127.0.0.1",),
    }
    # uvicorn by itself forgets the timer of a connection that is reset, which holds it until then.
    async with serve(folder, prices, keep_alive_s=1, **settings) as serving:
        yield serving, made


@pytest.mark.usefixtures("both_paths")
async def test_whoever_comes_and_leaves_leaves_nothing_behind(
    tmp_path: Path, sample_prices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve_watched(tmp_path, sample_prices, monkeypatch) as (serving, made):
        (bounds,) = made
        for _ in range(WARM_UP):
            await cycle(serving)
        base = await settle(serving, bounds, None)
        assert base.held == [0] * 4
        assert base.connections == {}
        half, before_mb = Counter[str](), 0.0
        for place in range(CYCLES):
            await cycle(serving)
            if place + 1 == CYCLES // 2:
                assert await settle(serving, bounds, base) == base
                half, before_mb = count_objects(), read_memory_mb(os.getpid(), "VmRSS")
        assert await settle(serving, bounds, base) == base
        grown = +(count_objects() - half)
        # Cancelled timers stay in asyncio's list until they are due, so there is always something of theirs; but one
        # object for each client and cycle would be more than all that.
        assert grown.total() < CLIENTS * (CYCLES - CYCLES // 2), grown.most_common(10)
        own = {name: count for name, count in grown.items() if name.startswith(OWN)}
        assert sum(own.values()) <= 10, own
        print(
            f"{before_mb:.1f} MB after {CYCLES // 2} cycles, {read_memory_mb(os.getpid(), 'VmRSS'):.1f} after {CYCLES}"
        )


async def test_a_reset_leaves_no_timer_that_would_hold_the_connection(
    tmp_path: Path, sample_prices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.serving.IS_WIRED", [True])
    async with serve_watched(tmp_path, sample_prices, monkeypatch) as (serving, (bounds,)), meet(serving.url) as peer:
        await peer.ask("/healthz")
        await peer.read_answer()
        assert Kept.take_stock(serving, bounds).timers[KEEP_ALIVE] == 1
        peer.reset()
        await until(lambda: not bounds.connections)
        assert Kept.take_stock(serving, bounds).timers[KEEP_ALIVE] == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_whoever_has_left_is_freed_without_the_garbage_collector(
    tmp_path: Path, sample_prices: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """A full collection hardly ever comes, being a pause that all feel; what waited for it would pile up."""
    monkeypatch.setattr("tests.serving.IS_WIRED", [True])
    monkeypatch.setattr("tests.chaos.test_leaks.TRANSPORTS", (transport,))
    async with serve_watched(tmp_path, sample_prices, monkeypatch) as (serving, (bounds,)):
        await cycle(serving)
        await settle(serving, bounds, None)
        gc.collect()
        gc.disable()
        try:
            await cycle(serving)
            await settle(serving, bounds, None)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            piled = Counter(name for thing in gc.garbage if (name := name_type(thing)).startswith(OWN))
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        assert piled.total() < CLIENTS / 10, piled
