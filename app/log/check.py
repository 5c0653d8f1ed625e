"""Whether a journal is whole: what SQLite says of the file, and the rules that hold between its rows."""

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import orjson

from app.core.errors import JournalUnavailable, WrongState
from app.core.event import Event, EventType
from app.core.scan import Scan, State, feed_digest
from app.log.schema import READ_ALL, SCHEMA_VERSION

PROBLEMS_MAX = 100  # found in one check; more would tell nobody more
MISFITS = (WrongState, KeyError, ValueError, TypeError)  # what folding events that were never written may raise
_UNPLACED = """
SELECT scan, n FROM events
WHERE n <= ? AND NOT EXISTS (SELECT 1 FROM places WHERE places.scan = events.scan AND places.n = events.n)
"""
_NOWHERE = "SELECT scan, n FROM places WHERE n > ? OR NOT EXISTS (SELECT 1 FROM events WHERE events.n = places.n)"


@dataclass(slots=True)
class Findings:
    """What a check came to. A journal without problems is whole."""

    scans: int = 0
    events: int = 0
    problems: list[str] = field(default_factory=list)


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that sees one state of the journal and changes nothing in it, be it in use or not."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)) as connection:
        yield connection


def check_journal(path: Path) -> Findings:
    """Reads the journal from end to end; a server may be at work on it. Raises JournalUnavailable when there is none.

    The rules: an event's JSON says the same as its columns; where a scan's events lie is noted as it is; in a scan
    `seq` counts from 1 without a gap while `n` grows; a scan has its record, and that is what its events make of it; a
    finished scan has one end, as its last event, and rows with the digest named there; a trimmed one has its end and
    nothing else; of one that goes on, every chunk with matches is checked off.
    """
    if not path.is_file():
        raise JournalUnavailable(f"There is no journal at {path}. Name its directory with --state-dir.")
    findings = Findings()
    try:
        with read_only(path) as connection:
            connection.execute("BEGIN")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version != SCHEMA_VERSION:
                findings.problems.append(f"It has format {version}; this Scanwire reads format {SCHEMA_VERSION}.")
                return findings
            for (text,) in connection.execute(f"PRAGMA integrity_check({PROBLEMS_MAX})"):
                if text != "ok":
                    findings.problems += (f"SQLite: {line}" for line in text.splitlines() if not line.startswith("***"))
            for problem in _find_problems(connection, findings):
                findings.problems.append(problem)
                if len(findings.problems) >= PROBLEMS_MAX:
                    break
    except sqlite3.Error as error:
        findings.problems.append(f"SQLite: {error}")
    return findings


def _find_problems(connection: sqlite3.Connection, findings: Findings) -> Iterator[str]:
    meta = dict(connection.execute("SELECT key, value FROM meta"))
    epoch, placed_n = meta.get("epoch"), meta.get("placed_n")
    if not isinstance(epoch, str) or not isinstance(placed_n, int):
        yield "Its epoch or its last number is missing."
        return
    records: dict[str, Scan] = {}
    for id, record in connection.execute("SELECT id, record FROM scans"):
        try:
            records[id] = parse_record(id, record)
        except ValueError as error:
            yield f"scan {id}: its record cannot be read ({error})"
    findings.scans = len(records)
    for id, n in connection.execute(_UNPLACED, (placed_n,)):
        yield f"scan {id}: the event with number {n} is not noted with it"
    for id, n in connection.execute(_NOWHERE, (placed_n,)):
        yield f"scan {id}: the event with number {n} is not where it was noted"
    checked: dict[str, set[int]] = {}
    for id, chunk in connection.execute("SELECT scan, chunk FROM checkpoints"):
        checked.setdefault(id, set()).add(chunk)
    rows = connection.execute(READ_ALL)
    for id, of_scan in groupby(rows, key=lambda row: str(row[1])):
        events: list[Event] = []
        for row in of_scan:
            findings.events += 1
            try:
                event = parse_event(row)
            except ValueError as error:
                yield f"scan {id}: the event with number {row[0]} cannot be read ({error})"
                continue
            events.append(event)
            if event.id != f"{epoch}-{event.n}" or event.n <= 0:
                yield f"scan {id}: event {event.seq} has the cursor {event.id}, which was never given out"
        scan = records.pop(id, None)
        if scan is None:
            yield f"scan {id}: there are events of it, and no record"
        else:
            yield from (f"scan {id}: {problem}" for problem in find_in_scan(scan, events, checked.get(id, set())))
    yield from (f"scan {id}: there is a record of it, and no event" for id, scan in records.items() if scan.seq)


