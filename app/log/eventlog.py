"""What happened, in order: the log that running scans write and subscribers read."""

import asyncio
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from anyio import to_thread

from app.core.errors import JournalUnavailable, UnknownScan
from app.core.event import Event, EventType, make_event
from app.core.scan import Producer, Progress, Scan
from app.log.journal import ADVICE, Checkpoint, Forgets, Journal, Kept, Write

Part = tuple[EventType, Mapping[str, Any]]
READ_BYTES = 256 * 1024


class _ScanLog:
    __slots__ = (
        "accepted",
        "checkpoints",
        "events",
        "progress",
        "progress_event",
        "progress_timer",
        "progress_ts",
        "shown",
        "size",
        "tip",
    )

    def __init__(self, tip: Scan, shown: Scan | None) -> None:
        self.tip = tip  # with everything that is still on its way into the journal
        self.shown = shown  # as committed; None until the first event is
        self.events: list[Event] | None = []  # committed ones, oldest first; None: they are in the journal only
        self.size = 0  # bytes of JSON in `events`
        self.checkpoints: list[Checkpoint] | None = None  # of a scan that a restart found; None: in the journal only
        self.progress: Progress | None = None  # the latest
        self.progress_ts = 0  # when it came, in milliseconds since 1970
        self.progress_event: Event | None = None  # the one that is shown
        self.progress_timer: asyncio.TimerHandle | None = None  # until the next one may be shown
        self.accepted: asyncio.Future[Scan] | None = None  # done with the first commit, and None from then on


class LogStatistics(NamedTuple):
    scans: int
    events_appended: int
    memory_bytes: int  # held for finished scans
    fault: str | None


