"""Rules for peers that trickle, flood, stall or vanish: they cost their connection, for a bounded time, and nobody
else anything."""

import asyncio
import contextlib
import json
import os
import socket
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from app.core.scan import State
from app.core.settings import Settings
from app.push.guard import EXTENSION, Bounds
from app.push.subscriber import Pusher
from app.push.wire import HttpConnection, WebSocketConnection
from tests.conftest import until
from tests.peers import Peer, durable, meet, parse_events
from tests.serving import Serving, run_uvicorn, serve
from tests.test_backpressure import PART, SMALL
from tests.test_push import add_scan
from tests.test_scan import QUEUED, STARTED, ended
from tests.test_wire import count_held

pytestmark = pytest.mark.asyncio

SSE = "Accept: text/event-stream"
HANDSHAKE = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)
# 10,000 take half a minute and as many file descriptors, twice: set SCANWIRE_TEST_PEERS for more.
PEERS = int(os.environ.get("SCANWIRE_TEST_PEERS", "500"))


async def read_problem(peer: Peer) -> tuple[bytes, str]:
    """Status and problem type of an answer that is the last on its connection."""
    status, fields, body = await peer.read_answer()
    assert fields[b"content-type"] == b"application/problem+json"
    assert await peer.read_rest() == b""
    return status.split()[1], json.loads(body)["type"].rpartition(":")[2]


async def watch_on(serving: Serving, scan: str) -> asyncio.Task[httpx.Response]:
    """A subscriber as others are, to see that nobody disturbs it."""
    await add_scan(serving.service.log, scan, QUEUED, STARTED)
    watching = asyncio.create_task(
        serving.http.get(f"/v1/scans/{scan}/events", headers={"Accept": "text/event-stream"})
    )
    await until(lambda: serving.service.hub.statistics().channels == 1)
    return watching


async def check_whole(serving: Serving, scan: str, watching: asyncio.Task[httpx.Response]) -> None:
    await serving.service.log.append(scan, ended(State.COMPLETED))
    seqs = [event["seq"] for event in durable(parse_events((await watching).content))]
    assert seqs == list(range(1, serving.service.log.get(scan).seq + 1))
    await until(lambda: not any(count_held(serving)))


# Requests that never come whole


async def test_half_sent_heads_are_answered_and_gone_at_their_deadline_while_others_are_served(
    tmp_path: Path, sample_prices: Path
) -> None:
    head = b"GET /v1/scanners HTTP/1.1\r\nHost: local"
    async with serve(tmp_path, sample_prices, head_wait_s=2 + PEERS / 1000) as serving:
        watching = await watch_on(serving, "s_a")
        async with contextlib.AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(meet(serving.url)) for _ in range(PEERS)]
            for peer in peers[1:]:  # the first one says nothing at all
                await peer.send(head)
            assert (await serving.http.get("/healthz")).status_code == 200
            answers = await asyncio.gather(*map(read_problem, peers))
            assert Counter(answers) == {(b"408", "slow-request"): PEERS}
        await check_whole(serving, "s_a", watching)


@pytest.mark.parametrize("second", [False, True])
async def test_a_head_that_comes_byte_by_byte_is_cut_off_whichever_request_it_is(
    tmp_path: Path, sample_prices: Path, second: bool
) -> None:
    async with serve(tmp_path, sample_prices, head_wait_s=0.5) as serving, meet(serving.url) as peer:
        if second:
            await peer.ask("/healthz")
            assert (await peer.read_answer())[0].split()[1] == b"200"
        reading = asyncio.create_task(read_problem(peer))
        with contextlib.suppress(ConnectionError):
            for byte in b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 1000:
                await peer.send(bytes([byte]))
                if await asyncio.wait([reading], timeout=0.02) != (set(), {reading}):
                    break
        assert await reading == (b"408", "slow-request")


