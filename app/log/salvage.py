"""A new journal of all that can be read of a damaged one.

What is kept, and what is honest about the rest:

- An event is kept when its JSON and its columns say the same, a record when it reads as that of its scan.
- A scan without a hole goes on, or stays finished, as if nothing had happened.
- A finished scan with a hole (an event is missing, or its rows do not have the digest of its end) keeps its end, and
  nothing else: clients find it as past retention. What was told as its end stays its end.
- An unfinished scan with a hole keeps the events before the hole, and ends as `lost` with the reason. What it had
  found behind the hole is gone, and the chunks that found it are checked off, so it cannot go on.
- A scan whose record is gone gets a new one from its events: finished, or ended as `lost`. Nobody owns it any more.
  Without its first two events it is dropped.

The epoch is kept when SQLite reads every table from its first row to its last and no scan has a hole: then each cursor
that a client may hold stands where it stood, and only indexes or free pages were damaged. In every other case something
may have been there that left no trace, such as the last events of a scan; its numbers would be given to other events,
and a client would take these for the ones it has. So there is a new epoch, and clients are told to begin anew
(`reset`).
"""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from app.core.errors import JournalUnavailable
from app.core.event import CURSOR_PATTERN, Event
from app.core.scan import Scan
from app.log.check import check_journal, parse_event, parse_record, read_only
from app.log.mending import Mending, Salvaged
from app.log.pages import Pages
from app.log.schema import COLUMNS, INSERT_EVENT, create, new_epoch, renew_epoch
from app.log.sqlite import holding


def salvage_journal(path: Path, now_ms: int, date: str) -> Salvaged:
    """Puts a new journal in the place of the one at `path`, which is kept beside it under a name with `date`.

    Raises JournalUnavailable when there is no journal, while a server uses it, and when the new one cannot be written;
    then everything is as it was.
    """
    if not path.is_file():
        raise JournalUnavailable(f"There is no journal at {path}. Name its directory with --state-dir.")
    new = path.with_name(f"{path.name}.new")
    aside = path.with_name(f"{path.stem}-damaged-{date}{path.suffix}")
    with holding(path):
        try:
            salvaged = _write_new(path, new, now_ms)
            findings = check_journal(new)
            if findings.problems:
                raise JournalUnavailable(
                    f"What was salvaged is not whole: {findings.problems[0]}. Nothing was changed."
                )
            _exchange(path, new, aside)
        except (OSError, sqlite3.Error) as error:
            raise JournalUnavailable(f"The new journal cannot be written: {error}. Nothing was changed.") from error
        finally:
            for suffix in ("", "-journal"):
                new.with_name(new.name + suffix).unlink(missing_ok=True)
    salvaged.events, salvaged.set_aside = findings.events, aside
    return salvaged


def _exchange(path: Path, new: Path, aside: Path) -> None:
    """At every moment there is one journal at `path`. The log of the old one must not come to lie beside the new."""
    os.link(path, aside)
    wal = path.with_name(path.name + "-wal")
    if wal.exists() and wal.stat().st_size:
        wal.rename(aside.with_name(aside.name + "-wal"))
    wal.unlink(missing_ok=True)
    path.with_name(path.name + "-shm").unlink(missing_ok=True)
    new.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _write_new(path: Path, new: Path, now_ms: int) -> Salvaged:
    new.unlink(missing_ok=True)
    with closing(sqlite3.connect(new, isolation_level=None)) as connection:
        create(connection, new_epoch())
        salvaged = Salvaged()
        connection.execute("BEGIN")
        connection.execute("CREATE INDEX by_scan ON events (scan, n)")
        try:
            _Copy(connection, salvaged).take(_read_tables(path))
        except sqlite3.DatabaseError:
            salvaged.is_epoch_kept, salvaged.unreadable = False, 0
            for table in ("scans", "events", "checkpoints"):
                connection.execute(f"DELETE FROM {table}")
            _Copy(connection, salvaged).take(_read_pages(path))
        salvaged.is_epoch_kept &= _is_epoch_sure(connection) and not salvaged.unreadable
        Mending(connection, salvaged, now_ms).mend_all()
        connection.execute("DROP INDEX by_scan")
        if salvaged.trimmed or salvaged.ended or salvaged.dropped or salvaged.rebuilt:
            salvaged.is_epoch_kept = False
        if not salvaged.is_epoch_kept:
            renew_epoch(connection, new_epoch())
        connection.execute("COMMIT")
    return salvaged


