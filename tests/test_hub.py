"""Rules of pushing: frames are made once, everyone gets the same bytes, and whoever joins whenever misses nothing."""

import asyncio
import json
import time
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from app.core.event import Cursor, Event
from app.core.scan import Progress, State
from app.log import eventlog as eventlog_module
from app.log.eventlog import EventLog
from app.push import channel as channel_module
from app.push import hub as hub_module
from app.push import reader as reader_module
from app.push.hub import Hub
from app.push.subscriber import Pusher
from tests.conftest import until
from tests.fakes import EPOCH, PLAIN, FakeWire, TurnedThreads, make_log
from tests.test_log import open_log
from tests.test_push import add_scan
from tests.test_scan import QUEUED, STARTED, ended, found, make_scan


def push(hub: Hub, *scans: str, framing: Any = PLAIN) -> FakeWire:
    wire = FakeWire()
    subscriber = hub.push(wire, framing, ends=True)
    for name in scans:
        hub.subscribe(subscriber, name, None)
    subscriber.wake()
    return wire


def decode(wire: FakeWire) -> list[dict[str, Any]]:
    return [json.loads(line) for line in b"".join(wire.written).split(b"\n") if line]


async def test_an_event_is_framed_once_for_each_framing_however_many_get_it(tmp_path: Path) -> None:
    framed: dict[str, list[Event]] = {"one": [], "two": []}

    def make(name: str) -> Any:
        def frame(event: Event) -> bytes:
            framed[name].append(event)
            return event.json + b"\n"

        return replace(PLAIN, name=name, frame=frame)

    async with open_log(tmp_path) as log:
        await add_scan(log, "s_a", QUEUED)
        hub = Hub(log)
        wires = [push(hub, "s_a", framing=framing) for framing in (make("one"), make("two")) for _ in range(50)]
        for events in framed.values():
            events.clear()
        for part in (STARTED, found(2), ended(State.COMPLETED)):
            await log.append("s_a", part)
        await until(lambda: all(wire.is_finished for wire in wires))
        assert {name: [event.seq for event in events] for name, events in framed.items()} == {
            "one": [2, 3, 4],
            "two": [2, 3, 4],
        }
        assert len({b"".join(wire.written) for wire in wires}) == 1