@pytest.mark.parametrize("pieces", [1, 50])
@pytest.mark.parametrize("place", ["address", "field", "fields"])
async def test_a_head_over_its_bound_is_refused(tmp_path: Path, sample_prices: Path, place: str, pieces: int) -> None:
    fill = "x" * 5000
    head = {
        "address": f"GET /healthz?{fill} HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "field": f"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Fill: {fill}\r\n\r\n",
        "fields": "GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + "X-Fill: xxxxxxxx\r\n" * 300 + "\r\n",
    }[place].encode()
    async with serve(tmp_path, sample_prices, max_head_bytes=4096) as serving, meet(serving.url) as peer:
        await peer.ask("/healthz", "X-Fill: " + "x" * 3000)
        assert (await peer.read_answer())[0].split()[1] == b"200"
        size = len(head) // pieces + 1
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(head), size):
                await peer.send(head[start : start + size])
        assert await read_problem(peer) == (b"431", "head-too-large")


async def test_a_field_without_end_is_cut_off_when_it_is_over_the_bound(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices) as serving, meet(serving.url) as peer:
        await peer.send(b"GET / HTTP/1.1\r\nX-Fill: ")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 50_000_000:
                await peer.send(b"x" * 1000)
                sent += 1000
        assert sent < 5_000_000  # what the kernels held


async def test_many_requests_in_one_piece_are_no_large_head(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices, max_head_bytes=1024) as serving, meet(serving.url) as peer:
        await peer.send(f"GET /healthz HTTP/1.1\r\nHost: {peer.host}\r\n\r\n".encode() * 50)
        for _ in range(50):
            assert (await peer.read_answer())[0].split()[1] == b"200"


async def test_a_body_in_front_of_a_head_is_no_part_of_it(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices, max_head_bytes=1024) as serving, meet(serving.url) as peer:
        next_head = f"GET /healthz HTTP/1.1\r\nHost: {peer.host}\r\n\r\n".encode()
        await peer.ask("/healthz", "Content-Length: 3000", body=b"x" * 3000 + next_head[:20])
        assert (await peer.read_answer())[0].split()[1] == b"200"
        await peer.send(next_head[20:])
        assert (await peer.read_answer())[0].split()[1] == b"200"


async def test_a_head_over_its_bound_is_refused_behind_another_too(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices, max_head_bytes=1024) as serving, meet(serving.url) as peer:
        await peer.ask("/healthz", f"\r\nGET /healthz HTTP/1.1\r\nHost: {peer.host}\r\nX-Fill: {'x' * 1100}")
        assert await read_problem(peer) == (b"431", "head-too-large")


@pytest.mark.parametrize("kind", ["trailers", "one trailer", "extension of a chunk"])
async def test_what_comes_beside_a_body_has_a_bound(tmp_path: Path, sample_prices: Path, kind: str) -> None:
    part = {"trailers": b"X-More: xxxxxxxx\r\n" * 50, "one trailer": b"x" * 1000, "extension of a chunk": b"x" * 1000}
    begin = {"trailers": b"0\r\n", "one trailer": b"0\r\nX-More: ", "extension of a chunk": b"1;more="}
    async with serve(tmp_path, sample_prices) as serving, meet(serving.url) as peer:
        await peer.ask("/healthz", "Transfer-Encoding: chunked", body=begin[kind])
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 50_000_000:
                await peer.send(part[kind])
                sent += 1000
        assert sent < 5_000_000  # what the kernels held


async def test_trailers_within_bounds_are_passed_over(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices) as serving, meet(serving.url) as peer:
        for _ in range(2):
            fields = ("Content-Type: application/json", "Transfer-Encoding: chunked")
            body = b'14\r\n{"scanner":"gap-up"}\r\n0\r\nX-More: x\r\n\r\n'
            await peer.ask("/v1/scans", *fields, method="POST", body=body)
            assert (await peer.read_answer())[0].split()[1] in (b"200", b"202")


@pytest.mark.parametrize("before", ["an answer that is not read", "an open stream"])
async def test_an_upgrade_behind_what_is_not_answered_yet_ends_the_connection(
    tmp_path: Path, sample_prices: Path, before: str
) -> None:
    async with (
        serve(tmp_path, sample_prices, send_buffer=SMALL) as serving,
        meet(serving.url, receive_buffer=SMALL) as peer,
    ):
        await add_scan(serving.service.log, "s_a", QUEUED, STARTED)
        if before == "an open stream":
            await peer.ask("/v1/scans/s_a/events", SSE)
            await until(lambda: serving.service.hub.statistics().channels == 1)
        else:
            await peer.ask("/openapi.json")  # more than the kernels hold
        await peer.ask("/v1/ws", *HANDSHAKE)
        assert b"101 Switching" not in await peer.read_rest()
        await until(lambda: not any(count_held(serving)))