def parse_record(id: Any, record: Any) -> Scan:
    """Raises ValueError for what is no record of this scan."""
    try:
        scan = Scan.from_record(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if scan.id != id:
        raise ValueError("it is that of another scan")
    return scan


def parse_event(row: Sequence[Any]) -> Event:
    """The event in a row of COLUMNS. Raises ValueError unless its JSON says the same as its columns."""
    n, scan, seq, type_, ts, json = row
    try:
        said = orjson.loads(json)
        is_same = (said["scan"], said["seq"], said["type"], said["ts"]) == (scan, seq, type_, ts)
        if not is_same or not isinstance(said["data"], dict) or said["id"].rpartition("-")[2] != str(n):
            raise ValueError("its JSON contradicts its columns")
        return Event(EventType(type_), scan, seq, n, said["id"], json, ts)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def find_in_scan(scan: Scan, events: Sequence[Event], checked: set[int]) -> Iterator[str]:
    """What is wrong with one scan: its record, its events in the order of `n`, and the chunks that are checked off."""
    if scan.is_trimmed:
        if [(event.type, event.n) for event in events] != [(EventType.END, scan.n)]:
            yield "it was trimmed, and its end is not what is left"
        return
    if (gap := find_gap(events)) is not None or (events[-1].seq if events else 0) < scan.seq:
        yield f"event {gap or len(events) + 1} is missing"
        return
    try:
        at_record, at_end = _fold(scan, events)
    except MISFITS as error:
        yield f"its events contradict each other ({error})"
        return
    if at_record != scan:
        yield "its record is not what its events make of it"
    if at_end.state is not State.RUNNING and at_end.seq != scan.seq:
        yield f"its record does not know that it is {at_end.state}"
    ends = sum(event.type is EventType.END for event in events)
    if at_end.state.is_terminal and (ends != 1 or events[-1].type is not EventType.END):
        yield f"it has {ends} ends"
    if at_end.end is not None and at_end.end.get("digest") not in (None, digest_events(events)):
        yield "its rows are not the ones that it found: their digest differs"
    if scan.producer is None and at_end.end is None and (missing := find_chunks(events) - checked):
        yield f"chunk {min(missing)} has matches, and is not checked off"


def find_gap(events: Iterable[Event]) -> int | None:
    """The first seq that is missing before the last event."""
    return next((seq for seq, event in enumerate(events, 1) if event.seq != seq), None)


def find_chunks(events: Iterable[Event]) -> set[int]:
    """The chunks that have matches."""
    return {event.load_data()["chunk"] for event in events if event.type is EventType.MATCHES}


def digest_events(events: Iterable[Event]) -> str:
    """As `end.digest`."""
    digest = hashlib.sha256()
    for event in events:
        if event.type is EventType.MATCHES:
            feed_digest(digest, event.load_data()["rows"])
    return digest.hexdigest()


def forget_events(scan: Scan) -> Scan:
    """The scan as it was submitted, before its first event."""
    return scan._replace(
        state=State.QUEUED,
        seq=0,
        n=0,
        attempt=0,
        started_ts=None,
        finished_ts=None,
        position=None,
        eta_s=None,
        matches=0,
        end=None,
    )


def fold_on(scan: Scan, events: Iterable[Event]) -> Scan:
    """The scan after these events too. Raises WrongState."""
    for event in events:
        scan = scan.fold(event.type, event.load_data(), event.ts, event.n)
    return scan


def _fold(scan: Scan, events: Sequence[Event]) -> tuple[Scan, Scan]:
    """What the events make of it up to where its record was written, and what all of them do."""
    at_record = fold_on(forget_events(scan), events[: scan.seq])
    at_end = fold_on(at_record, events[scan.seq :])
    return Scan.from_record(at_record.to_record()), at_end
