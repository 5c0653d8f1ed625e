"""Rules of the direct path, as the peer's socket sees them: the bytes of HTTP and WebSocket, the end, TLS."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import h11
import pytest
import pytest_asyncio
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from app.api import shortcuts
from app.api.security import BodyLimit
from app.core.event import EventType
from app.core.scan import State
from app.core.settings import hash_key
from app.push import channel
from tests.conftest import require, until
from tests.peers import durable, meet, parse_events
from tests.serving import IS_WIRED, Serving, Tls, serve
from tests.test_push import WHOLE, add_scan
from tests.test_scan import QUEUED, STARTED, ended, found

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("nothing_is_held")]

SSE = "Accept: text/event-stream"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(tmp_path_factory: pytest.TempPathFactory, sample_prices: Path) -> AsyncIterator[Serving]:
    assert IS_WIRED[0]
    async with serve(tmp_path_factory.mktemp("state"), sample_prices) as serving:
        yield serving


def count_held(serving: Serving) -> list[int]:
    """What streams hold: leases, sessions, subscribers, channels."""
    hub, service = serving.service.hub.statistics(), serving.service
    return [
        service.limits.statistics().streams,
        service.sessions.statistics().streams,
        sum(hub.subscribers.values()),
        hub.channels,
    ]


@pytest_asyncio.fixture(loop_scope="module")
async def nothing_is_held(serving: Serving) -> AsyncIterator[None]:
    yield
    await until(lambda: not any(count_held(serving)))


@pytest.fixture
def scan(request: pytest.FixtureRequest) -> str:
    """An id of the test's own; what happens to the scan, the test says to the log."""
    return f"s_{abs(hash(request.node.name))}"


async def until_watched(serving: Serving, count: int = 1) -> None:
    await until(lambda: sum(serving.service.hub.statistics().subscribers.values()) == count)


# HTTP


async def test_a_stream_is_chunked_http_by_another_parser_and_its_connection_is_used_again(
    serving: Serving, scan: str
) -> None:
    log, parser = serving.service.log, h11.Connection(h11.CLIENT)
    await add_scan(log, scan, QUEUED, STARTED)
    async with meet(serving.url) as peer:

        async def read_body() -> bytes:
            body = b""
            while True:
                event = parser.next_event()
                if event is h11.NEED_DATA:
                    parser.receive_data(await peer.read_some())
                elif isinstance(event, h11.Response):
                    assert (event.status_code, dict(event.headers)[b"transfer-encoding"]) == (200, b"chunked")
                elif isinstance(event, h11.Data):
                    body += event.data
                else:
                    assert isinstance(event, h11.EndOfMessage)
                    return body

        for _ in range(2):
            fields = [("Host", peer.host), ("Accept", "text/event-stream")]
            request = h11.Request(method="GET", target=f"/v1/scans/{scan}/events", headers=fields)
            await peer.send((parser.send(request) or b"") + (parser.send(h11.EndOfMessage()) or b""))
            reading = asyncio.create_task(read_body())
            if not log.get(scan).state.is_terminal:
                await until_watched(serving)
                await log.append(scan, found(3))
                await log.append(scan, ended(State.COMPLETED))
            body = await reading
            assert body.startswith(b": ok\nretry: ")
            assert [event["seq"] for event in durable(parse_events(body))] == [1, 2, 3, 4]
            parser.start_next_cycle()


async def test_a_request_that_was_sent_behind_an_open_stream_is_answered_after_it(serving: Serving, scan: str) -> None:
    log = serving.service.log
    await add_scan(log, scan, QUEUED)
    async with meet(serving.url) as peer:
        requests = (f"GET /v1/scans/{scan}/events HTTP/1.1\r\nHost: {peer.host}\r\n{SSE}\r\n\r\n").encode()
        requests += f"GET /v1/scans/{scan} HTTP/1.1\r\nHost: {peer.host}\r\n\r\n".encode()
        await peer.send(requests + requests)
        await until_watched(serving)
        await log.append(scan, ended(State.LOST))
        for _ in range(2):
            _, _, body = await peer.read_answer()
            assert [event["type"] for event in parse_events(body)] == ["queued", "end"]
            status, _, body = await peer.read_answer()
            assert (status, json.loads(body)["state"]) == (b"HTTP/1.1 200 OK", "lost")


@pytest.mark.parametrize(("version", "field"), [("1.1", "Connection: close"), ("1.0", "X-Nothing: more")])
async def test_a_client_that_wants_no_second_answer_gets_its_stream_and_then_the_end_of_the_connection(
    serving: Serving, scan: str, version: str, field: str
) -> None:
    log = serving.service.log
    await add_scan(log, scan, QUEUED, STARTED)
    async with meet(serving.url) as peer:
        await peer.ask(f"/v1/scans/{scan}/events", SSE, field, version=version)
        await until_watched(serving)
        await log.append(scan, ended(State.FAILED))
        _, fields, body = await peer.read_answer()
        assert fields[b"connection"] == b"close"
        assert [event["type"] for event in parse_events(body)] == ["queued", "started", "end"]
        assert await peer.read_some() == b""


