"""One consumer of events, whatever it is connected by."""

import asyncio
from collections.abc import AsyncGenerator
from heapq import merge

from app.core.errors import UnknownScan
from app.core.event import Cursor, Event, EventType, make_event
from app.core.snapshot import make_snapshot
from app.log.eventlog import READ_BYTES, EventLog


class _Watch:
    """How far one subscriber has read one scan."""

    __slots__ = ("after", "is_gone", "progress", "resets")

    def __init__(self, after: int, resets: str | None) -> None:
        self.after = after
        self.is_gone = False  # the scan was reaped while it was watched, and this was told
        self.progress: Event | None = None  # the last one given
        self.resets = resets  # why the cursor could not be used; told before anything else


class Subscriber:
    """A cursor per watched scan, and a wake-up. It owns no queue: what it is behind, it reads from the log.

    Durable events come in the order of `n` across all scans, each once. Progress is folded to the latest, and comes
    only when all durable events of its scan have been given.
    """

    def __init__(self, log: EventLog, transport: str) -> None:
        self.transport = transport
        self.since_ms = log.now_ms()
        self.watches: dict[str, _Watch] = {}
        self._log = log
        self._awake = asyncio.Event()
        self._farewell: Event | None = None

    def watch(self, scan_id: str, cursor: Cursor | None) -> None:
        """Starts behind `cursor`; from the first event without one. Raises UnknownScan.

        A cursor that does not fit the log is answered in band with `reset`, and everything that is kept follows.
        """
        scan = self._log.get(scan_id)
        if cursor is None:
            self.watches[scan_id] = _Watch(0, "trimmed" if scan.is_trimmed else None)
        elif cursor.epoch != self._log.epoch:
            self.watches[scan_id] = _Watch(0, "epoch")
        elif cursor.n > self._log.shown_n:
            self.watches[scan_id] = _Watch(0, "unknown")
        elif scan.is_trimmed and cursor.n < scan.n:
            self.watches[scan_id] = _Watch(0, "trimmed")
        else:
            self.watches[scan_id] = _Watch(cursor.n, None)
        self.wake()

    def unwatch(self, scan_id: str) -> None:
        self.watches.pop(scan_id, None)

    def wake(self) -> None:
        self._awake.set()

    @property
    def is_done(self) -> bool:
        """Every watched scan has ended, and everything was given."""
        for scan_id, watch in self.watches.items():
            scan = self._log.find(scan_id)
            if scan is None:
                if not watch.is_gone:
                    return False
            elif watch.resets is not None or not scan.state.is_terminal or watch.after < scan.n:
                return False
        return True

    async def batches(
        self, *, heartbeat_s: float | None = None, ends: bool = True
    ) -> AsyncGenerator[list[Event], None]:
        """Everything from the cursors on, oldest first.

        An empty batch means that `heartbeat_s` passed without an event. With `ends` it stops when all watched scans
        have ended and all was given; without, it goes on, and gives an empty batch at each `wake` too. After `close`
        the farewell comes as the last event.
        """
        while True:
            self._awake.clear()
            if self._farewell is not None:
                yield [self._farewell]
                return
            batch = await self.read()
            if batch:
                yield batch
                continue
            if ends and self.is_done:
                return
            try:
                async with asyncio.timeout(heartbeat_s):
                    await self._awake.wait()
            except TimeoutError:
                yield []
            else:
                if not ends:
                    yield []

    def close(self, farewell: Event) -> None:
        """Ends `batches` with this event."""
        self._farewell = farewell
        self.wake()

    async def read(self) -> list[Event]:
        """What is new, oldest first, about READ_BYTES at the most; empty when there is nothing."""
        batch = self._take_resets()
        pages, horizon = await self._read_pages()
        size = 0
        for event in merge(*pages, key=lambda event: event.n or 0):
            size += len(event.json)
            if (horizon is not None and (event.n or 0) > horizon) or (size > READ_BYTES and batch):
                return batch
            watch = self.watches.get(event.scan)
            if watch is not None:
                watch.after = event.n or 0
                batch.append(event)
        return batch + self._take_progress()

    async def _read_pages(self) -> tuple[list[list[Event]], int | None]:
        """What comes next of each scan, and the number up to which nothing is missing between these pages."""
        # A later event must not overtake one that is committed while another scan's page is read.
        horizon: int | None = self._log.shown_n
        pages = []
        for scan_id, watch in list(self.watches.items()):
            try:
                page = await self._log.read(scan_id, watch.after)
                target = self._log.get(scan_id).n
            except UnknownScan:  # reaped while it was watched; _take_resets says so the next time
                continue
            if page:
                pages.append(page)
                last = page[-1].n or 0
                if last < target:
                    horizon = last if horizon is None else min(horizon, last)
        return pages, horizon

    def _take_resets(self) -> list[Event]:
        resets = []
        for scan_id, watch in self.watches.items():
            if self._log.find(scan_id) is None and not watch.is_gone:
                watch.is_gone = True
                watch.resets = "trimmed"
            if watch.resets is not None:
                resets.append(self._make_reset(scan_id, watch.resets))
                watch.resets = None
        return resets

    def _make_reset(self, scan_id: str, reason: str) -> Event:
        log, scan = self._log, self._log.find(scan_id)
        snapshot = None if scan is None else make_snapshot(scan, log.get_progress(scan_id), log.epoch)
        return make_event(EventType.RESET, scan_id, 0, {"reason": reason, "snapshot": snapshot}, log.now_ms())

    def _take_progress(self) -> list[Event]:
        fresh = []
        for scan_id, watch in self.watches.items():
            event = self._log.get_progress_event(scan_id)
            if event is not None and event is not watch.progress and watch.after >= self._log.get(scan_id).n:
                watch.progress = event
                fresh.append(event)
        return fresh
