"""Rules of subscribers: each durable event once, in order, from any cursor; progress folded; reset in band."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.errors import UnknownScan
from app.core.event import Cursor, Event, EventType, make_event
from app.core.scan import Progress, State
from app.log.eventlog import EventLog
from app.push import reader as reader_module
from app.push.frames import frame_ndjson, frame_sse
from app.push.hub import Hub
from tests.conftest import until
from tests.test_log import open_log
from tests.test_scan import QUEUED, STARTED, ended, found, make_scan

WHOLE = (QUEUED, STARTED, found(1), found(2), ended(State.COMPLETED))


async def add_scan(log: EventLog, name: str, *parts: Any) -> None:
    log.create(make_scan(name))
    for part in parts:
        await log.append(name, part)


async def collect(hub: Hub, *scans: str, cursor: Cursor | None = None) -> list[Event]:
    with hub.pull("test") as subscriber:
        for name in scans:
            hub.subscribe(subscriber, name, cursor)
        return [event async for batch in subscriber.batches() for event in batch]


async def test_a_late_comer_gets_everything_and_then_the_stream_ends(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        await add_scan(log, "s_a", *WHOLE)
        events = await collect(Hub(log), "s_a")
    assert [event.seq for event in events] == [1, 2, 3, 4, 5]
    assert events[-1].type is EventType.END


async def test_from_every_cursor_the_rest_comes_once(tmp_path: Path) -> None:
    async with open_log(tmp_path, memory_bytes=0) as log:
        await add_scan(log, "s_a", *WHOLE)
        hub = Hub(log)
        whole = await collect(hub, "s_a")
        for place, event in enumerate(whole, 1):
            assert event.n > 0
            rest = await collect(hub, "s_a", cursor=Cursor(log.epoch, event.n))
            assert [one.json for one in rest] == [one.json for one in whole[place:]]


async def test_events_of_several_scans_come_in_the_order_of_n(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        await add_scan(log, "s_a", QUEUED)
        await add_scan(log, "s_b", QUEUED)
        hub = Hub(log)
        reading = asyncio.create_task(collect(hub, "s_a", "s_b"))
        for part in WHOLE[1:]:
            for name in ("s_b", "s_a"):
                await log.append(name, part)
        events = await reading
    assert [event.n for event in events] == list(range(1, 11))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(["s_a", "s_b", "s_c"]), max_size=25),
    st.sampled_from([0, 2**20]),
    st.integers(60, 2000),
)
def test_small_pages_neither_lose_nor_reorder_across_scans(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str], memory_bytes: int, page: int
) -> None:
    async def run() -> None:
        async with open_log(tmp_path_factory.mktemp("log"), memory_bytes=memory_bytes) as log:
            for name in ("s_a", "s_b", "s_c"):
                await add_scan(log, name, QUEUED, STARTED)
            for name in steps:
                await log.append(name, found(1))
            await log.append("s_a", ended(State.COMPLETED))  # this one is read from the journal
            for name in ("s_b", "s_c"):
                await log.append(name, ended(State.COMPLETED))
            events = await collect(Hub(log), "s_c", "s_a", "s_b")
            assert [event.n for event in events] == list(range(1, 10 + len(steps)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_module, "READ_BYTES", page)
        asyncio.run(run())


async def test_progress_is_folded_to_the_latest_and_comes_after_its_seq(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        await add_scan(log, "s_a", QUEUED, STARTED)
        subscriber = Hub(log).pull("test")
        subscriber.watch("s_a", None)
        for done in range(1, 50):
            log.publish("s_a", Progress(done=done, total=50, unit="symbols"))
        batch = await subscriber.read()
        assert [event.type for event in batch] == [EventType.QUEUED, EventType.STARTED, EventType.PROGRESS]
        assert batch[-1].load_data()["done"] == 1
        assert await subscriber.read() == []
        await until(lambda: log.get_progress_event("s_a") is not batch[-1])
        (last,) = await subscriber.read()
        assert last.load_data()["done"] == 49


@pytest.mark.parametrize(
    ("make_cursor", "reason"),
    [(lambda log: Cursor("0000", 1), "epoch"), (lambda log: Cursor(log.epoch, 99), "unknown")],
)
async def test_a_cursor_that_does_not_fit_is_told_so_in_band_and_everything_kept_follows(
    tmp_path: Path, make_cursor: Any, reason: str
) -> None:
    async with open_log(tmp_path) as log:
        await add_scan(log, "s_a", *WHOLE)
        events = await collect(Hub(log), "s_a", cursor=make_cursor(log))
    data = events[0].load_data()
    assert (events[0].type, events[0].id, data["reason"]) == (EventType.RESET, None, reason)
    assert data["snapshot"]["matches"] == 3
    assert [event.seq for event in events[1:]] == [1, 2, 3, 4, 5]


async def test_a_cursor_from_before_what_is_kept_is_told_so(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        await add_scan(log, "s_a", *WHOLE)
        await log.trim("s_a")
        for cursor in (None, Cursor(log.epoch, 2)):
            events = await collect(Hub(log), "s_a", cursor=cursor)
            assert [event.type for event in events] == [EventType.RESET, EventType.END]
            assert events[0].load_data()["reason"] == "trimmed"
        assert await collect(Hub(log), "s_a", cursor=Cursor(log.epoch, 5)) == []


async def test_a_reader_that_retention_overtakes_is_told_so_and_gets_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, what was trimmed while it was read just did not come."""
    monkeypatch.setattr(reader_module, "READ_BYTES", 100)
    async with open_log(tmp_path) as log:
        await add_scan(log, "s_a", *WHOLE)
        with Hub(log).pull("test") as subscriber:
            subscriber.watch("s_a", None)
            first = await subscriber.read()
            assert [event.seq for event in first] == [1]
            await log.trim("s_a")
            rest = [event async for batch in subscriber.batches() for event in batch]
    assert [event.type for event in rest] == [EventType.RESET, EventType.END]
    assert rest[0].load_data()["reason"] == "trimmed"


