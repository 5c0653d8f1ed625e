"""Rules for storms: thousands of peers that come or go in the same instant cost nobody an event, and nobody its turn.

How long they take is measured by bench.storm, whose parts these are: a server and a crowd, each a process of its own.
"""

import asyncio
import contextlib
import json
import os
import socket
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from app.core.scan import State
from app.push.guard import _PER_TURN, Turns
from app.push.wire import HttpConnection
from bench.storm import weather
from tests.conftest import until
from tests.peers import durable, meet, parse_events
from tests.serving import serve
from tests.test_push import add_scan
from tests.test_scan import QUEUED, STARTED, ended
from tests.test_wire import count_held

# 5,000 take a minute and as many file descriptors, twice: set SCANWIRE_TEST_STREAMS for them.
STREAMS = int(os.environ.get("SCANWIRE_TEST_STREAMS", "1000"))
SSE = "Accept: text/event-stream"


def test_streams_that_are_all_cut_at_once_are_back_with_nothing_lost_and_nothing_twice() -> None:
    outcome = weather(STREAMS, [0, 0.5])
    assert outcome.faults == []
    assert outcome.expected > STREAMS * 5


async def test_work_in_turns_is_done_in_order_and_for_a_few_in_each_turn_of_the_loop() -> None:
    turns, done, turn = Turns(), list[tuple[int, int]](), 0

    def work(place: int) -> None:
        done.append((place, turn))

    for place in range(3 * _PER_TURN):
        if turns.take(partial(work, place)):
            work(place)
    async with asyncio.timeout(5):
        while len(done) < 3 * _PER_TURN:
            await asyncio.sleep(0)
            turn += 1
            # Whoever comes later does not get in between.
            assert not turns.take(partial(work, 3 * _PER_TURN + turn)) or len(done) >= 3 * _PER_TURN
    assert [place for place, _ in done] == sorted(place for place, _ in done)
    assert max(Counter(turn for _, turn in done).values()) <= _PER_TURN


async def test_work_that_fails_takes_nobody_elses_turn() -> None:
    turns, failed, done = Turns(), asyncio.Event(), asyncio.Event()
    asyncio.get_running_loop().set_exception_handler(lambda *_: failed.set())
    for _ in range(_PER_TURN):
        assert turns.take(print)
    assert not turns.take(lambda: [].pop())
    assert not turns.take(done.set)
    async with asyncio.timeout(5):
        await failed.wait()
        await done.wait()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Counter[int]]:
    """How often a connection's data, and its end, had their turn in each turn of the loop."""
    counts: dict[str, Counter[int]] = {"take_data": Counter(), "end_connection": Counter()}
    turn = 0

    def count_turns(loop: asyncio.AbstractEventLoop) -> None:
        nonlocal turn
        turn += 1
        loop.call_soon(count_turns, loop)

    def count(name: str) -> None:
        true = getattr(HttpConnection, name)

        def counting(self: HttpConnection, argument: Any) -> None:
            if not turn:
                count_turns(self.loop)
            counts[name][turn] += 1
            true(self, argument)

        monkeypatch.setattr(HttpConnection, name, counting)

    count("take_data")
    count("end_connection")
    return counts


async def test_peers_that_ask_or_leave_in_the_same_instant_have_their_turn_a_few_at_a_time(
    tmp_path: Path, sample_prices: Path, counted: dict[str, Counter[int]]
) -> None:
    async with serve(tmp_path, sample_prices) as serving, contextlib.AsyncExitStack() as stack:
        await add_scan(serving.service.log, "s_a", QUEUED, STARTED)
        peers = [await stack.enter_async_context(meet(serving.url)) for _ in range(200)]
        await serving.http.get("/healthz")  # all are accepted
        # Two requests each, the second of them in two pieces: what waits for its turn goes on where it was.
        head = f"GET /healthz HTTP/1.1\r\nHost: {peers[0].host}\r\n\r\nGET /v1/scans/s_a/events HT"
        for peer in peers:
            assert peer._socket.send(head.encode()) == len(head)
        await asyncio.sleep(0)
        for peer in peers:
            peer._socket.send(f"TP/1.1\r\nHost: {peer.host}\r\n{SSE}\r\n\r\n".encode())
        for peer in peers:
            assert (await peer.read_answer())[0].split()[1] == b"200"
            assert (await peer.read_head())[0].split()[1] == b"200"
            await peer.read_until(b'"started"')
        for peer in peers:
            peer.reset()
        await until(lambda: not any(count_held(serving)))
    for name, counts in counted.items():
        assert counts.total() >= len(peers), name
        assert max(counts.values()) <= 2 * _PER_TURN, name  # a turn of the server may fall into two of ours


