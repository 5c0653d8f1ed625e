"""What comes next behind a set of cursors, one for each scan that is watched."""

import contextlib
from heapq import merge

from app.core.errors import UnknownScan
from app.core.event import Cursor, Event, EventType, make_event
from app.core.scan import Scan
from app.core.snapshot import make_snapshot
from app.log.eventlog import READ_BYTES, EventLog


class Watch:
    """How far one subscriber has read one scan."""

    __slots__ = ("after", "is_gone", "is_trimmed", "page", "progress", "resets")

    def __init__(self, after: int, resets: str | None) -> None:
        self.after = after
        self.is_gone = False  # the scan was reaped while it was watched, and this was told
        self.is_trimmed = False  # it was trimmed, before or while it was watched, and this was told
        self.page: list[Event] | None = None  # read from the journal, not given yet
        self.progress: Event | None = None  # the last one given
        self.resets = resets  # why the cursor could not be used; told before anything else


class Reader:
    """A cursor per watched scan; everything that comes is read from the log.

    Durable events come in the order of `n` across all scans, each once. Progress is folded to the latest, and comes
    only when all durable events of its scan have been given.
    """

    def __init__(self, log: EventLog) -> None:
        self.watches: dict[str, Watch] = {}
        self.page_bytes = READ_BYTES  # of events that are given at once, about
        self._log = log

    def watch(self, scan_id: str, cursor: Cursor | None) -> Watch:
        """Starts behind `cursor`; from the first event without one. Raises UnknownScan.

        A cursor that does not fit the log is answered in band with `reset`, and everything that is kept follows.
        """
        scan, reason = self._log.get(scan_id), None
        if cursor is None:
            reason = "trimmed" if scan.is_trimmed else None
        elif cursor.epoch != self._log.epoch:
            reason = "epoch"
        elif cursor.n > self._log.shown_n:
            reason = "unknown"
        elif scan.is_trimmed and cursor.n < scan.n:
            reason = "trimmed"
        after = 0 if cursor is None or reason is not None else cursor.n
        watch = self.watches[scan_id] = Watch(after, reason)
        watch.is_trimmed = scan.is_trimmed
        return watch

    def unwatch(self, scan_id: str) -> None:
        self.watches.pop(scan_id, None)

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

    def read_nowait(self) -> list[Event] | None:
        """What is new, oldest first, about `page_bytes` at the most; empty when there is nothing, and None when the
        journal has to be asked first: see `fetch`."""
        # A later event must not overtake one whose page is not whole.
        log, horizon, pages = self._log, self._log.shown_n, []
        for scan_id, watch in self.watches.items():
            scan = log.find(scan_id)
            self._note_loss(watch, scan)
            page = self._read_page(scan_id, watch)
            if page is None:
                return None
            if page:
                pages.append(page)
                if scan is not None and (last := page[-1].n) < scan.n:
                    horizon = min(horizon, last)
        batch, size = self._take_resets(), 0
        for event in pages[0] if len(pages) == 1 else merge(*pages, key=lambda event: event.n):
            size += len(event.json)
            if event.n > horizon or (size > self.page_bytes and batch):
                return batch
            self.watches[event.scan].after = event.n
            batch.append(event)
        return batch + self._take_progress()

    def _read_page(self, scan_id: str, watch: Watch) -> list[Event] | None:
        try:
            page = self._log.read_nowait(scan_id, watch.after, self._share)
        except UnknownScan:  # reaped while it was watched; _take_resets says so
            return []
        if page is not None or watch.page is None:
            return page
        fetched, watch.page = watch.page, None
        if fetched and fetched[-1].n <= watch.after:
            return None
        watch.page = fetched or None
        return [event for event in fetched if event.n > watch.after]

    @property
    def _share(self) -> int:
        # One round reads a page of each scan, and gives no more than one page in all.
        return self.page_bytes // max(1, len(self.watches))

    async def fetch(self) -> None:
        """Reads what `read_nowait` lacks from the journal."""
        for scan_id, watch in list(self.watches.items()):
            if watch.page and watch.page[-1].n > watch.after:
                continue  # its turn has not come yet
            with contextlib.suppress(UnknownScan):
                if self._log.read_nowait(scan_id, watch.after) is None:
                    watch.page = await self._log.read(scan_id, watch.after, self._share)

    @staticmethod
    def _note_loss(watch: Watch, scan: Scan | None) -> None:
        """What went past its retention while it was watched must not look as if it had never been."""
        if scan is None:
            if not watch.is_gone:
                watch.is_gone, watch.resets = True, "trimmed"
        elif scan.is_trimmed and not watch.is_trimmed:
            watch.is_trimmed = True
            if watch.after < scan.n:
                watch.after, watch.page, watch.resets = 0, None, "trimmed"

    def _take_resets(self) -> list[Event]:
        resets = []
        for scan_id, watch in self.watches.items():
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