async def test_a_burst_of_progress_is_few_frames_and_its_last_value_comes(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        await add_scan(log, "s_a", QUEUED, STARTED)
        wire = push(Hub(log), "s_a")
        before = len(wire.written)
        for done in range(1, 1001):
            log.publish("s_a", Progress(done=done, total=1000, unit="symbols"))
        await until(lambda: decode(wire)[-1].get("data", {}).get("done") == 1000)
        assert len(wire.written) - before <= 2


async def test_matches_do_not_wait_for_the_next_progress_that_may_be_shown(tmp_path: Path) -> None:
    log = make_log()
    await log.open()
    log._progress_every_s = 3600.0
    log.create(make_scan("s_a"))
    await log.append("s_a", QUEUED, STARTED)
    wire = push(Hub(log), "s_a")
    for done in range(1, 100):
        log.publish("s_a", Progress(done=done, total=100, unit="symbols"))
    await log.append("s_a", found(3))
    await until(lambda: decode(wire)[-1]["type"] == "matches")
    assert [event["seq"] for event in decode(wire) if event["type"] != "progress"] == [1, 2, 3]
    await log.close()


async def test_each_subscriber_has_a_heartbeat_in_each_round_and_none_while_it_is_behind(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        await add_scan(log, "s_a", QUEUED)
        hub = Hub(log)
        wires = [push(hub, "s_a") for _ in range(40)]
        behind = push(hub, "s_a")
        behind.block()
        beating = asyncio.create_task(hub.beat(0.016))
        await until(lambda: min(wire.heartbeats for wire in wires) >= 3)
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)
        assert max(wire.heartbeats for wire in wires) <= 4
        assert behind.heartbeats == 0


async def test_what_was_pushed_stays_counted_when_a_subscriber_leaves_its_block(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        await add_scan(log, "s_a", QUEUED, STARTED)
        hub = Hub(log)
        wire = FakeWire()
        with hub.push(wire, PLAIN, ends=False) as subscriber:
            hub.subscribe(subscriber, "s_a", None)
            subscriber.wake()
            await until(lambda: subscriber.block is not None)
            await log.append("s_a", found(1))
            await until(lambda: len(decode(wire)) == 3)
            assert subscriber.block is not None
            assert hub.statistics().pushed == {"plain": 3}
        assert hub.statistics().pushed == {"plain": 3}


class Segment:
    """What one subscription of one wire has to get: everything of one scan behind `after`."""

    def __init__(self, scan: str, after: int, place: int, is_behind_trim: bool) -> None:
        self.scan = scan
        self.after = after
        self.place = place  # how many bytes had been written when it began
        self.stop: int | None = None  # and when it ended
        self.is_behind_trim = is_behind_trim


class Peer:
    def __init__(self, wire: FakeWire, subscriber: Pusher, ends: bool) -> None:
        self.wire = wire
        self.subscriber = subscriber
        self.ends = ends
        self.segments: list[Segment] = []
        self.has_joined_later = False

    @property
    def size(self) -> int:
        return sum(map(len, self.wire.written))


SCANS = ("s_a", "s_b", "s_c")


class Pushing(RuleBasedStateMachine):
    """Everything that can happen between two turns of the loop; the oracle is a list of what was appended."""

    peers: Bundle[Peer] = Bundle("peers")

    @initialize(memory_bytes=st.sampled_from([0, 2**20]), page=st.sampled_from([200, 600, 2**18]))
    def start(self, memory_bytes: int, page: int) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(eventlog_module, "to_thread", TurnedThreads)
        self.patch.setattr(reader_module, "READ_BYTES", page)
        self.patch.setattr(channel_module, "BLOCK", 2)
        self.patch.setattr(hub_module, "FEW_WRITES", 1)
        self.patch.setattr(hub_module, "TURN_S", -1.0)  # each turn of the loop writes to one block, or a few readers
        self.loop = asyncio.new_event_loop()
        self.log: EventLog = make_log(memory_bytes)
        self.oracle: list[tuple[int, str, int, str]] = []  # n, scan, seq, type
        self.ended: set[str] = set()
        self.trimmed: set[str] = set()
        self.done = dict.fromkeys(SCANS, 0)
        self.everyone: list[Peer] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.run(self.log.open())
        self.hub = self.run(self.make_hub())
        for name in SCANS:
            self.call(self.log.create, make_scan(name))
            self.append_part(name, QUEUED)
            self.append_part(name, STARTED)
            for _ in range(8):  # with small pages, whoever joins is behind for some turns
                self.append_part(name, found(1))
        self.turn(3)

    async def make_hub(self) -> Hub:
        return Hub(self.log, batch_max_ms=0)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def call(self, function: Any, *args: Any) -> Any:
        async def work() -> Any:
            return function(*args)

        return self.run(work())

    def append_part(self, name: str, part: Any) -> None:
        self.tasks.append(self.loop.create_task(self.log.append(name, part)))
        seq = sum(entry[1] == name for entry in self.oracle) + 1
        self.oracle.append((len(self.oracle) + 1, name, seq, str(part[0])))

    @rule(turns=st.integers(1, 6))
    def turn(self, turns: int) -> None:
        async def work() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        self.run(work())

    @rule(name=st.sampled_from(SCANS), count=st.integers(1, 3))
    def append(self, name: str, count: int) -> None:
        if name not in self.ended:
            for _ in range(count):
                self.append_part(name, found(1))
            self.turn(1)

    @rule(name=st.sampled_from(SCANS))
    def publish(self, name: str) -> None:
        self.done[name] += 1
        self.call(self.log.publish, name, Progress(done=self.done[name], total=10**6, unit="symbols"))

    @rule(name=st.sampled_from(SCANS))
    def end(self, name: str) -> None:
        if name not in self.ended:
            self.ended.add(name)
            self.append_part(name, ended(State.COMPLETED))
            self.turn(1)

    @precondition(lambda self: self.ended - self.trimmed)
    @rule(pick=st.integers(0, 2))
    def trim(self, pick: int) -> None:
        name = sorted(self.ended - self.trimmed)[pick % len(self.ended - self.trimmed)]
        self.run(asyncio.wait(self.tasks))  # what is trimmed has ended for everyone to see; others may be reading it
        self.trimmed.add(name)
        self.tasks.append(self.loop.create_task(self.log.trim(name)))
        self.turn(1)

    @rule(
        target=peers,
        names=st.sets(st.sampled_from(SCANS), min_size=1),
        ends=st.booleans(),
        share=st.none() | st.floats(0, 1),
        is_blocked=st.booleans(),
    )
    def connect(self, names: set[str], ends: bool, share: float | None, is_blocked: bool) -> Peer:
        wire = FakeWire()
        wire.is_blocked = is_blocked
        peer = Peer(wire, self.call(lambda: self.hub.push(wire, PLAIN, ends=ends)), ends)
        self.everyone.append(peer)

        def subscribe() -> None:
            for name in sorted(names):
                self.subscribe(peer, name, share)
            peer.subscriber.wake()

        self.call(subscribe)
        return peer

    def subscribe(self, peer: Peer, name: str, share: float | None) -> None:
        self.close_segment(peer, name)
        after = 0 if share is None else int(share * self.log.shown_n)
        cursor = None if share is None else Cursor(EPOCH, after)
        scan = self.log.get(name)
        peer.segments.append(Segment(name, after, peer.size, scan.is_trimmed and (cursor is None or after < scan.n)))
        self.hub.subscribe(peer.subscriber, name, cursor)

    @rule(peer=peers, name=st.sampled_from(SCANS), share=st.none() | st.floats(0, 1))
    def subscribe_more(self, peer: Peer, name: str, share: float | None) -> None:
        """As a WebSocket does; a scan that is watched already starts anew from the cursor."""

        def subscribe() -> None:
            peer.has_joined_later = True
            self.subscribe(peer, name, share)
            peer.subscriber.wake()

        if not peer.ends:
            self.call(subscribe)

    @rule(peer=peers, name=st.sampled_from(SCANS))
    def unsubscribe(self, peer: Peer, name: str) -> None:
        def unsubscribe() -> None:
            self.close_segment(peer, name)
            self.hub.unsubscribe(peer.subscriber, name)

        if not peer.ends:
            self.call(unsubscribe)

    def close_segment(self, peer: Peer, name: str) -> None:
        for segment in peer.segments:
            if segment.scan == name and segment.stop is None:
                segment.stop = peer.size

    @rule(peer=peers)
    def block(self, peer: Peer) -> None:
        self.call(peer.wire.block)

    @rule(peer=peers)
    def block_with_the_next_write(self, peer: Peer) -> None:
        peer.wire.blocks_next = True

    @rule(peer=peers)
    def unblock(self, peer: Peer) -> None:
        self.call(peer.wire.unblock)

    @rule(peer=consumes(peers))
    def disconnect(self, peer: Peer) -> None:
        def leave() -> None:
            for name in SCANS:
                self.close_segment(peer, name)
            peer.subscriber.__exit__()

        self.call(leave)

    def settle(self) -> None:
        """Lets the loop turn until nothing moves any more."""

        async def work() -> None:
            still, before = 0, -1
            while still < 30:
                await asyncio.sleep(0)
                now = sum(len(peer.wire.written) for peer in self.everyone)
                still = still + 1 if now == before and all(task.done() for task in self.tasks) else 0
                before = now

        self.run(work())

    def check(self, peer: Peer, is_settled: bool) -> None:
        body = b"".join(peer.wire.written)
        for segment in peer.segments:
            lines = body[segment.place : segment.stop].split(b"\n")
            events = [event for line in lines if line and (event := json.loads(line))["scan"] == segment.scan]
            self.check_segment(segment, events, is_settled and segment.stop is None and not peer.wire.is_blocked)
        if not peer.has_joined_later and len({segment.scan for segment in peer.segments}) > 1 and not self.trimmed:
            given = [int(json.loads(line)["id"][5:]) for line in body.split(b"\n") if b'"id"' in line]
            assert given == sorted(set(given))

    def check_segment(self, segment: Segment, events: list[dict[str, Any]], is_whole: bool) -> None:
        wanted = [entry for entry in self.oracle if entry[1] == segment.scan and entry[0] > segment.after]
        resets = [place for place, event in enumerate(events) if event["type"] == "reset"]
        assert len(resets) <= 1
        if resets:
            assert segment.scan in self.trimmed
            assert events[resets[0]]["data"]["reason"] == "trimmed"
            kept = [event["type"] for event in events[resets[0] + 1 :]]
            assert kept == ["end"] or (kept == [] and not is_whole)
            events = events[: resets[0]]
        given = [(event["seq"], event["type"]) for event in events if "id" in event]
        assert given == [entry[2:] for entry in wanted][: len(given)]
        if segment.is_behind_trim:
            assert given == []
        if is_whole and not resets:
            assert not segment.is_behind_trim
            assert len(given) == len(wanted)
        done, seq = 0, 0
        for event in events:
            if event["type"] == "progress":
                assert event["data"]["done"] > done, "progress ran backwards, or came twice"
                assert seq == 0 or event["seq"] <= seq, "progress came before its seq"
                done = event["data"]["done"]
            else:
                seq = event["seq"]
        assert "end" not in [event["type"] for event in events[:-1]]

    @invariant()
    def nothing_is_wrong_on_the_way(self) -> None:
        for peer in getattr(self, "everyone", ()):
            self.check(peer, is_settled=False)

    def teardown(self) -> None:
        if not hasattr(self, "everyone"):
            return
        try:
            for peer in self.everyone:
                self.call(peer.wire.unblock)
            self.settle()
            for peer in self.everyone:
                self.check(peer, is_settled=True)
                if peer.ends and not peer.wire.is_blocked and all(one.stop is None for one in peer.segments):
                    assert peer.wire.is_finished is {one.scan for one in peer.segments}.issubset(self.ended)
            for peer in self.everyone:
                self.call(peer.subscriber.__exit__)
            assert self.hub.statistics()[::2] == ({}, 0)
            self.run(self.log.close())
            for task in self.tasks:
                task.result()
        finally:
            self.loop.close()
            self.patch.undo()


Pushing.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPushing = Pushing.TestCase


async def test_behind_a_farewell_nothing_is_written(tmp_path: Path) -> None:
    """A transport that is closing takes more, and sends it behind what was to be the last."""
    async with open_log(tmp_path) as log:
        hub = Hub(log)
        await add_scan(log, "s_a", QUEUED, STARTED)
        leaving, staying = push(hub, "s_a"), push(hub, "s_a")
        await until(lambda: [len(block.members) for block in hub._channels["s_a"].blocks] == [2])
        leaving.is_closed = True
        before = len(leaving.written)
        await log.append("s_a", found(1))
        await until(lambda: decode(staying)[-1]["type"] == "matches")
        assert len(leaving.written) == before


async def test_flushes_keep_their_pace(tmp_path: Path) -> None:
    """What a flush took is noted, the making of frames and the writes alike, and the next one waits as it is told."""
    took: list[float] = []
    waits = iter([0.0, 3600.0])

    class FakePace:
        def note(self, took_s: float, now: float) -> None:
            took.append(took_s)

        def wait_s(self, now: float) -> float:
            return next(waits)

    def burn(event: Event) -> bytes:
        until_s = time.thread_time() + 0.01
        while time.thread_time() < until_s:
            pass
        return event.json + b"\n"

    async with open_log(tmp_path) as log:
        hub = Hub(log)
        hub._pace = FakePace()  # type: ignore[assignment]
        await add_scan(log, "s_a", QUEUED, STARTED)
        wire = push(hub, "s_a", framing=replace(PLAIN, frame=burn))
        await until(lambda: any(channel.blocks for channel in hub._channels.values()))
        await log.append("s_a", found(1))
        await until(lambda: bool(took))
        assert decode(wire)[-1]["type"] == "matches"
        assert took[0] >= 0.01
        await log.append("s_a", found(1))
        for _ in range(20):
            await asyncio.sleep(0)
        assert [event["type"] for event in decode(wire)].count("matches") == 1
