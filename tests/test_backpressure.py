"""Rules for peers that read slowly, or not at all: what they cost, what they get, and when they are cut off."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop
from websockets.asyncio.client import ClientConnection, connect

from app.core.event import EventType
from app.core.scan import Progress, State
from app.push import channel
from app.push.ring import Ring
from app.push.subscriber import Pusher
from app.push.wire import Connection, HttpConnection
from tests.conftest import until
from tests.peers import Peer, durable, meet, parse_events
from tests.serving import Serving, serve
from tests.test_push import add_scan
from tests.test_scan import QUEUED, STARTED, ended
from tests.test_wire import count_held

SSE = "Accept: text/event-stream"
HIGH_WATER = 8192
PAGE = 65_536  # of events, that a stream may have in its transport
SMALL = 4096  # of the kernel's buffers; it doubles what it is asked for
ROW = {"symbol": "A" * 2000}
PART = (EventType.MATCHES, {"chunk": 0, "rows": [ROW]})


@asynccontextmanager
async def serving_tightly(path: Path, prices: Path, **settings: Any) -> AsyncIterator[Serving]:
    settings = {"workers": 1, "high_water_bytes": HIGH_WATER} | settings
    async with serve(path, prices, send_buffer=SMALL, **settings) as serving:
        yield serving


def find_wires(serving: Serving) -> list[Connection]:
    wires = [one.wire for one in serving.service.hub._subscribers if isinstance(one, Pusher)]
    return [wire for wire in wires if isinstance(wire, Connection)]


async def until_all_behind(serving: Serving, scan: str) -> None:
    """Appends until every peer that watches is behind, and stays so though the kernels take some more."""
    await until(lambda: find_wires(serving))
    in_a_row = 0
    async with asyncio.timeout(20):
        while in_a_row < 50:
            await serving.service.log.append(scan, PART)
            await asyncio.sleep(0)
            in_a_row = in_a_row + 1 if all(wire._is_behind for wire in find_wires(serving)) else 0


async def test_a_peer_that_stops_reading_costs_a_bounded_buffer_and_gets_everything_when_it_reads_again(
    tmp_path: Path, sample_prices: Path
) -> None:
    async with (
        serving_tightly(tmp_path, sample_prices, progress_per_s=1e6) as serving,
        meet(serving.url, receive_buffer=SMALL) as lazy,
        connect(serving.url.replace("http", "ws") + "/v1/ws") as socket,
    ):
        log = serving.service.log
        await add_scan(log, "s_a", QUEUED, STARTED)
        await lazy.ask("/v1/scans/s_a/events", SSE)
        await until(lambda: len(find_wires(serving)) == 2)
        held: list[int] = []
        (lazy_wire,) = (wire for wire in find_wires(serving) if isinstance(wire, HttpConnection))
        await socket.send('{"op":"subscribe","scan":"s_a"}')
        told: list[Any] = []

        async def read_until(seq: int) -> None:
            while not told or told[-1]["seq"] < seq:
                message = json.loads(await socket.recv())
                if "ref" not in message:
                    told.append(message)

        for number in range(100):
            await log.append("s_a", PART)
            log.publish("s_a", Progress(done=number, total=100, unit="symbols"))
            await read_until(number + 3)  # the other one has it, whatever the lazy one does
            held.append(lazy_wire.transport.get_write_buffer_size())
        frame = 2 * 2200  # at most two events came between two looks
        assert lazy_wire._is_behind
        assert 0 < max(held) <= PAGE + frame
        assert held[-1] == held[-50]  # it is skipped, not written to

        await log.append("s_a", ended(State.COMPLETED))
        body = b""
        _, fields = await lazy.read_head()
        assert fields[b"transfer-encoding"] == b"chunked"
        largest = 0
        while chunk := await lazy.read_chunk():
            body += chunk
            largest = max(largest, lazy_wire.transport.get_write_buffer_size())
        assert largest <= PAGE + 10_000
        events = parse_events(body)
        assert [event["seq"] for event in durable(events)] == list(range(1, 104))
        folded = [event["data"]["done"] for event in events if event["type"] == "progress"]
        assert folded == sorted(folded)
        assert len(folded) < 50
        await read_until(103)
        assert [event["seq"] for event in durable(told)] == list(range(1, 104))


@pytest.mark.parametrize("io_uring", [True, False])
@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_quick_and_slow_peers_that_are_written_to_together_get_the_same(
    tmp_path: Path, sample_prices: Path, monkeypatch: pytest.MonkeyPatch, run: Any, *, io_uring: bool
) -> None:
    monkeypatch.setattr(channel, "RING_MIN", 2)
    shared: list[int] = []

    def send(ring: Ring, fds: Any, data: bytes, send: Any = Ring.send) -> Any:
        taken = send(ring, fds, data)
        shared.append(sum(0 < size < len(data) for size in taken))
        return taken

    monkeypatch.setattr(Ring, "send", send)

    async def read_body(peer: Peer, pace: int) -> bytes:
        body = b""
        _, _ = await peer.read_head()
        while chunk := await peer.read_chunk():
            body += chunk
            for _ in range(pace):
                await asyncio.sleep(0)
        return body

    async def read_messages(socket: ClientConnection) -> list[Any]:
        told = [json.loads(await socket.recv())]
        while told[-1]["type"] != "end":
            told.append(json.loads(await socket.recv()))
        return told

    async def work() -> None:
        async with (
            serving_tightly(tmp_path, sample_prices, heartbeat_s=0.01, io_uring=io_uring) as serving,
            contextlib.AsyncExitStack() as stack,
        ):
            log = serving.service.log
            await add_scan(log, "s_a", QUEUED, STARTED)
            peers = [await stack.enter_async_context(meet(serving.url, receive_buffer=SMALL)) for _ in range(12)]
            address = serving.url.replace("http", "ws") + "/v1/ws?scan=s_a"
            sockets = [await stack.enter_async_context(connect(address)) for _ in range(4)]
            for peer in peers:
                await peer.ask("/v1/scans/s_a/events", SSE)
            await until(lambda: len(find_wires(serving)) == 16)
            bodies = [asyncio.create_task(read_body(peer, place % 4 * 10)) for place, peer in enumerate(peers)]
            messages = [asyncio.create_task(read_messages(socket)) for socket in sockets]
            for number in range(300):
                await log.append("s_a", PART)
                log.publish("s_a", Progress(done=number, total=300, unit="symbols"))
            await log.append("s_a", ended(State.COMPLETED))
            everything = [parse_events(body) for body in await asyncio.gather(*bodies)]
            everything += await asyncio.gather(*messages)
        assert [[event["seq"] for event in durable(events)] for events in everything] == [list(range(1, 304))] * 16

    run(work())
    assert any(shared) == io_uring  # some took a part only, and the rest came by the transport


@pytest.mark.parametrize("kind", ["stream", "websocket"])
async def test_a_peer_that_is_behind_for_too_long_is_cut_off_and_everything_is_given_back(
    tmp_path: Path, sample_prices: Path, kind: str
) -> None:
    async with (
        serving_tightly(tmp_path, sample_prices, stall_s=0.2) as serving,
        meet(serving.url, receive_buffer=SMALL) as peer,
    ):
        await add_scan(serving.service.log, "s_a", QUEUED, STARTED)
        if kind == "stream":
            await peer.ask("/v1/scans/s_a/events", SSE)
        else:
            key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
            await peer.ask("/v1/ws", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", key)
            await peer.read_head()
            text = b'{"op":"subscribe","scan":"s_a"}'
            await peer.send(b"\x81" + bytes([0x80 | len(text)]) + b"\0\0\0\0" + text)
            await until(lambda: serving.service.hub.statistics().channels == 1)
        await until_all_behind(serving, "s_a")
        assert count_held(serving) == [1, 1, 1, 1]
        await until(lambda: not any(count_held(serving)))
        assert len(await peer.read_rest()) < 10 * SMALL  # what the kernels held
        await serving.service.log.append("s_a", ended(State.COMPLETED))


async def test_a_peer_that_resets_while_it_is_behind_is_forgotten_and_the_others_go_on(
    tmp_path: Path, sample_prices: Path
) -> None:
    async with (
        serving_tightly(tmp_path, sample_prices) as serving,
        meet(serving.url, receive_buffer=SMALL) as rude,
        meet(serving.url) as peer,
    ):
        await add_scan(serving.service.log, "s_a", QUEUED, STARTED)
        await rude.ask("/v1/scans/s_a/events", SSE)
        await until_all_behind(serving, "s_a")
        await peer.ask("/v1/scans/s_a/events", SSE)
        await until(lambda: len(find_wires(serving)) == 2)
        rude.reset()
        await until(lambda: len(find_wires(serving)) == 1)
        await serving.service.log.append("s_a", ended(State.COMPLETED))
        _, _, body = await peer.read_answer()
        seqs = [event["seq"] for event in durable(parse_events(body))]
        assert seqs == list(range(1, serving.service.log.get("s_a").seq + 1))


# Downloads


async def add_found(serving: Serving, rows: int) -> None:
    await add_scan(serving.service.log, "s_a", QUEUED, STARTED)
    parts = [(EventType.MATCHES, {"chunk": 0, "rows": [ROW] * 10})] * (rows // 10)
    await serving.service.log.append("s_a", *parts, ended(State.COMPLETED))


async def begin_download(serving: Serving, peer: Peer) -> None:
    await peer.ask("/v1/scans/s_a/matches")
    assert (await peer.read_head())[0].endswith(b"200 OK")


async def test_a_download_that_is_slow_goes_on_and_one_that_nobody_reads_is_cut_off(
    tmp_path: Path, sample_prices: Path
) -> None:
    stall_s = 0.4
    async with (
        serving_tightly(tmp_path, sample_prices, stall_s=stall_s) as serving,
        meet(serving.url, receive_buffer=SMALL) as slow,
        meet(serving.url, receive_buffer=SMALL) as dead,
    ):
        await add_found(serving, 1000)
        for peer in (slow, dead):
            await begin_download(serving, peer)
        loop, body = asyncio.get_running_loop(), b""
        began = loop.time()
        while loop.time() - began < 4 * stall_s:  # slow, as this is what it is about
            body += await slow.read_some(1000)
            await asyncio.sleep(0.005)
        body += await slow.read_until(b"\r\n0\r\n\r\n")
        assert body.count(b'"symbol"') == 1000
        with pytest.raises((EOFError, ConnectionError)):
            await dead.read_until(b"\r\n0\r\n\r\n")


async def test_a_download_that_retention_overtakes_never_ends_as_if_it_were_whole(
    tmp_path: Path, sample_prices: Path
) -> None:
    async with (
        serving_tightly(tmp_path, sample_prices) as serving,
        meet(serving.url, receive_buffer=SMALL) as peer,
    ):
        await add_found(serving, 1000)
        await begin_download(serving, peer)
        await serving.service.log.trim("s_a")
        with pytest.raises((EOFError, ConnectionError)):
            await peer.read_until(b"\r\n0\r\n\r\n")
        assert (await serving.http.get("/v1/scans/s_a/matches")).status_code == 410


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_peer_that_has_sent_another_request_behind_its_stream_and_leaves_is_no_error(
    tmp_path: Path, sample_prices: Path, capsys: pytest.CaptureFixture[str], run: Any
) -> None:
    async def leave() -> None:
        async with serve(tmp_path, sample_prices) as serving:
            await add_scan(serving.service.log, "s_a", QUEUED, STARTED)
            for _ in range(10):
                async with meet(serving.url) as peer:
                    request = f"GET /v1/scans/s_a/events HTTP/1.1\r\nHost: {peer.host}\r\n{SSE}\r\n\r\n"
                    await peer.send(request.encode() * 2)
                    await asyncio.sleep(0)
                    peer.reset()
            await until(lambda: not any(count_held(serving)))

    run(leave())
    assert "ERROR" not in capsys.readouterr().err  # where uvicorn says them