async def test_reading_many_finished_scans_reads_the_journal_about_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each round read a page of every scan and gave one page in all; the rest was read again in the next round."""
    monkeypatch.setattr(reader_module, "READ_BYTES", 10_000)
    names = [f"s_{number}" for number in range(20)]
    async with open_log(tmp_path, memory_bytes=0) as log:
        for name in names:  # one after the other, as most are; the pages of the later ones wait for their turn
            await add_scan(log, name, QUEUED, STARTED, *[found(10)] * 10, ended(State.COMPLETED))
        read = log._journal.read
        taken: list[Event] = []

        def count(scan: str, after: int, max_bytes: int) -> list[Event]:
            page = read(scan, after, max_bytes)
            taken.extend(page)
            return page

        monkeypatch.setattr(log._journal, "read", count)
        events = await collect(Hub(log), *names)
    assert [event.n for event in events] == list(range(1, 13 * 20 + 1))
    assert len(taken) <= 2 * len(events)


async def test_a_scan_that_is_reaped_while_it_is_watched_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        await add_scan(log, "s_a", QUEUED, ended(State.LOST))
        await add_scan(log, "s_b", QUEUED)
        hub = Hub(log)
        with hub.pull("test") as subscriber:
            for name in ("s_a", "s_b"):
                hub.subscribe(subscriber, name, None)
            assert len(await subscriber.read()) == 3
            await log.remove("s_a")
            (reset,) = await subscriber.read()
            assert (reset.type, reset.scan, reset.load_data()["snapshot"]) == (EventType.RESET, "s_a", None)
            await log.append("s_b", ended(State.LOST))
            assert [event.scan for batch in [await subscriber.read()] for event in batch] == ["s_b"]
            assert subscriber.is_done
        assert hub.statistics().channels == 0


async def test_an_unknown_scan_cannot_be_watched(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        hub = Hub(log)
        with hub.pull("test") as subscriber, pytest.raises(UnknownScan):
            hub.subscribe(subscriber, "s_none", None)
        assert hub.statistics() == ({}, {"test": 0}, 0, 0)


async def test_leaving_takes_a_subscriber_out_of_every_channel(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        await add_scan(log, "s_a", QUEUED)
        hub = Hub(log)
        reading = asyncio.create_task(collect(hub, "s_a"))
        await until(lambda: hub.statistics().channels)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert (hub.statistics().subscribers, hub.statistics().channels) == ({}, 0)


async def test_however_much_is_appended_in_one_turn_there_is_one_flush(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        await add_scan(log, "s_a", QUEUED, STARTED)
        hub = Hub(log)
        with hub.pull("test") as subscriber:
            hub.subscribe(subscriber, "s_a", None)
            for done in range(100):
                log.publish("s_a", Progress(done=done, total=100, unit="symbols"))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert hub.statistics().flushes == 1


async def test_at_a_drain_every_subscriber_hears_bye_and_then_the_stream_ends(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        await add_scan(log, "s_a", QUEUED)
        hub = Hub(log)
        reading = [asyncio.create_task(collect(hub, "s_a")) for _ in range(3)]
        await until(lambda: sum(hub.statistics().subscribers.values()) == 3)
        hub.parting.say_at_once(500)
        byes = [events[-1] for events in await asyncio.gather(*reading)] + [(await collect(hub, "s_a"))[-1]]
    assert {event.type for event in byes} == {EventType.BYE}
    assert all(0 <= event.load_data()["reconnect_ms"] <= 500 for event in byes)


async def test_silence_is_filled_with_heartbeats(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        await add_scan(log, "s_a", QUEUED)
        subscriber = Hub(log).pull("test")
        subscriber.watch("s_a", None)
        batches = subscriber.batches(heartbeat_s=0.001)
        assert len(await anext(batches)) == 1
        assert await anext(batches) == []
        await batches.aclose()


def test_an_event_source_that_knows_nothing_of_bye_comes_back_when_it_says_all_the_same() -> None:
    bye = make_event(EventType.BYE, "", 0, {"reconnect_ms": 1234}, 5)
    assert b"retry: 1234" in frame_sse(bye).split(b"\n")
    assert b"retry" not in frame_sse(make_event(EventType.END, "s_a", 1, {}, 5))


@given(st.text(max_size=200), st.sampled_from(EventType), st.booleans())
def test_every_frame_carries_the_same_json(text: str, type_: EventType, is_durable: bool) -> None:
    event = make_event(type_, "s_a", 1, {"text": text}, 5, Cursor("abcd", 7) if is_durable else None)
    lines = frame_sse(event).split(b"\n")
    assert lines[0] == b"event: " + type_.encode()
    assert (lines[1] == b"id: abcd-7") is is_durable
    assert [line for line in lines if line.startswith(b"data: ")] == [b"data: " + event.json]
    assert lines[-2:] == [b"", b""]
    assert frame_ndjson(event) == event.json + b"\n"
    assert json.loads(event.json)["data"] == {"text": text}
