"""Stand-ins that do what the test says and when: a journal without threads, and a wire without a peer."""

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

from app.core.event import Event, EventType
from app.log.eventlog import EventLog
from app.log.journal import Checkpoint, Kept, Write
from app.push.frames import Framing

EPOCH = "fake"


class MemoryJournal:
    """Commits at once, one write at a time."""

    def __init__(self) -> None:
        self.fault: str | None = None
        self._events: dict[str, list[Event]] = {}

    def open(self, committed: Callable[[Sequence[Write]], None]) -> Kept:
        self._committed = committed
        return Kept(EPOCH, 0, [])

    def submit(self, writes: Sequence[Write]) -> None:
        for write in writes:
            events = self._events.setdefault(write.scan.id, [])
            if write.forgets == "events":
                events[:] = [event for event in events if event.type is EventType.END]
            events += write.events
            self._committed([write])

    def read(self, scan: str, after: int, max_bytes: int) -> list[Event]:
        events = self._events[scan]
        page: list[Event] = []
        for event in events[bisect_right(events, after, key=lambda event: event.n) :]:
            if page and sum(len(one.json) for one in page) + len(event.json) > max_bytes:
                break
            page.append(event)
        return page

    def read_checkpoints(self, scan: str) -> list[Checkpoint]:
        return []

    def close(self) -> Sequence[Write]:
        return ()


class TurnedThreads:
    """In place of `anyio.to_thread`: the work is done on the event loop, a turn later, so that runs can be repeated."""

    @staticmethod
    async def run_sync(function: Callable[..., Any], *args: Any) -> Any:
        await asyncio.sleep(0)
        result = function(*args)
        # A real thread's result comes through the loop as well, behind whatever was committed before it was read.
        await asyncio.sleep(0)
        return result


class FakeWire:
    """Keeps what is written; is behind when the test says so, at once or with the next write."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.is_ready = False
        self.is_blocked = False
        self.blocks_next = False
        self.is_finished = False
        self.is_closed = False
        self.heartbeats = 0
        self.transport: Any = self
        self._turned: Callable[[], None] | None = None

    def open(self, turned: Callable[[], None]) -> None:
        self._turned, self.is_ready = turned, not self.is_blocked

    def get_extra_info(self, name: str) -> None:
        return None  # it has no socket

    def is_closing(self) -> bool:
        return self.is_finished or self.is_closed

    def write(self, data: bytes) -> None:
        assert self.is_ready
        self.written.append(data)
        if self.blocks_next:
            self.block()

    def beat(self, heartbeat: bytes) -> None:
        self.heartbeats += 1

    def finish(self) -> None:
        turned, self._turned = self._turned, None
        self.is_ready, self.is_finished = False, True
        if turned is not None:
            turned()

    def abort(self) -> None:
        raise AssertionError("aborted")

    def block(self) -> None:
        self.blocks_next, self.is_blocked = False, True
        self._turn()

    def unblock(self) -> None:
        self.is_blocked = False
        self._turn()

    def _turn(self) -> None:
        if self._turned is not None:
            self.is_ready = not self.is_blocked
            self._turned()


def frame_line(event: Event) -> bytes:
    return event.json + b"\n"


PLAIN = Framing("plain", frame_line, bytes, b"")


def make_log(memory_bytes: int = 2**20) -> EventLog:
    return EventLog(MemoryJournal(), now_ms=lambda: 1000, memory_bytes=memory_bytes, progress_per_s=1e9)