def _is_epoch_sure(connection: sqlite3.Connection) -> bool:
    """Whether the events are those of the epoch that was read."""
    (epoch,) = connection.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()
    start = f'{{"id":"{epoch}-'
    others = connection.execute(
        "SELECT count(*) FROM events WHERE substr(CAST(json AS TEXT), 1, ?) != ?", (len(start), start)
    )
    return bool(others.fetchone() == (0,))


# Reading what there is

_Row = tuple[str, Sequence[Any]]  # a table, and the values


def _read_tables(path: Path) -> Iterator[_Row]:
    """As SQLite reads them. Raises sqlite3.DatabaseError."""
    with read_only(path) as connection:
        connection.execute("BEGIN")
        for table, columns in (("meta", "*"), ("scans", "*"), ("checkpoints", "*"), ("events", COLUMNS)):
            indexed = " NOT INDEXED" if table == "events" else ""
            for row in connection.execute(f"SELECT {columns} FROM {table}{indexed}"):
                yield table, row


def _read_pages(path: Path) -> Iterator[_Row]:
    """As they lie on the pages of the file; what is in an index is told apart by its form."""
    for row in Pages(path).rows():
        match row.rowid, row.values:
            case None, (str(), bytes()):
                yield "scans", row.values
            case None, (_, _):  # or a place, which is none of its keys
                yield "meta", row.values
            case None, (_, _, _, _):
                yield "checkpoints", row.values
            case int(n), (None, *rest) if len(rest) == 5:
                yield "events", (n, *rest)
            case int(), (scan, n, seq, type_, _, ts, json):  # in a journal of the older format
                yield "events", (n, scan, seq, type_, ts, json)


class _Copy:
    """Puts the rows that can be believed into the new journal."""

    def __init__(self, connection: sqlite3.Connection, salvaged: Salvaged) -> None:
        self._connection = connection
        self._salvaged = salvaged
        self._records: dict[str, Scan] = {}

    def take(self, rows: Iterator[_Row]) -> None:
        for table, values in rows:
            try:
                getattr(self, f"_take_{table}")(*values)
            except (ValueError, TypeError, sqlite3.IntegrityError):
                self._salvaged.unreadable += 1
        self._connection.executemany(
            "INSERT INTO scans VALUES (?, ?)", ((id, scan.to_record()) for id, scan in self._records.items())
        )

    def _take_meta(self, key: str, value: Any) -> None:
        if key == "epoch" and CURSOR_PATTERN.fullmatch(f"{value}-0"):
            self._connection.execute("UPDATE meta SET value = ? WHERE key = 'epoch'", (value,))
        elif key in ("placed_n", "last_n") and isinstance(value, int) and 0 <= value < 2**62:
            self._connection.execute("UPDATE meta SET value = max(value, ?) WHERE key = 'placed_n'", (value,))

    def _take_scans(self, id: str, record: Any) -> None:
        scan = parse_record(id, record)
        known = self._records.get(id)
        # A page that is in use no more may hold what the record was before.
        if known is None or _age(known) < _age(scan):
            self._records[id] = scan

    def _take_checkpoints(self, *values: Any) -> None:
        self._connection.execute("INSERT OR IGNORE INTO checkpoints VALUES (?, ?, ?, ?)", values)

    def _take_events(self, *values: Any) -> None:
        event = parse_event(values)
        try:
            self._connection.execute(INSERT_EVENT, values)
        except sqlite3.IntegrityError:
            if not self._is_there(event):
                raise  # another event has its number

    def _is_there(self, event: Event) -> bool:
        found = self._connection.execute("SELECT json FROM events WHERE n = ?", (event.n,))
        return bool(found.fetchone() == (event.json,))


def _age(scan: Scan) -> tuple[int, bool, int, int]:
    producer = scan.producer
    return scan.n, scan.is_trimmed, producer.seq if producer else 0, producer.done if producer else 0