async def test_a_body_that_nobody_reads_and_that_never_comes_is_waited_for_only_so_long(
    tmp_path: Path, sample_prices: Path
) -> None:
    async with serve(tmp_path, sample_prices, body_wait_s=0.1) as serving, meet(serving.url) as peer:
        await add_scan(serving.service.log, "s_a", QUEUED, STARTED)
        await peer.ask("/v1/scans/s_a/events", SSE, "Content-Length: 5", body=b"one")
        assert (await peer.read_head())[0].split()[1] == b"200"
        async with asyncio.timeout(10):
            await peer.read_rest()  # the end comes
        await until(lambda: not any(count_held(serving)))


# Peers that do not read, or are gone


async def test_a_window_that_stays_closed_ends_the_connection_though_the_server_itself_holds_nothing(
    tmp_path: Path, sample_prices: Path
) -> None:
    async with (
        serve(tmp_path, sample_prices, stall_s=0.5) as serving,
        meet(serving.url, receive_buffer=SMALL) as stopped,
    ):
        watching = await watch_on(serving, "s_a")
        await stopped.ask("/v1/scans/s_a/events", SSE)
        await until(lambda: sum(serving.service.hub.statistics().subscribers.values()) == 2)
        for _ in range(40):  # far less than what the kernel takes for a connection, far more than the peer's window
            await serving.service.log.append("s_a", PART)
        wires = [one.wire for one in serving.service.hub._subscribers]  # type: ignore[attr-defined]
        assert all(wire.is_ready for wire in wires)
        await until(lambda: sum(serving.service.hub.statistics().subscribers.values()) == 1)
        await check_whole(serving, "s_a", watching)


async def test_behind_a_stream_the_kernel_is_as_patient_as_before_it(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices, stall_s=7) as serving, meet(serving.url) as peer:
        await add_scan(serving.service.log, "s_a", QUEUED, STARTED)
        await peer.ask("/v1/scans/s_a/events", SSE)
        await until(lambda: serving.service.hub.statistics().channels == 1)
        (wire,) = (one.wire for one in serving.service.hub._subscribers if isinstance(one, Pusher))
        tcp = wire.transport.get_extra_info("socket")
        assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7000
        await serving.service.log.append("s_a", ended(State.COMPLETED))
        await peer.read_answer()
        assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0


async def test_a_download_that_is_taken_too_slowly_is_cut_off(tmp_path: Path, sample_prices: Path) -> None:
    async with (
        serve(
            tmp_path,
            sample_prices,
            send_buffer=SMALL,
            workers=1,
            high_water_bytes=8192,
            stall_s=0.3,
            min_send_bytes_per_s=1_000_000,
        ) as serving,
        meet(serving.url, receive_buffer=SMALL) as peer,
    ):
        await add_scan(serving.service.log, "s_a", QUEUED, STARTED, *[PART] * 1000, ended(State.COMPLETED))
        await peer.ask("/v1/scans/s_a/matches")
        body = await peer.read_exactly(100)
        async with asyncio.timeout(20):
            with contextlib.suppress(EOFError, ConnectionError):
                while some := await peer.read_some(100):
                    body += some
                    await asyncio.sleep(0.01)  # slow, as this is what it is about
        assert not body.endswith(b"\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    "asks",
    [b"POST /v1/scans HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{", b"GET /v1/sc", b""],
    ids=["body", "head", "nothing"],
)
async def test_a_reset_in_the_middle_of_a_request_leaves_nothing(
    tmp_path: Path, sample_prices: Path, asks: bytes
) -> None:
    async with serve(tmp_path, sample_prices) as serving:
        watching = await watch_on(serving, "s_a")
        for _ in range(20):
            async with meet(serving.url) as peer:
                await peer.send(asks)
                await serving.http.get("/healthz")
                peer.reset()
        await check_whole(serving, "s_a", watching)


