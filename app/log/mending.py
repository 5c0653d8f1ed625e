"""Whole scans of the events and records that were salvaged; see `app.log.salvage` for what becomes of which."""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from app.core.errors import EventsLost
from app.core.event import Cursor, Event, EventType, make_event
from app.core.scan import Scan, State, make_end, make_same_key
from app.log.check import MISFITS, digest_events, find_chunks, find_gap, fold_on, forget_events, parse_event
from app.log.schema import COLUMNS, INSERT_EVENT, read_last_n


@dataclass(slots=True)
class Salvaged:
    """What was kept and what was lost, in numbers."""

    whole: int = 0  # scans as they were
    rebuilt: int = 0  # of these, scans whose record was made anew from their events
    trimmed: int = 0  # finished scans of which the end is left
    ended: int = 0  # unfinished scans that were ended as lost
    dropped: int = 0  # scans of which nothing could be made
    events: int = 0  # kept
    events_lost: int = 0  # as far as is known: missing ones, and those behind a hole
    unreadable: int = 0  # rows
    is_epoch_kept: bool = True
    set_aside: Path | None = None  # the damaged journal


class Mending:
    """Leaves no scan with a hole in it, and tells of each what became of it."""

    def __init__(self, connection: sqlite3.Connection, salvaged: Salvaged, now_ms: int) -> None:
        self._connection = connection
        self._salvaged = salvaged
        self._now_ms = now_ms
        meta = dict(connection.execute("SELECT key, value FROM meta"))
        self._epoch: str = meta["epoch"]
        self._last_n = read_last_n(connection)

    def mend_all(self) -> None:
        records = dict(self._connection.execute("SELECT id, record FROM scans"))
        ids = sorted({*records, *(id for (id,) in self._connection.execute("SELECT DISTINCT scan FROM events"))})
        for id in ids:
            rows = self._connection.execute(f"SELECT {COLUMNS} FROM events WHERE scan = ? ORDER BY n", (id,))
            events = [parse_event(row) for row in rows]
            checked = self._connection.execute("SELECT chunk, found FROM checkpoints WHERE scan = ?", (id,))
            found: dict[int, int] = dict(checked.fetchall())
            self._mend(id, Scan.from_record(records[id]) if id in records else None, events, found)
        self._connection.execute("DELETE FROM checkpoints WHERE scan NOT IN (SELECT id FROM scans)")
        self._connection.execute("INSERT INTO places SELECT scan, n FROM events ORDER BY scan, n")
        self._connection.execute("UPDATE meta SET value = ? WHERE key = 'placed_n'", (self._last_n,))

    def _mend(self, id: str, scan: Scan | None, events: list[Event], found: dict[int, int]) -> None:
        is_rebuilt = scan is None
        if scan is None:
            scan = _rebuild(events)
            if scan is None:
                self._drop(id, events)
                return
        end = next((event for event in events if event.type is EventType.END), None)
        if scan.end is not None or end is not None:
            is_whole = self._keep_finished(scan, events, end)
        elif not is_rebuilt and _is_whole(scan, events, found, may_lack=not self._salvaged.is_epoch_kept):
            is_whole = True
        else:
            self._end_as_lost(scan, events)
            is_whole = False
        self._salvaged.whole += is_whole
        self._salvaged.rebuilt += is_rebuilt and is_whole

    def _drop(self, id: str, events: list[Event]) -> None:
        self._connection.execute("DELETE FROM events WHERE scan = ?", (id,))
        self._salvaged.dropped += 1
        self._salvaged.events_lost += len(events)

    def _keep_finished(self, scan: Scan, events: list[Event], end: Event | None) -> bool:
        """As it was, or with its end alone, made anew from the record if need be."""
        if scan.end is None:
            assert end is not None
            scan = _take_end(scan, end)
        if not scan.is_trimmed and find_gap(events) is None and len(events) == scan.seq:
            try:
                folded = fold_on(forget_events(scan), events)
                is_whole = (scan.end or {}).get("digest") in (None, digest_events(events))
            except MISFITS:
                is_whole = False
            if is_whole:
                self._put(folded)
                return True
        was_trimmed = scan.is_trimmed
        self._salvaged.trimmed += not was_trimmed
        self._salvaged.events_lost += 0 if was_trimmed else scan.seq - 1
        for table in ("events", "checkpoints"):
            self._connection.execute(f"DELETE FROM {table} WHERE scan = ?", (scan.id,))
        (is_taken,) = self._connection.execute("SELECT count(*) FROM events WHERE n = ?", (scan.n,)).fetchone()
        if is_taken:  # by an event of another scan, if the record is wrong
            self._last_n += 1
            scan = scan._replace(n=self._last_n)
        cursor = Cursor(self._epoch, scan.n)
        self._insert(make_event(EventType.END, scan.id, scan.seq, scan.end or {}, scan.finished_ts or 0, cursor))
        self._put(scan._replace(is_trimmed=True))
        return was_trimmed

    def _end_as_lost(self, scan: Scan, events: list[Event]) -> None:
        folded = _fold_to_hole(scan, events)
        self._salvaged.events_lost += max(scan.seq, events[-1].seq if events else 0) - folded.seq
        self._connection.execute("DELETE FROM events WHERE scan = ? AND n > ?", (scan.id, folded.n))
        self._connection.execute("DELETE FROM checkpoints WHERE scan = ?", (scan.id,))
        events = events[: folded.seq]
        self._last_n += 1
        elapsed_s = 0.0 if folded.started_ts is None else max(0, self._now_ms - folded.started_ts) / 1000
        error = EventsLost("Some of what this scan had found was lost when its journal was damaged. Submit it again.")
        data = make_end(
            State.LOST,
            matches=folded.matches,
            found=folded.matches,
            last_seq=folded.seq + 1,
            digest=digest_events(events),
            elapsed_s=elapsed_s,
            error=error.to_problem(),
        )
        cursor = Cursor(self._epoch, self._last_n)
        self._insert(make_event(EventType.END, scan.id, folded.seq + 1, data, self._now_ms, cursor))
        self._put(folded.fold(EventType.END, data, self._now_ms, self._last_n))
        self._salvaged.ended += 1

    def _insert(self, event: Event) -> None:
        values = (event.n, event.scan, event.seq, event.type, event.ts, event.json)
        self._connection.execute(INSERT_EVENT, values)

    def _put(self, scan: Scan) -> None:
        self._connection.execute("INSERT OR REPLACE INTO scans VALUES (?, ?)", (scan.id, scan.to_record()))


