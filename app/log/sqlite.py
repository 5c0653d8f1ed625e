"""The journal in one SQLite file: WAL, one writer thread, group commit."""

import contextlib
import logging
import queue
import secrets
import shlex
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import orjson

from app.core.errors import JournalUnavailable
from app.core.event import Event, EventType
from app.core.scan import Scan, Skipped
from app.log.journal import ADVICE, Checkpoint, Kept, Write
from app.log.lock import StateLock
from app.log.schema import (
    OLDER_VERSION,
    READ_BEHIND,
    SCHEMA_VERSION,
    are_placed,
    create,
    insert_events,
    migrate,
    new_epoch,
    place_events,
    read_last_n,
    remove_events,
    renew_epoch,
)

logger = logging.getLogger(__name__)

Durability = Literal["process", "power"]

_APART_S = 0.002  # between the end of one transaction and the next
_APART_A_WRITE_S = 0.0001  # and this for each write in the one before: many share what a page costs
_APART_MOST_S = 0.01
_CHECKPOINT_PAGES = 4000  # a page that changes often goes from the WAL into the file less often: 16 MB
_RETRY_S = (0.05, 0.1, 0.25, 0.5, 1.0)
_READ_ROWS = 256
_MATCHES = EventType.MATCHES
_PLACE_EVENTS = 4096  # are noted at once: a few milliseconds of one commit, and what a read may have to look through
# SQLite's quick check reads about a gigabyte a second; past this size a start would feel it.
_QUICK_CHECK_BYTES = 512 * 2**20
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class SqliteJournal:
    """A journal in `path`, made when it is not there.

    Group commit: every write that arrived while the last transaction ran goes into the next one. A committed
    transaction outlives the process, killed or not. With the durability "power" it outlives the machine too, for a
    flush of the disk at each commit; with "process" a power cut may take the last few. Cursors that were given out for
    these would then point at other events, so the first start after such a cut takes a new epoch: the journal notes
    the boot of the system that writes it, and forgets that note when it is closed in an orderly way.
    """

    def __init__(self, path: Path, durability: Durability = "process", *, boot_id: str | None = None) -> None:
        self.path = path
        self.fault: str | None = None
        self._durability: Durability = durability
        self._boot_id = boot_id or read_boot_id()
        self._epoch = ""
        self._unplaced = 0  # events that are not in `places` yet
        self._is_noted = False  # what a power cut would mean is in the file
        self._damage: str | None = None  # a fault that only `scanwire journal salvage` ends
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
                connection.execute("PRAGMA synchronous=FULL")
                connection.execute(f"PRAGMA wal_autocheckpoint={_CHECKPOINT_PAGES}")
                kept = self._prepare(connection)
            except (sqlite3.Error, OSError) as error:
                if is_damage(error):
                    raise self._refuse(str(error)) from error
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

    def _refuse(self, reason: str) -> JournalUnavailable:
        """Why a start is refused, and what to do: for who starts the server, not for its clients."""
        where = f"--state-dir {shlex.quote(str(self.path.parent))}"
        return JournalUnavailable(
            f"The journal {self.path} is damaged, or is none: {reason}. `scanwire journal check {where}` says more, "
            f"`scanwire journal salvage {where}` makes a new one of all that can be read. Or name another directory "
            "with SCANWIRE_STATE_DIR."
        )

    def _prepare(self, connection: sqlite3.Connection) -> Kept:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            create(connection, new_epoch())
        elif version not in (OLDER_VERSION, SCHEMA_VERSION):
            raise JournalUnavailable(
                f"The journal {self.path} has format {version}; this Scanwire reads format {SCHEMA_VERSION}. "
                "Use the version that wrote it, or name another directory with SCANWIRE_STATE_DIR."
            )
        if (reason := self._check_quickly(connection)) is not None:
            raise self._refuse(reason)
        if version == OLDER_VERSION:
            try:
                migrate(connection)
            except sqlite3.IntegrityError as error:
                raise self._refuse(str(error)) from error
            logger.info("the journal was brought to a new format", extra={"action": "journal_migrated"})
        try:
            meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
            records = connection.execute("SELECT record FROM scans")
            kept = Kept(meta["epoch"], read_last_n(connection), [Scan.from_record(record) for (record,) in records])
        except (ValueError, KeyError, TypeError) as error:
            raise self._refuse(f"it holds what Scanwire never wrote ({type(error).__name__}: {error})") from error
        if meta.get("boot") not in (None, self._boot_id):
            logger.warning("the system went down under the journal: a new epoch", extra={"action": "epoch_renewed"})
            kept = kept._replace(epoch=new_epoch())
            connection.execute("BEGIN IMMEDIATE")
            renew_epoch(connection, kept.epoch)
            connection.execute("COMMIT")
        self._epoch = kept.epoch
        self._place_all(connection)
        return kept

    def _place_all(self, connection: sqlite3.Connection) -> None:
        """So that no read looks through events which came before. It has no need of it: a full disk is no fault yet."""
        if are_placed(connection):
            return
        try:
            connection.execute("BEGIN IMMEDIATE")
            place_events(connection)
            connection.execute("COMMIT")
        except sqlite3.OperationalError:
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    def _check_quickly(self, connection: sqlite3.Connection) -> str | None:
        """The first thing that SQLite's quick check finds. Of a large journal it reads all but the events and
        their places: those of scans that go on are read at the start anyway, the others when someone asks."""
        is_large = self.path.stat().st_size > _QUICK_CHECK_BYTES
        for table in ("('meta')", "('scans')", "('checkpoints')") if is_large else ("(1)",):
            (found,) = connection.execute(f"PRAGMA quick_check{table}").fetchone()
            if found != "ok":
                return str(found).removeprefix("*** in database main ***\n")
        return None

    def submit(self, writes: Sequence[Write]) -> None:
        self._queue.put(writes)

    def _write_all(self, connection: sqlite3.Connection, committed: Callable[[Sequence[Write]], None]) -> None:
        with closing(connection):
            is_open = True
            rests_until = 0.0
            while is_open:
                batch = [self._queue.get()]
                # Under load more writes share a transaction; the first one after a rest is not kept waiting.
                if batch[0] is not None and (wait_s := rests_until - time.monotonic()) > 0:
                    self._closing.wait(wait_s)
                while not self._queue.empty():
                    batch.append(self._queue.get_nowait())
                is_open = None not in batch
                writes = [write for submitted in batch for write in submitted or ()]
                # Behind what could not be written nothing may be: its seq would have a gap.
                if writes and not self._left and self._commit_until_done(connection, writes):
                    committed(writes)
                else:
                    self._left += writes
                rests_until = time.monotonic() + min(_APART_S + _APART_A_WRITE_S * len(writes), _APART_MOST_S)
            if not self._left:
                self._note_close(connection)

    def _commit_until_done(self, connection: sqlite3.Connection, writes: Sequence[Write]) -> bool:
        """False only when the journal is closed before it could be written again."""
        attempt = 0
        while True:
            try:
                self._commit(connection, writes)
            except Exception as error:  # whatever it is, what was submitted is not skipped over
                if self.fault is None:
                    logger.error("journal cannot be written: %s", error, extra={"action": "journal_fault"})
                self._note_fault(error)
                if self._closing.wait(_RETRY_S[min(attempt, len(_RETRY_S) - 1)]):
                    return False
                attempt += 1
            else:
                if self.fault is not None and self._damage is None:
                    logger.warning("journal can be written again", extra={"action": "journal_recovered"})
                self.fault = self._damage
                return True

    def _note_fault(self, error: Exception, *, is_damaged: bool = False) -> None:
        if is_damaged or is_damage(error):
            if self._damage is None:
                logger.error("the journal %s is damaged: %s", self.path, error, extra={"action": "journal_damaged"})
            self._damage = f"The journal is damaged ({error}). Stop the server: {ADVICE}"
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        self.fault = self._damage or f"The journal cannot be written ({error}, {name})."

    def _commit(self, connection: sqlite3.Connection, writes: Sequence[Write]) -> None:
        rows, rest = [], []
        for write in writes:
            is_folded = write.is_told and len(write.events) > 0
            for event in write.events:
                rows.append((event.n, event.scan, event.seq, str(event.type), event.ts, event.json))
                # These make the same of a scan whenever they are read: its record need not be written with each.
                is_folded = is_folded and event.type is _MATCHES
            if not is_folded or write.checkpoint is not None:
                rest.append((write, is_folded))
        unplaced = self._unplaced + len(rows)
        is_to_place = unplaced >= _PLACE_EVENTS
        connection.execute("BEGIN IMMEDIATE")
        try:
            # Events first, all at once: what forgets those of a scan comes after its end.
            insert_events(connection, rows)
            for write, is_folded in rest:
                _put_rest(connection, write, is_folded)
            if is_to_place:
                place_events(connection)
            if not self._is_noted:
                self._note_boot(connection)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._unplaced = 0 if is_to_place else unplaced
        if not self._is_noted:
            # This one is on the disk, with the note in it; from here on a power cut may take what the setting lets it.
            self._is_noted = True
            connection.execute(f"PRAGMA synchronous={'FULL' if self._durability == 'power' else 'NORMAL'}")

    def _note_boot(self, connection: sqlite3.Connection) -> None:
        if self._durability == "power":
            connection.execute("DELETE FROM meta WHERE key = 'boot'")
        else:
            connection.execute("INSERT OR REPLACE INTO meta VALUES ('boot', ?)", (self._boot_id,))

    def _note_close(self, connection: sqlite3.Connection) -> None:
        """Everything is on the disk, and the next start may believe it."""
        with contextlib.suppress(sqlite3.Error):  # it is believed less then
            self._place_all(connection)
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("DELETE FROM meta WHERE key = 'boot'")

    def read(self, scan: str, after: int, max_bytes: int) -> list[Event]:
        events: list[Event] = []
        size = 0
        with self._reading() as connection:
            rows = connection.execute(READ_BEHIND, (scan, after, _READ_ROWS))
            for n, _, seq, type_, ts, json in rows:
                size += len(json)
                if events and size > max_bytes:
                    break
                events.append(Event(EventType(type_), scan, seq, n, f"{self._epoch}-{n}", json, ts))
        return events

    def read_checkpoints(self, scan: str) -> list[Checkpoint]:
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT chunk, found, skipped FROM checkpoints WHERE scan = ? ORDER BY chunk", (scan,)
            )
            return [
                Checkpoint(chunk=chunk, found=found, skipped=tuple(Skipped(**one) for one in orjson.loads(skipped)))
                for chunk, found, skipped in rows
            ]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection to read with. Raises JournalUnavailable; what is damaged is a fault from then on."""
        try:
            with closing(self._connect()) as connection:
                yield connection
        except (sqlite3.Error, ValueError) as error:
            if is_damage(error) or isinstance(error, ValueError):
                self._note_fault(error, is_damaged=True)
            detail = self._damage or f"The journal cannot be read just now ({error})."
            raise JournalUnavailable(detail, retry_after_s=10) from error

    def close(self) -> Sequence[Write]:
        if self._thread is not None:
            self._closing.set()
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        self.lock.release()
        return self._left


@contextlib.contextmanager
def holding(path: Path) -> Iterator[None]:
    """Keeps every server away from the journal meanwhile. Raises JournalUnavailable while one is at work on it."""
    lock = StateLock(path.with_suffix(".lock"))
    try:
        is_held = lock.try_acquire()
    except OSError as error:
        raise JournalUnavailable(f"{path.parent} cannot be written: {error}.") from error
    if not is_held:
        raise JournalUnavailable(f"Another Scanwire is running on {path.parent}. Stop it first.")
    try:
        yield
    finally:
        lock.release()


def is_damage(error: Exception) -> bool:
    """Whether this says that the file does not hold what was written, rather than that it cannot be reached."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def read_boot_id() -> str:
    """Names the time since the system was started; where it cannot be told, every process has one of its own."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return secrets.token_hex(16)


def _put_rest(connection: sqlite3.Connection, write: Write, is_folded: bool) -> None:
    """What a write holds beside its events, but not what its scan is when that can be folded from them."""
    scan = write.scan
    if write.forgets is not None:
        remove_events(connection, scan.id, but_n=0 if write.forgets == "scan" else scan.n)  # its end is its last
    if write.forgets == "scan":
        connection.execute("DELETE FROM scans WHERE id = ?", (scan.id,))
        return
    if not is_folded:
        connection.execute("INSERT OR REPLACE INTO scans (id, record) VALUES (?, ?)", (scan.id, scan.to_record()))
    if write.checkpoint is not None:
        skipped = orjson.dumps([asdict(one) for one in write.checkpoint.skipped])
        connection.execute(
            "INSERT INTO checkpoints VALUES (?, ?, ?, ?)",
            (scan.id, write.checkpoint.chunk, write.checkpoint.found, skipped),
        )


def close_journal(path: Path) -> None:
    """Brings a journal that nobody has open into the state that an orderly stop leaves, with all that was committed.

    Its lock must be held. Raises sqlite3.Error.
    """
    where = f"{path.resolve().as_uri()}?mode=rw"  # never a new one
    with closing(sqlite3.connect(where, uri=True, timeout=2, isolation_level=None)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