async def test_what_comes_though_nothing_should_be_read_keeps_its_place(
    tmp_path: Path, sample_prices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[HttpConnection] = []
    monkeypatch.setattr(HttpConnection, "expect_close", lambda self: met.append(self))
    async with serve(tmp_path, sample_prices) as serving, meet(serving.url) as peer:
        await add_scan(serving.service.log, "s_a", QUEUED, ended(State.CANCELLED))
        await peer.ask("/v1/scans/s_a/events", SSE)
        await peer.read_answer()
        (connection,) = met
        while connection._bounds.turns.take(lambda: None):
            pass
        request = f"GET /healthz HTTP/1.1\r\nHost: {peer.host}\r\n\r\n".encode()
        connection.data_received(request[:5])
        connection.data_received(request[5:])
        await peer.ask("/readyz")
        for ready in (b'{"status":"ok"}', b'"ready"'):
            assert ready in (await peer.read_answer())[2]


async def test_a_request_whose_peer_is_gone_before_its_turn_leaves_nothing(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices) as serving, contextlib.AsyncExitStack() as stack:
        await add_scan(serving.service.log, "s_a", QUEUED, STARTED)
        peers = [await stack.enter_async_context(meet(serving.url)) for _ in range(200)]
        request = f"GET /v1/scans/s_a/events HTTP/1.1\r\nHost: {peers[0].host}\r\n{SSE}\r\n\r\n".encode()
        await serving.http.get("/healthz")  # all are accepted
        for peer in peers:
            peer._socket.send(request)
        for peer in peers[::2]:
            peer.reset()
        for peer in peers[1::2]:
            await peer.read_head()
            events = await peer.read_until(b'"started"') + await peer.read_until(b"\n\n")
            assert [event["seq"] for event in durable(parse_events(events))] == [1, 2]
        await until(lambda: sum(serving.service.hub.statistics().subscribers.values()) == 100)
        for peer in peers[1::2]:
            peer._socket.shutdown(socket.SHUT_WR)
        await until(lambda: not any(count_held(serving)))


async def test_who_posts_and_leaves_at_once_is_heard_all_the_same(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices) as serving, contextlib.AsyncExitStack() as stack:
        asked = {"scanner": "external", "params": {"title": "Work", "total": 10, "unit": "steps"}}
        scan = (await serving.http.post("/v1/scans", json=asked)).json()
        peers = [await stack.enter_async_context(meet(serving.url)) for _ in range(200)]
        await serving.http.get("/healthz")  # all are accepted
        for place, peer in enumerate(peers):
            body = json.dumps({"type": "matches", "rows": [{"place": place}]})
            head = f"POST {scan['links']['events']} HTTP/1.1\r\nHost: {peer.host}\r\nContent-Type: application/json\r\n"
            head += f"Authorization: Bearer {scan['producer_token']}\r\nContent-Length: {len(body)}\r\n\r\n"
            peer._socket.send((head + body).encode())
            peer._socket.close()
        await until(lambda: serving.service.log.get(scan["id"]).matches == len(peers))


async def test_nothing_is_written_to_a_peer_that_is_gone_and_waits_for_its_turn(
    tmp_path: Path, sample_prices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[Callable[[], None]] = []
    async with serve(tmp_path, sample_prices) as serving, meet(serving.url) as peer:
        await add_scan(serving.service.log, "s_a", QUEUED, STARTED)
        await peer.ask("/v1/scans/s_a/events", SSE)
        await peer.read_until(b'"started"')
        (subscriber,) = serving.service.hub._subscribers
        connection = subscriber.wire  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:
            patch.setattr(Turns, "take", lambda self, work: waiting.append(work))
            peer.reset()
            await until(lambda: waiting)
            assert connection.cycle.disconnected  # else uvicorn writes to a closed transport, which is an error
        for work in waiting:
            work()
        await until(lambda: not any(count_held(serving)))