def _fold_to_hole(scan: Scan, events: Sequence[Event]) -> Scan:
    """What the events before the first one that is missing, or fits nowhere, make of it."""
    folded = forget_events(scan)
    for event in events:
        if event.seq != folded.seq + 1:
            break
        try:
            folded = fold_on(folded, [event])
        except MISFITS:
            break
    return folded


def _is_whole(scan: Scan, events: Sequence[Event], found: dict[int, int], *, may_lack: bool) -> bool:
    """Whether an unfinished scan can go on: its events have no hole, and every chunk with matches is checked off.

    When the file `may_lack` rows without a trace, every chunk that is checked off must have its matches too: a hole at
    the end of the events shows in nothing else. (With `max_matches` reached there are none; such a scan is ended.)
    """
    if find_gap(events) is not None or len(events) < scan.seq:
        return False
    if scan.producer is not None:
        # The record of one whose producer numbers its requests is written with every event; others may not know of
        # the last ones.
        return len(events) == scan.seq if scan.producer.seq else not may_lack
    try:
        fold_on(forget_events(scan), events)
        with_matches = find_chunks(events)
    except MISFITS:
        return False
    return (
        with_matches == {chunk for chunk, count in found.items() if count} if may_lack else with_matches <= set(found)
    )


def _take_end(scan: Scan, end: Event) -> Scan:
    """The scan as its end tells of it, where the record does not know of that yet."""
    data = end.load_data()
    return scan._replace(
        state=State(data["state"]),
        seq=end.seq,
        n=end.n,
        matches=data.get("matches", 0),
        finished_ts=end.ts,
        end=data,
        position=None,
        eta_s=None,
    )


def _rebuild(events: Sequence[Event]) -> Scan | None:
    """A scan from its events alone: what nobody can know any more is empty. None without the start of the scan."""
    started = next((event for event in events if event.type is EventType.STARTED), None)
    if started is None:
        return None
    data = started.load_data()
    try:
        scan = Scan(
            id=started.scan,
            scanner=data["scanner"],
            params=data["params"],
            client="",
            created_ts=events[0].ts,
            data_version=data["data_version"],
            same_key=make_same_key(data["scanner"], data["params"], data["data_version"]),
            cost_rows=0,
            chunk_rows=0,
        )
        return None if find_gap(events[: started.seq]) is not None else _fold_to_hole(scan, events)
    except KeyError:
        return None