async def test_a_peer_that_resets_its_connection_harms_nobody(serving: Serving, scan: str) -> None:
    log, hub = serving.service.log, serving.service.hub
    await add_scan(log, scan, QUEUED, STARTED)
    async with meet(serving.url) as rude, meet(serving.url) as peer:
        for one in (rude, peer):
            await one.ask(f"/v1/scans/{scan}/events", SSE)
        await until_watched(serving, 2)
        appending = asyncio.create_task(log.append(scan, found(1)))
        log.listen(lambda _: rude.reset())  # after the commit and before the flush: the write itself meets the reset
        await appending
        log._listeners.pop()
        await log.append(scan, found(1))
        await until(lambda: sum(hub.statistics().subscribers.values()) == 1)
        await log.append(scan, ended(State.COMPLETED))
        _, _, body = await peer.read_answer()
        assert [event["seq"] for event in durable(parse_events(body))] == [1, 2, 3, 4, 5]


async def test_a_stream_of_several_scans_gives_them_in_the_order_of_n(serving: Serving, scan: str) -> None:
    log, names = serving.service.log, [f"{scan}_{number}" for number in range(3)]
    for name in names:
        await add_scan(log, name, QUEUED)
    async with meet(serving.url) as peer:
        await peer.ask("/v1/events?" + "&".join(f"scan={name}" for name in names), SSE)
        await until_watched(serving)
        for part in WHOLE[1:]:  # all three at once: one flush for three channels
            await asyncio.gather(*(log.append(name, part) for name in reversed(names)))
        _, _, body = await peer.read_answer()
        numbers = [int(event["id"].partition("-")[2]) for event in durable(parse_events(body))]
        assert numbers == list(range(numbers[0], numbers[0] + 3 * len(WHOLE)))


async def test_a_refusal_leaves_the_connection_usable_and_holds_nothing(
    tmp_path: Path, sample_prices: Path, scan: str
) -> None:
    async with serve(
        tmp_path, sample_prices, workers=1, max_streams_per_client=1, connect_burst=6, connect_per_s=0.001
    ) as serving:
        log, events = serving.service.log, f"/v1/scans/{scan}/events"
        await add_scan(log, scan, QUEUED)
        await add_scan(log, "s_done", *WHOLE)
        lease = serving.service.limits.open_stream("ip:127.0.0.1")
        async with meet(serving.url) as peer:
            for path, accept, status in (
                ("/v1/scans/s_nobody/events", SSE, b"404"),
                (events, "Accept: image/png", b"406"),
                (f"/v1/scans/s_done/events?after={log.epoch}-{log.shown_n}", SSE, b"204"),
                (events, "Accept: application/x-ndjson", b"429"),  # too many streams
                (events, SSE, b"200"),  # the same, as an EventSource survives it
            ):
                await peer.ask(path, accept)
                head = await peer.read_head() if status == b"204" else await peer.read_answer()
                assert head[0].split()[1] == status
            lease.close()
            for options, code in (
                ({"origin": "https://evil.example"}, 403),
                ({"subprotocols": [Subprotocol("mqtt")]}, 400),
            ):
                with pytest.raises(InvalidStatus) as refused:
                    await connect(serving.url.replace("http", "ws") + "/v1/ws", **options).__aenter__()
                assert refused.value.response.status_code == code
            for _ in range(3):  # what is left in the bucket
                serving.service.limits.charge("connect", "ip:127.0.0.1")
            await peer.ask(events, SSE)
            _, _, body = await peer.read_answer()
            assert b"event: throttled\n" in body
        assert count_held(serving) == [0, 0, 0, 0]


# WebSocket


def open_socket(serving: Serving, query: str = "", **options: Any) -> Any:
    return connect(serving.url.replace("http", "ws") + "/v1/ws" + query, **options)


async def test_replies_around_the_first_change_of_the_frame_header_are_read_by_another_library(
    serving: Serving,
) -> None:
    sizes = []
    async with open_socket(serving) as socket:
        for length in range(70, 100):
            await socket.send(json.dumps({"op": "ping", "ref": "x" * length}))
            text = await socket.recv()
            assert json.loads(text)["ref"] == "x" * length
            sizes.append(len(text))
    assert {125, 126, 127} <= set(sizes)


