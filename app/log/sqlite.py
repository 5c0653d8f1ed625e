"""The journal in one SQLite file: WAL, one writer thread, group commit."""

import contextlib
import logging
import queue
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import orjson

from app.core.errors import JournalUnavailable
from app.core.event import Event, EventType
from app.core.scan import Scan, Skipped
from app.log.journal import Checkpoint, Kept, Write
from app.log.lock import StateLock

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE scans (id TEXT PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE events (
    scan TEXT NOT NULL, n INTEGER NOT NULL, seq INTEGER NOT NULL, type TEXT NOT NULL, id TEXT NOT NULL,
    ts INTEGER NOT NULL, json BLOB NOT NULL,
    PRIMARY KEY (scan, n)
);
CREATE TABLE checkpoints (
    scan TEXT NOT NULL, chunk INTEGER NOT NULL, found INTEGER NOT NULL, skipped BLOB NOT NULL,
    PRIMARY KEY (scan, chunk)
) WITHOUT ROWID;
"""
_APART_S = 0.002  # between the end of one transaction and the next
_RETRY_S = (0.05, 0.1, 0.25, 0.5, 1.0)
_READ_ROWS = 256


class SqliteJournal:
    """A journal in `path`, made when it is not there.

    Group commit: every write that arrived while the last transaction ran goes into the next one. A committed
    transaction outlives the process, killed or not; a power cut may take the last few (synchronous=NORMAL in WAL).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fault: str | None = None
        # None asks the writer to stop.
        self._queue: queue.SimpleQueue[Sequence[Write] | None] = queue.SimpleQueue()
        self._left: list[Write] = []
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self.lock = StateLock(path.with_suffix(".lock"))  # held while the journal is open

    def open(self, committed: Callable[[Sequence[Write]], None]) -> Kept:
        """Raises JournalUnavailable, with what to do, for a file that is not a journal or cannot be used."""
        with contextlib.ExitStack() as undo:
            try:
                self.lock.acquire()
                undo.callback(self.lock.release)
                connection = undo.enter_context(closing(self._connect()))
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=NORMAL")
                kept = self._prepare(connection)
            except (sqlite3.Error, OSError) as error:
                raise JournalUnavailable(
                    f"The journal {self.path} cannot be opened: {error}. Check that the directory can be written and "
                    "that the file is a Scanwire journal, or name another directory with SCANWIRE_STATE_DIR."
                ) from error
            undo.pop_all()
        self._thread = threading.Thread(
            target=self._write_all, args=(connection, committed), name="journal", daemon=True
        )
        self._thread.start()
        return kept

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=2, isolation_level=None, check_same_thread=False)

    def _prepare(self, connection: sqlite3.Connection) -> Kept:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            first = f"INSERT INTO meta VALUES ('epoch', '{secrets.token_hex(3)}'), ('last_n', 0);"
            connection.executescript(
                f"BEGIN IMMEDIATE; {_SCHEMA} {first} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;"
            )
        elif version != SCHEMA_VERSION:
            raise JournalUnavailable(
                f"The journal {self.path} has format {version}; this Scanwire reads format {SCHEMA_VERSION}. "
                "Use the version that wrote it, or name another directory with SCANWIRE_STATE_DIR."
            )
        meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
        records = connection.execute("SELECT record FROM scans")
        return Kept(meta["epoch"], meta["last_n"], [Scan.from_record(record) for (record,) in records])

    def submit(self, writes: Sequence[Write]) -> None:
        self._queue.put(writes)

    def _write_all(self, connection: sqlite3.Connection, committed: Callable[[Sequence[Write]], None]) -> None:
        with closing(connection):
            is_open = True
            ended = 0.0
            while is_open:
                batch = [self._queue.get()]
                # Under load more writes share a transaction; the first one after a rest is not kept waiting.
                if batch[0] is not None and (wait_s := ended + _APART_S - time.monotonic()) > 0:
                    self._closing.wait(wait_s)
                while True:
                    try:
                        batch.append(self._queue.get_nowait())
                    except queue.Empty:
                        break
                is_open = None not in batch
                writes = [write for submitted in batch for write in submitted or ()]
                # Behind what could not be written nothing may be: its seq would have a gap.
                if writes and not self._left and self._commit_until_done(connection, writes):
                    committed(writes)
                else:
                    self._left += writes
                ended = time.monotonic()

    def _commit_until_done(self, connection: sqlite3.Connection, writes: Sequence[Write]) -> bool:
        """False only when the journal is closed before it could be written again."""
        attempt = 0
        while True:
            try:
                self._commit(connection, writes)
            except sqlite3.Error as error:
                if self.fault is None:
                    logger.error("journal cannot be written: %s", error, extra={"action": "journal_fault"})
                self.fault = f"The journal cannot be written ({error})."
                if self._closing.wait(_RETRY_S[min(attempt, len(_RETRY_S) - 1)]):
                    return False
                attempt += 1
            else:
                if self.fault is not None:
                    logger.warning("journal can be written again", extra={"action": "journal_recovered"})
                self.fault = None
                return True

    def _commit(self, connection: sqlite3.Connection, writes: Sequence[Write]) -> None:
        connection.execute("BEGIN IMMEDIATE")
        try:
            # Events first, all at once: what trims or removes those of a scan comes after its end.
            connection.executemany(
                "INSERT INTO events (scan, n, seq, type, id, ts, json) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    (event.scan, event.n, event.seq, event.type, event.id, event.ts, event.json)
                    for write in writes
                    for event in write.events
                ),
            )
            for write in writes:
                _put_rest(connection, write)
            last_n = max((event.n or 0 for write in writes for event in write.events), default=0)
            connection.execute("UPDATE meta SET value = max(value, ?) WHERE key = 'last_n'", (last_n,))
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def read(self, scan: str, after: int, max_bytes: int) -> list[Event]:
        events: list[Event] = []
        size = 0
        with closing(self._connect()) as connection:
            rows = connection.execute(
                "SELECT type, scan, seq, n, id, json, ts FROM events WHERE scan = ? AND n > ? ORDER BY n LIMIT ?",
                (scan, after, _READ_ROWS),
            )
            for type_, *rest in rows:
                event = Event(EventType(type_), *rest)
                size += len(event.json)
                if events and size > max_bytes:
                    break
                events.append(event)
        return events

    def read_checkpoints(self, scan: str) -> list[Checkpoint]:
        with closing(self._connect()) as connection:
            rows = connection.execute(
                "SELECT chunk, found, skipped FROM checkpoints WHERE scan = ? ORDER BY chunk", (scan,)
            )
            return [
                Checkpoint(chunk=chunk, found=found, skipped=tuple(Skipped(**one) for one in orjson.loads(skipped)))
                for chunk, found, skipped in rows
            ]

    def close(self) -> Sequence[Write]:
        if self._thread is not None:
            self._closing.set()
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        self.lock.release()
        return self._left


def _can_be_folded(write: Write) -> bool:
    """Matches make the same of a scan whenever they are read, so its record need not be written with each of them."""
    if not write.events or write.scan.producer is not None:
        return False
    return all(event.type is EventType.MATCHES for event in write.events)


def _put_rest(connection: sqlite3.Connection, write: Write) -> None:
    """What a write holds beside its events."""
    scan = write.scan
    if write.trims or write.removes:
        kept = "" if write.removes else " AND type != 'end'"
        connection.execute(f"DELETE FROM events WHERE scan = ?{kept}", (scan.id,))
        connection.execute("DELETE FROM checkpoints WHERE scan = ?", (scan.id,))
    if write.removes:
        connection.execute("DELETE FROM scans WHERE id = ?", (scan.id,))
        return
    if not _can_be_folded(write):
        connection.execute("INSERT OR REPLACE INTO scans (id, record) VALUES (?, ?)", (scan.id, scan.to_record()))
    if write.checkpoint is not None:
        skipped = orjson.dumps([asdict(one) for one in write.checkpoint.skipped])
        connection.execute(
            "INSERT INTO checkpoints VALUES (?, ?, ?, ?)",
            (scan.id, write.checkpoint.chunk, write.checkpoint.found, skipped),
        )