# WebSockets


@contextlib.asynccontextmanager
async def shake_hands(serving: Serving, *, receive_buffer: int | None = None) -> AsyncIterator[Peer]:
    async with meet(serving.url, receive_buffer=receive_buffer) as peer:
        await peer.ask("/v1/ws", *HANDSHAKE)
        assert (await peer.read_head())[0].split()[1] == b"101"
        yield peer


def mask(opcode: int, payload: bytes = b"", *, is_last: bool = True) -> bytes:
    """A client's frame, masked by zeros."""
    return bytes([opcode | 0x80 * is_last, 0x80 | len(payload)]) + b"\0\0\0\0" + payload


@pytest.mark.parametrize(
    ("flood", "code"),
    [
        (mask(9) * 11, 1008),
        (mask(1, is_last=False) + mask(0, is_last=False) * 20, 1009),
    ],
    ids=["pings", "fragments"],
)
async def test_floods_of_frames_that_are_no_messages_are_bounded(
    tmp_path: Path, sample_prices: Path, flood: bytes, code: int
) -> None:
    async with (
        serve(tmp_path, sample_prices, max_pings_per_heartbeat=10, max_fragments_per_message=10) as serving,
        shake_hands(serving) as peer,
    ):
        await peer.send(flood)
        pongs, _, close = (await peer.read_rest()).partition(b"\x88")
        assert close[1:3] == code.to_bytes(2)
        assert len(pongs) <= 2 * 11  # those of one piece
        await until(lambda: not any(count_held(serving)))


async def test_pings_within_the_bound_are_answered_for_ever(tmp_path: Path, sample_prices: Path) -> None:
    async with (
        serve(tmp_path, sample_prices, max_pings_per_heartbeat=10, heartbeat_s=0.1) as serving,
        shake_hands(serving) as peer,
    ):
        for _ in range(5):
            await peer.send(mask(9, b"mine") * 8)
            answers = await peer.read_until(b"\x89\0")  # up to the server's own ping
            assert answers.count(b"\x8a\x04mine") == 8
            await peer.send(mask(10))


async def test_a_reset_in_the_middle_of_a_frame_leaves_nothing(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices) as serving:
        for cut in range(1, 12):
            async with shake_hands(serving) as peer:
                await peer.send(mask(1, b'{"op":"ping"}')[:cut])
                peer.reset()
        await until(lambda: not any(count_held(serving)))


# How many


@contextlib.asynccontextmanager
async def serve_counted(**bounds: int) -> AsyncIterator[tuple[str, Bounds]]:
    """A server for which every peer is one and the same client."""
    held = Bounds(Settings(**bounds), lambda address: "ip:192.0.2.1", Counter())  # type: ignore[arg-type]

    @contextlib.asynccontextmanager
    async def live(app: Starlette) -> AsyncIterator[dict[str, Bounds]]:
        yield {EXTENSION: held}

    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("here"))], lifespan=live)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        options = {"http": HttpConnection, "ws": WebSocketConnection, "lifespan": "on", "log_level": "warning"}
        async with run_uvicorn(app, listener, **options):
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", held


@pytest.mark.parametrize("bound", ["max_connections", "max_connections_per_client"])
async def test_connections_over_their_bound_are_refused_until_one_is_closed(bound: str) -> None:
    async with serve_counted(**{bound: 3}) as (url, held), contextlib.AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(meet(url)) for _ in range(3)]
        for peer in peers:
            await peer.ask("/")
            assert (await peer.read_answer())[0].split()[1] == b"200"
        async with meet(url) as fourth:
            status, fields, body = await fourth.read_answer()
            assert status.split()[1] == b"503"
            assert int(fields[b"retry-after"]) == json.loads(body)["retry_after_s"] > 0
            assert await fourth.read_rest() == b""
        peers[0].close()
        await until(lambda: held.connections["ip:192.0.2.1"] == 2)
        async with meet(url) as fifth:
            await fifth.ask("/")
            assert (await fifth.read_answer())[0].split()[1] == b"200"
    assert not held.connections