async def test_events_around_the_second_change_of_the_frame_header_are_read_by_another_library(
    tmp_path: Path, sample_prices: Path
) -> None:
    def make_part(padding: int) -> tuple[EventType, dict[str, Any]]:
        return EventType.MATCHES, {"chunk": 0, "rows": [{"symbol": "A" * padding}]}

    async with serve(tmp_path, sample_prices) as serving, open_socket(serving) as socket:
        log = serving.service.log
        await add_scan(log, "s_big", QUEUED, STARTED, make_part(1))
        around = len((await log.read("s_big", 2))[0].json) - 1
        await socket.send('{"op":"subscribe","scan":"s_big"}')
        assert json.loads(await socket.recv())["ok"] is True
        for _ in range(3):
            await socket.recv()
        for size in (65_534, 65_535, 65_536, 65_537):
            await log.append("s_big", make_part(size - around))
            text = await socket.recv()
            assert len(text) == size
            assert json.loads(text)["data"]["rows"] == [{"symbol": "A" * (size - around)}]


async def test_a_websocket_is_pinged_and_one_that_never_answers_is_cut_off(tmp_path: Path, sample_prices: Path) -> None:
    handshake = (
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    )
    pong = b"\x8a\x80\0\0\0\0"  # masked by zeros
    async with (
        serve(tmp_path, sample_prices, heartbeat_s=0.3) as serving,
        meet(serving.url) as lively,
        meet(serving.url) as dead,
    ):
        for peer in (lively, dead):
            await peer.ask("/v1/ws", *handshake)
            assert (await peer.read_head())[0].split()[1] == b"101"
        cutting = asyncio.create_task(dead.read_rest())
        for _ in range(4):
            assert await lively.read_exactly(2) == b"\x89\x00"
            await lively.send(pong)
        assert await cutting == b"\x89\x00"  # one ping, and after a silence as long the end
        assert sum(serving.service.hub.statistics().subscribers.values()) == 1
        lively.close()
        await until(lambda: not any(count_held(serving)))


async def test_at_a_drain_streams_end_with_bye_and_websockets_close_with_1001(
    tmp_path: Path, sample_prices: Path, scan: str
) -> None:
    async with (
        serve(tmp_path, sample_prices) as serving,
        meet(serving.url) as peer,
        open_socket(serving) as socket,
    ):
        await add_scan(serving.service.log, scan, QUEUED)
        await peer.ask(f"/v1/scans/{scan}/events", SSE)
        await until_watched(serving, 2)
        serving.service.hub.parting.say_at_once(500)
        _, _, body = await peer.read_answer()
        assert [event["type"] for event in parse_events(body)] == ["queued", "bye"]
        bye = json.loads(await socket.recv())
        assert (bye["type"], bye["scan"]) == ("bye", None)
        assert 0 <= bye["data"]["reconnect_ms"] <= 500
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001


async def test_who_comes_at_a_drain_has_an_answer_first_and_then_the_bye(
    tmp_path: Path, sample_prices: Path, scan: str
) -> None:
    async with serve(tmp_path, sample_prices) as serving, meet(serving.url) as peer:
        await add_scan(serving.service.log, scan, QUEUED)
        serving.service.hub.parting.say_at_once(500)
        for path, accept in (
            (f"/v1/scans/{scan}/events", SSE),
            (f"/v1/scans/{scan}/events", "Accept: application/x-ndjson"),
            (f"/v1/events?scan={scan}", SSE),
        ):
            await peer.ask(path, accept)
            status, _, body = await peer.read_answer()
            assert status.split()[1] == b"200"
            assert body.find(b"bye") > body.find(b"queued") > 0
        async with open_socket(serving, f"?scan={scan}") as socket:
            assert [json.loads(await socket.recv())["type"] for _ in range(2)] == ["queued", "bye"]
            with pytest.raises(ConnectionClosed) as closed:
                await socket.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1001


# TLS


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    program = shutil.which("openssl")
    require(program is not None, "no openssl to make a certificate with")
    path = tmp_path_factory.mktemp("tls")
    tls = Tls(path / "certificate.pem", path / "key.pem")
    subprocess.run(
        f"{program} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
        f"-addext subjectAltName=IP:127.0.0.1 -keyout {tls.key} -out {tls.certificate}".split(),
        check=True,
        capture_output=True,
    )
    return tls


async def test_under_tls_the_same_comes(
    tmp_path: Path, sample_prices: Path, scan: str, tls: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "RING_MIN", 1)
    async with serve(tmp_path, sample_prices, tls=tls) as serving:
        log = serving.service.log
        await add_scan(log, scan, QUEUED, STARTED)
        async with open_socket(serving, ssl=tls.make_context()) as socket:
            await socket.send(json.dumps({"op": "subscribe", "scan": scan}))
            streaming = asyncio.create_task(
                serving.http.get(f"/v1/scans/{scan}/events", headers={"Accept": "text/event-stream"})
            )
            await until_watched(serving, 2)
            await until(lambda: serving.service.hub.statistics().pushed.get("event-stream") == 2)
            for rows in range(1, 20):
                await log.append(scan, found(100 * rows))
            await log.append(scan, ended(State.COMPLETED))
            told = parse_events((await streaming).content)
            assert [event["seq"] for event in told] == list(range(1, 23))
            assert json.loads(await socket.recv())["ok"] is True
            messages: list[Any] = []
            while not messages or messages[-1]["type"] != "end":
                messages.append(json.loads(await socket.recv()))
            assert messages == told
        # A plain answer and the short way of polls, on the same server.
        assert (await serving.http.get(f"/v1/scans/{scan}")).json()["state"] == "completed"