class EventLog:
    """Durable events of all scans, in one order; a durable event can be read only once it is committed.

    All methods belong to one event loop. Scans that are active are held in memory, finished ones as far as
    `memory_bytes` allows; the rest is read back from the journal.
    """

    def __init__(
        self, journal: Journal, *, now_ms: Callable[[], int], memory_bytes: int, progress_per_s: float = 20
    ) -> None:
        self._journal = journal
        self.now_ms = now_ms  # milliseconds since 1970
        self._memory_bytes = memory_bytes
        self._progress_every_s = 1 / progress_per_s
        self._logs: dict[str, _ScanLog] = {}
        self._finished: OrderedDict[str, int] = OrderedDict()  # in memory though finished, with their size
        self._finished_bytes = 0
        self._outbox: list[Write] = []  # appended in this turn of the loop
        self._listeners: list[Callable[[Sequence[str]], None]] = []
        self._last_n = 0
        self._found_n = 0  # the last one when the journal was opened
        self._loop: asyncio.AbstractEventLoop  # from `open` on; to ask for the running one is a system call
        self._is_open = False
        self.epoch = ""
        self.shown_n = 0  # everything up to here is committed, or never will be

    async def open(self) -> None:
        """Opens the journal and takes up what it holds. Raises JournalUnavailable."""
        loop = self._loop = asyncio.get_running_loop()

        def committed(writes: Sequence[Write]) -> None:
            loop.call_soon_threadsafe(self._show, writes)

        kept = await to_thread.run_sync(self._journal.open, committed)
        try:
            await self._take_up(kept)
        except BaseException:
            await to_thread.run_sync(self._journal.close)
            raise
        self._is_open = True

    async def _take_up(self, kept: Kept) -> None:
        self.epoch = kept.epoch
        self._last_n = self._found_n = self.shown_n = kept.last_n
        for scan in sorted(kept.scans, key=lambda scan: (scan.created_ts, scan.id)):
            events = None if scan.state.is_terminal else await to_thread.run_sync(self._read_all, scan.id)
            for seq, event in enumerate(events or (), 1):
                if event.seq != seq:
                    raise JournalUnavailable(
                        f"The journal is damaged: event {seq} of scan {scan.id} is missing. {ADVICE}"
                    )
                if event.n > scan.n:
                    scan = scan.fold(event.type, event.load_data(), event.ts, event.n)
            log = self._logs[scan.id] = _ScanLog(scan, scan)
            log.events, log.size = events, sum(len(event.json) for event in events or ())
            if events is not None:  # now: what cannot be read stops the start, and not a scan under way
                log.checkpoints = await to_thread.run_sync(self._journal.read_checkpoints, scan.id)

    def _read_all(self, scan_id: str) -> list[Event]:
        events: list[Event] = []
        while page := self._journal.read(scan_id, events[-1].n if events else 0, READ_BYTES):
            events += page
        return events

    async def close(self) -> None:
        """Commits what is left and closes the journal; what cannot be written raises where it was appended."""
        self._is_open = False
        self._hand_over()
        left = await to_thread.run_sync(self._journal.close)
        await asyncio.sleep(0)  # let the last commits be shown first
        waiting = [write.committed for write in left]
        waiting += [log.accepted for log in self._logs.values() if log.accepted is not None]
        for log in self._logs.values():
            if log.progress_timer is not None:
                log.progress_timer.cancel()
        for future in waiting:
            if not future.done():
                future.set_exception(JournalUnavailable("The journal was closed before this could be written."))
                future.exception()  # its caller may be gone; that is no reason for a warning

    def listen(self, listener: Callable[[Sequence[str]], None]) -> None:
        """Calls `listener` with the ids of scans that have something new to read, perhaps one twice."""
        self._listeners.append(listener)

    @property
    def fault(self) -> str | None:
        return self._journal.fault

    # Writing

    def create(self, scan: Scan) -> None:
        """Makes a place for a scan. It is shown to nobody before its first event is committed."""
        log = self._logs[scan.id] = _ScanLog(scan, None)
        log.accepted = self._loop.create_future()

    async def append(
        self, scan_id: str, *parts: Part, checkpoint: Checkpoint | None = None, producer: Producer | None = None
    ) -> Scan:
        """Returns the scan after these events once they are committed, all of them or none, with what came before.

        `producer` takes the place of the one in the scan, in the same transaction.
        Raises WrongState for an event that may not come now, and JournalUnavailable when the log closes first. A
        caller that is cancelled while it waits has appended all the same.
        """
        return await self.append_nowait(scan_id, *parts, checkpoint=checkpoint, producer=producer)

    def append_nowait(
        self, scan_id: str, *parts: Part, checkpoint: Checkpoint | None = None, producer: Producer | None = None
    ) -> "asyncio.Future[Scan]":
        """As `append`; gives what will be the scan once they are committed."""
        if not self._is_open:
            raise JournalUnavailable("The log is closed.")
        log = self._find(scan_id)
        tip, n, ts, events = log.tip, self._last_n, self.now_ms(), []
        for type_, data in parts:
            n += 1
            tip = tip.fold(type_, data, ts, n)
            events.append(make_event(type_, scan_id, tip.seq, data, ts, (self.epoch, n)))
        if producer is not None:
            tip = tip._replace(producer=producer)
        log.tip, self._last_n = tip, n
        return self._write(tip, events, checkpoint, is_told=producer is None)

    def _write(
        self,
        scan: Scan,
        events: Sequence[Event] = (),
        checkpoint: Checkpoint | None = None,
        *,
        is_told: bool = True,
        forgets: Forgets | None = None,
    ) -> "asyncio.Future[Scan]":
        if not self._outbox:
            self._loop.call_soon(self._hand_over)  # to wake another thread costs more than to append
        committed: asyncio.Future[Scan] = self._loop.create_future()  # its own: who cancels it cancels nothing else
        self._outbox.append(Write(scan, events, committed, checkpoint, is_told, forgets))
        return committed

    def _hand_over(self) -> None:
        if self._outbox:
            writes, self._outbox = self._outbox, []
            self._journal.submit(writes)

    def publish(self, scan_id: str, progress: Progress) -> None:
        """Makes this the latest progress of a scan. It is not kept, and behind the end no event carries it.

        Subscribers are shown at most `progress_per_s` of them in a second; the last one always, and no later than
        that allows.
        """
        log = self._logs.get(scan_id)
        if log is None or log.shown is None:
            return
        log.progress, log.progress_ts = progress, self.now_ms()
        if log.progress_timer is None and not log.tip.state.is_terminal:
            self._show_progress(scan_id, log, None)

    def _show_progress(self, scan_id: str, log: _ScanLog, before: Progress | None) -> None:
        log.progress_timer = None
        if log.progress is None or log.progress is before or log.shown is None or log.shown.state.is_terminal:
            return
        log.progress_event = make_event(EventType.PROGRESS, scan_id, log.shown.seq, asdict(log.progress), self.now_ms())
        log.progress_timer = self._loop.call_later(
            self._progress_every_s, self._show_progress, scan_id, log, log.progress
        )
        self._tell([scan_id])

    async def trim(self, scan_id: str) -> None:
        """Forgets all events of a finished scan but its end."""
        log = self._find(scan_id)
        log.tip = log.tip._replace(is_trimmed=True)
        if log.events is None:
            log.shown = log.tip  # first: a reader must not find the journal trimmed and take it for whole
        await self._write(log.tip, forgets="events")

    async def remove(self, scan_id: str) -> None:
        """Forgets a finished scan."""
        log = self._find(scan_id)
        await self._write(log.tip, forgets="scan")

    def _show(self, writes: Sequence[Write]) -> None:
        changed = []
        for write in writes:
            scan = write.scan
            log = self._logs.get(scan.id)
            if log is not None:  # else removed again by one who did not wait for the first time
                log.shown = scan
                if log.accepted is not None:
                    log.accepted.set_result(scan)
                    log.accepted = None
                if events := write.events:
                    self.shown_n = scan.n
                    if log.events is not None:
                        log.events += events
                        for event in events:
                            log.size += len(event.json)
                    if scan.state.is_terminal:
                        log.progress_event = None
                        self._keep_in_memory(scan.id, log)
                    changed.append(scan.id)
                if write.checkpoint is not None and log.checkpoints is not None:
                    log.checkpoints.append(write.checkpoint)
                if write.forgets is not None:
                    self._forget(scan.id)
                    if write.forgets == "scan":
                        del self._logs[scan.id]
                    changed.append(scan.id)
            if not write.committed.done():
                write.committed.set_result(scan)
        if changed:
            self._tell(changed)

    def _keep_in_memory(self, scan_id: str, log: _ScanLog) -> None:
        self._finished[scan_id] = log.size
        self._finished_bytes += log.size
        while self._finished_bytes > self._memory_bytes and self._finished:
            self._forget(next(iter(self._finished)))

    def _forget(self, scan_id: str) -> None:
        self._finished_bytes -= self._finished.pop(scan_id, 0)
        log = self._logs[scan_id]
        log.events, log.size = None, 0

    def _tell(self, scan_ids: Sequence[str]) -> None:
        for listener in self._listeners:
            listener(scan_ids)

    # Reading

    def _find(self, scan_id: str) -> _ScanLog:
        try:
            return self._logs[scan_id]
        except KeyError:
            raise UnknownScan(scan_id) from None

    def find(self, scan_id: str) -> Scan | None:
        """The scan as committed, or None."""
        log = self._logs.get(scan_id)
        return None if log is None else log.shown

    def knows(self, scan_id: str) -> bool:
        """Whether there is such a scan, committed or about to be."""
        return scan_id in self._logs

    def get(self, scan_id: str) -> Scan:
        """The scan as committed. Raises UnknownScan."""
        scan = self.find(scan_id)
        if scan is None:
            raise UnknownScan(scan_id)
        return scan

    async def accept(self, scan_id: str) -> Scan:
        """The scan, as soon as its first event is committed. Raises UnknownScan and JournalUnavailable."""
        log = self._find(scan_id)
        if log.accepted is not None:
            await asyncio.shield(log.accepted)
        return self.get(scan_id)

    def list_scans(self) -> Iterator[Scan]:
        """All scans as committed, newest first."""
        return (log.shown for log in reversed(self._logs.values()) if log.shown is not None)

    def next_seq(self, scan_id: str) -> int:
        """The seq that the next event appended to this scan will have."""
        return self._find(scan_id).tip.seq + 1

    def get_progress(self, scan_id: str) -> Progress | None:
        """The latest progress of a scan; of a finished one, where it stood."""
        log = self._logs.get(scan_id)
        return None if log is None else log.progress

    def get_progress_age_s(self, scan_id: str) -> float:
        """Seconds since the latest progress came; 0 when there is none."""
        log = self._logs.get(scan_id)
        return 0.0 if log is None or log.progress is None else (self.now_ms() - log.progress_ts) / 1000

    def get_progress_event(self, scan_id: str) -> Event | None:
        """The event that carries the latest progress, while the scan has not ended."""
        log = self._logs.get(scan_id)
        return None if log is None else log.progress_event

    def read_nowait(self, scan_id: str, after: int, max_bytes: int = READ_BYTES) -> list[Event] | None:
        """As `read`, for a scan that is in memory; None when the journal has to be asked."""
        return self._read_nowait(self._find(scan_id), after, max_bytes)

    def look(self, scan_id: str, after: int) -> tuple[Scan | None, list[Event] | None, Event | None]:
        """What `find`, `read_nowait` and `get_progress_event` say, in one go; nothing of a scan that is not there."""
        log = self._logs.get(scan_id)
        if log is None or log.shown is None:
            return None, None, None
        return log.shown, self._read_nowait(log, after, READ_BYTES), log.progress_event

    def _read_nowait(self, log: _ScanLog, after: int, max_bytes: int) -> list[Event] | None:
        shown = log.shown
        if shown is None or shown.n <= after:
            return []
        events = log.events
        if events is None:
            return None
        if len(events) < 2 or events[-2].n <= after:
            return events[-1:]  # the most common question: only the last one is new, as `shown.n` says
        low = bisect_right(events, after, key=lambda event: event.n)
        stop, size = low, 0
        while stop < len(events) and (size == 0 or size + len(events[stop].json) <= max_bytes):
            size += len(events[stop].json)
            stop += 1
        return events[low:stop]

    async def read(self, scan_id: str, after: int, max_bytes: int = READ_BYTES) -> list[Event]:
        """Committed events of a scan behind `after`, oldest first: at least one if there is one, and then no more
        than `max_bytes` of JSON. Raises UnknownScan."""
        events = self.read_nowait(scan_id, after, max_bytes)
        if events is None:
            events = await to_thread.run_sync(self._journal.read, scan_id, after, max_bytes)
        return events

    async def read_checkpoints(self, scan_id: str) -> list[Checkpoint]:
        """The chunks of a scan that are done."""
        checkpoints = self._find(scan_id).checkpoints
        if checkpoints is None:
            return await to_thread.run_sync(self._journal.read_checkpoints, scan_id)
        return list(checkpoints)

    def statistics(self) -> LogStatistics:
        return LogStatistics(len(self._logs), self.shown_n - self._found_n, self._finished_bytes, self.fault)
