"""The client against a server that does everything a good one never does."""

import asyncio
import json
from contextlib import aclosing
from typing import Any

import pytest

from app.client import BrokenStream, Client, RemoteScan, RequestRefused, ResultLost, Unreachable
from app.follow import NDJSON, POLL, SSE
from tests.scripted import (
    SCAN,
    Answer,
    ScriptedServer,
    encode,
    hang_up,
    make_event,
    make_events,
    make_head,
    make_reset,
    make_signal,
    refuse,
    script,
    stay_silent,
    tell,
    tell_all,
)

EVENTS = make_events(4)


class Time:
    """A clock that moves when someone sleeps, and remembers for how long."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


def connect(server: ScriptedServer, time: Time | None = None, **options: Any) -> Client:
    time = time or Time()
    return Client(server.url, clock=time.clock, sleep=time.sleep, random=lambda: 0.5, **options)


async def follow(scan: RemoteScan) -> list[dict[str, Any]]:
    async with asyncio.timeout(20):
        return [json.loads(event.json) async for event in scan]


async def follow_script(*answers: Answer, **options: Any) -> tuple[list[dict[str, Any]], Time, ScriptedServer]:
    time = Time()
    async with script(*answers) as server, connect(server, time, **options) as client:
        return await follow(client.scan(SCAN)), time, server


# Broken connections


@pytest.mark.parametrize("format_", [SSE, NDJSON])
async def test_a_stream_cut_after_any_byte_goes_on_without_loss_or_repetition(format_: str) -> None:
    events = make_events(2)
    async with script() as server, connect(server, formats=(format_,)) as client:
        for place in range(0, len(encode(events, format_)), 5):
            server.answers = [tell(events, cut=place), tell(events)]
            assert await follow(client.scan(SCAN)) == events, f"cut after {place} bytes"


async def test_a_stream_cut_again_and_again_comes_to_its_end() -> None:
    received, _, server = await follow_script(*[tell(EVENTS, cut=300)] * 30)
    assert received == EVENTS
    assert [request.after for request in server.requests] == sorted(request.after for request in server.requests)


async def test_a_broken_connection_does_not_change_the_format() -> None:
    received, _, server = await follow_script(hang_up, tell(EVENTS, cut=100), hang_up, tell(EVENTS))
    assert received == EVENTS
    assert {request.accept for request in server.requests} == {SSE}


async def test_waits_between_failures_double_up_to_a_bound_and_stop_when_patience_is_over() -> None:
    time = Time()
    async with script(*[hang_up] * 40) as server, connect(server, time, patience_s=200) as client:
        with pytest.raises(Unreachable, match="can be reached"):
            await follow(client.scan(SCAN))
    # Full jitter: half of the ceiling, as `random` gives 0.5.
    assert time.waits[:8] == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0]
    assert sum(time.waits) <= 200


async def test_something_new_makes_the_waits_short_again() -> None:
    answers = [hang_up, hang_up, tell(EVENTS, cut=300), tell(EVENTS)]
    received, time, _ = await follow_script(*answers)
    assert received == EVENTS
    assert time.waits == [0.25, 0.5, 0.25]


async def test_a_refused_connection_is_tried_again() -> None:
    time = Time()
    async with script() as server:
        url = server.url
    async with Client(url, clock=time.clock, sleep=time.sleep, patience_s=5) as client:
        with pytest.raises(Unreachable):
            await follow(client.scan(SCAN))
    assert len(time.waits) > 2


async def test_a_silent_stream_is_left_after_three_heartbeats() -> None:
    answers = [stay_silent(make_head(SSE) + b": ok\n\n"), tell(EVENTS)]
    received, _, server = await follow_script(*answers, heartbeat_s=0.03)
    assert received == EVENTS
    assert len(server.requests) == 2


async def test_the_end_is_the_end() -> None:
    """Nothing is asked again, though the connection breaks right behind the end and the server had more to say."""
    received, time, server = await follow_script(tell_all([*EVENTS, make_event(99, "started", {})]), tell(EVENTS))
    assert received == EVENTS
    assert (len(server.requests), time.waits) == (1, [])


async def test_no_content_means_that_all_was_given() -> None:
    async with script(refuse("204 No Content")) as server, connect(server) as client:
        async with aclosing(client.watch([SCAN], after="test-7")) as events:
            assert [event async for event in events] == []
        assert server.requests[0].after == 7


async def test_what_is_no_event_is_read_again_from_the_last_good_cursor() -> None:
    received, _, server = await follow_script(
        tell_all([*EVENTS[:3], {"type": "matches"}]), tell(EVENTS, before=b"data: nonsense\n\n"), tell(EVENTS)
    )
    assert received == EVENTS
    assert [request.after for request in server.requests] == [0, 3, 3]


async def test_an_endless_frame_is_refused() -> None:
    async def pour(request: object, writer: asyncio.StreamWriter) -> None:
        writer.write(make_head(SSE))
        while not writer.transport.is_closing():
            writer.write(b"data: " + b"x" * 4000 + b"\n")
            await writer.drain()

    async with script(*[pour] * 20) as server, connect(server, max_frame_bytes=10_000, patience_s=5) as client:
        with pytest.raises(BrokenStream, match="longer than 10000 bytes"):
            await follow(client.scan(SCAN))


# Order


async def test_repeated_events_are_dropped() -> None:
    twice = [event for event in EVENTS for _ in range(2)]
    received, _, _ = await follow_script(tell_all([*EVENTS[:4], *twice]))
    assert received == EVENTS


async def test_a_gap_is_read_again_from_the_last_good_cursor() -> None:
    received, _, server = await follow_script(tell_all([*EVENTS[:2], *EVENTS[3:]]), tell(EVENTS))
    assert received == EVENTS
    assert [request.after for request in server.requests] == [0, 2]


async def test_a_gap_that_stays_is_an_error_and_not_a_loss() -> None:
    async with script(*[tell([*EVENTS[:2], *EVENTS[3:]])] * 5) as server, connect(server) as client:
        with pytest.raises(BrokenStream, match="leaves out events"):
            await follow(client.scan(SCAN))
        assert len(server.requests) == 3


async def test_after_a_reset_everything_counts_anew() -> None:
    reset = make_reset({"id": SCAN})
    async with script(tell(EVENTS[:4], cut=10_000), tell_all([reset, *EVENTS])) as server, connect(server) as client:
        scan = client.scan(SCAN)
        assert await follow(scan) == [*EVENTS[:4], reset, *EVENTS]
        result = await scan.result()
    assert [row["gap_pct"] for row in result.rows] == [0 / 7, 1 / 7, 2 / 7, 3 / 7]


async def test_a_connection_that_breaks_right_behind_a_reset_starts_from_the_first_event() -> None:
    reset = make_reset({"id": SCAN})
    answers = [tell(EVENTS[:4], cut=10_000), tell_all([reset]), tell(EVENTS)]
    received, _, server = await follow_script(*answers)
    assert received == [*EVENTS[:4], reset, *EVENTS]
    assert [request.after for request in server.requests] == [0, 4, 0]


async def test_a_scan_that_is_gone_ends_the_iteration_and_has_no_result() -> None:
    async with script(*[tell_all([make_reset(None)])] * 2) as server, connect(server) as client:
        scan = client.scan(SCAN)
        assert [event["type"] for event in await follow(scan)] == ["reset"]
        with pytest.raises(ResultLost, match="does not keep"):
            await scan.result()


# Being sent away


@pytest.mark.parametrize(
    ("answer", "floor_s"),
    [
        (tell_all([make_signal("throttled", {"retry_after_s": 7.5})]), 7.5),
        (tell_all([make_signal("bye", {"reconnect_ms": 4200})]), 4.2),
        (refuse("503 Service Unavailable", {"detail": "full", "retry_after_s": 3.25}, "Retry-After: 4"), 3.25),
        (refuse("429 Too Many Requests", {}, "Retry-After: 9"), 9),
        (refuse("502 Bad Gateway"), 0),
        (tell(EVENTS, cut=40, before=b"retry: 6000\n\n"), 6),
    ],
)
async def test_a_wait_that_the_server_asks_for_is_the_least(answer: Answer, floor_s: float) -> None:
    received, time, _ = await follow_script(answer, tell(EVENTS))
    assert received == EVENTS
    assert time.waits == [floor_s + 0.25]


async def test_a_bye_counts_for_more_than_the_wait_that_all_are_asked_for() -> None:
    broken = tell(EVENTS[:4], cut=10_000, before=b"retry: 6000\n\n")
    received, time, _ = await follow_script(broken, tell_all([make_signal("bye", {"reconnect_ms": 700})]), tell(EVENTS))
    assert received == EVENTS
    assert time.waits == [6 + 0.25, 0.7 + 0.5]


async def test_a_date_in_retry_after_is_read() -> None:
    refusal = refuse("503 Service Unavailable", {}, "Retry-After: Wed, 21 Oct 2015 07:28:00 GMT")
    received, time, _ = await follow_script(refusal, tell(EVENTS))
    assert received == EVENTS
    assert time.waits == [0.25]


async def test_a_wait_past_all_patience_raises_what_caused_it() -> None:
    problem = {"detail": "Too many.", "retry_after_s": 4000}
    async with script(refuse("429 Too Many Requests", problem)) as server, connect(server) as client:
        with pytest.raises(RequestRefused, match=r"Too many\.") as caught:
            await follow(client.scan(SCAN))
    assert (caught.value.status, caught.value.retry_after_s) == (429, 4000)


# Formats


@pytest.mark.parametrize(
    "answer",
    [
        stay_silent(),  # a head and no byte: something buffers
        refuse("406 Not Acceptable"),
        refuse("200 OK"),  # of the wrong type
    ],
)
async def test_a_stream_that_cannot_be_had_is_replaced_by_the_next_format(answer: Answer) -> None:
    received, time, server = await follow_script(answer, answer, tell(EVENTS), first_byte_s=0.03)
    assert received == EVENTS
    assert [request.accept for request in server.requests] == [SSE, NDJSON, POLL]
    assert time.waits == []


async def test_a_head_that_is_held_back_is_a_proxy_that_buffers() -> None:
    received, _, server = await follow_script(stay_silent(b"HTTP/1.1"), tell(EVENTS), head_s=0.03)
    assert received == EVENTS
    assert [request.accept for request in server.requests] == [SSE, NDJSON]


async def test_silence_on_a_format_that_worked_is_a_broken_connection() -> None:
    answers = [tell(EVENTS, cut=300), stay_silent(), tell(EVENTS)]
    received, _, server = await follow_script(*answers, first_byte_s=0.03, heartbeat_s=0.03)
    assert received == EVENTS
    assert {request.accept for request in server.requests} == {SSE}


async def test_polls_come_when_the_server_said() -> None:
    answers = [tell(EVENTS[:3]), tell(EVENTS[:3]), tell(EVENTS)]
    received, time, server = await follow_script(*answers, formats=(POLL,))
    assert received == EVENTS
    assert time.waits == [1.5, 1.5]
    assert [request.after for request in server.requests] == [0, 3, 3]
    assert "wait=25" in server.requests[0].head


# Requests


async def test_a_submission_whose_answer_was_lost_is_sent_again_with_the_same_key() -> None:
    async with script(hang_up, refuse("202 Accepted", {"id": SCAN})) as server, connect(server) as client:
        assert (await client.submit("gap-up")).id == SCAN
    keys = [
        line for request in server.requests for line in request.head.splitlines() if "idempotency-key" in line.lower()
    ]
    assert len(keys) == 2
    assert len(set(keys)) == 1


async def test_what_is_no_scanwire_server_is_named() -> None:
    page = make_head("text/html") + b"<h1>It works</h1>"

    async def answer(request: object, writer: asyncio.StreamWriter) -> None:
        writer.write(page)

    async with script(answer) as server, connect(server) as client:
        with pytest.raises(Unreachable, match="not a Scanwire server"):
            await client.scanners()


async def test_a_refusal_without_a_problem_is_told_all_the_same() -> None:
    async with script(refuse("404 Not Found")) as server, connect(server) as client:
        with pytest.raises(RequestRefused, match="404"):
            await client.scan(SCAN).snapshot()


async def test_rows_that_do_not_fit_the_digest_are_an_error() -> None:
    wrong = [*EVENTS[:3], make_event(4, "matches", {"chunk": 1, "rows": [{"symbol": "X"}]}), *EVENTS[4:]]
    async with script(tell(wrong), tell(EVENTS)) as server, connect(server) as client:
        scan = client.scan(SCAN)
        with pytest.raises(ResultLost, match="not the ones"):
            await scan.result()
        assert len((await scan.result()).rows) == 4  # read anew