UPGRADE = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {'A' * 22}==")
VARYING = {b"date", b"ratelimit"}


async def test_what_is_answered_ahead_of_all_layers_is_answered_as_by_them(
    tmp_path: Path, sample_prices: Path, scan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layered = 0

    async def count(self: BodyLimit, *request: Any) -> None:
        nonlocal layered
        layered += 1
        await self.app(*request)

    monkeypatch.setattr(BodyLimit, "__call__", count)
    keys: Any = [f"me:{hash_key('k')}"]  # so that a wrong one is refused
    async with serve(
        tmp_path,
        sample_prices,
        clock=lambda: 0.0,
        max_streams_per_client=1,
        operator_keys=keys,
        allowed_origins=["https://pages.example"],
    ) as serving:
        limits, log, events = serving.service.limits, serving.service.log, f"/v1/scans/{scan}/events"
        await add_scan(log, scan, QUEUED, STARTED)
        await add_scan(log, "s_done", *WHOLE)
        requests = [
            (events, SSE),
            (events, "Accept: application/x-ndjson"),
            (events, SSE, f"Last-Event-ID: {log.epoch}-1"),
            (events, SSE, "Last-Event-ID: none of yours"),
            (events, SSE, "X-API-Key: of nobody"),
            (events, SSE, "Sec-Fetch-Site: cross-site"),
            (events, SSE, "Connection: close"),
            ("/v1/scans/s_done/events", SSE),
            ("/v1/scans/s_done/events", SSE, f"Last-Event-ID: {log.epoch}-{log.shown_n}"),
            ("/v1/ws", *UPGRADE),
            (f"/v1/ws?scan={scan}", *UPGRADE, "Sec-WebSocket-Protocol: scanwire.v1, scanwire.key.k"),
            ("/v1/ws?scan=s_nobody", *UPGRADE),
            ("/v1/ws?after=x", *UPGRADE),
            ("/v1/ws", *UPGRADE, "Sec-WebSocket-Protocol: mqtt"),
            ("/v1/ws", *UPGRADE, "Sec-WebSocket-Protocol: scanwire.key.wrong"),
            ("/v1/ws", *UPGRADE, "Origin: https://evil.example"),
        ]

        async def read(path: str, *fields: str) -> tuple[bytes, dict[bytes, bytes], bytes]:
            """The head, and as much of the body as comes at once."""
            async with meet(serving.url) as peer:
                await peer.ask(path, *fields)
                status, head = await peer.read_head()
                size = int(head.get(b"content-length", b"0"))
                body = await (peer.read_chunk() if b"transfer-encoding" in head else peer.read_exactly(size))
            await until(lambda: sum(serving.service.hub.statistics().subscribers.values()) == 0)
            return status, {name: value for name, value in head.items() if name not in VARYING}, body

        async def compare(path: str, *fields: str) -> None:
            nonlocal layered
            layered, answer = 0, await read(path, *fields)
            assert layered == 0
            with monkeypatch.context() as patch:
                patch.setattr(shortcuts, "find_wire", lambda scope: None)
                assert await read(path, *fields) == answer

        for request in requests:
            await compare(*request)
        with limits.open_stream("ip:127.0.0.1"):  # the only place
            for request in requests:
                await compare(*request)
        for path in (f"/v1/scans/{scan}/", f"{events}/"):
            assert (await read(path, SSE))[0].split()[1] == b"307"  # they are other addresses


async def test_what_nobody_foresaw_there_is_an_incident_and_holds_nothing(
    serving: Serving, scan: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await add_scan(serving.service.log, scan, *WHOLE)
    async with meet(serving.url) as peer:
        with monkeypatch.context() as patch:
            patch.setattr(shortcuts, "open_stream", lambda *_: 1 / 0)
            await peer.ask(f"/v1/scans/{scan}/events", SSE)
            status, fields, body = await peer.read_answer()
        assert (status.split()[1], fields[b"content-type"]) == (b"500", b"application/problem+json")
        assert json.loads(body)["incident"] in caplog.text
        await peer.ask(f"/v1/scans/{scan}/events", SSE)
        assert (await peer.read_answer())[0].split()[1] == b"200"
