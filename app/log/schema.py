"""The tables of the journal's file, and how an older file gets them.

Events lie in the order in which they were given their numbers, so that a commit writes at one end of one table, of
however many scans its events are. Where those of a scan lie is noted in `places`, for thousands of events at once:
only then does a page with many of a scan's places pay. Those behind the last note (`placed_n` in `meta`) are found by
looking through them. No number up to `placed_n` is given out again, and everything is noted before any event is
removed, so a number is never used twice.
"""

import secrets
import sqlite3
from collections.abc import Sequence
from itertools import chain

SCHEMA_VERSION = 2
OLDER_VERSION = 1  # what is brought up to date when it is opened
COLUMNS = "n, scan, seq, type, ts, json"
INSERT_EVENT = f"INSERT INTO events ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)"
_INSERT_SOME = [INSERT_EVENT + ", (?, ?, ?, ?, ?, ?)" * (2**power - 1) for power in range(8)]
_PLACED_N = "(SELECT value FROM meta WHERE key = 'placed_n')"
_PLACED = "SELECT places.n, places.scan, seq, type, ts, json FROM places JOIN events ON events.n = places.n"
_OTHERS = f"SELECT {COLUMNS} FROM events WHERE n >"
READ_ALL = f"{_PLACED} UNION ALL {_OTHERS} {_PLACED_N} ORDER BY scan, n"
# Of the scan ?1, behind ?2, at most ?3.
READ_BEHIND = f"""
{_PLACED} WHERE places.scan = ?1 AND places.n > ?2
UNION ALL {_OTHERS} max({_PLACED_N}, ?2) AND scan = ?1 ORDER BY n LIMIT ?3
"""
_EVENTS = """
CREATE TABLE events (
    n INTEGER PRIMARY KEY, scan TEXT NOT NULL, seq INTEGER NOT NULL, type TEXT NOT NULL, ts INTEGER NOT NULL,
    json BLOB NOT NULL
);
CREATE TABLE places (scan TEXT NOT NULL, n INTEGER NOT NULL, PRIMARY KEY (scan, n)) WITHOUT ROWID;
"""
_SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE scans (id TEXT PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID;
{_EVENTS}
CREATE TABLE checkpoints (
    scan TEXT NOT NULL, chunk INTEGER NOT NULL, found INTEGER NOT NULL, skipped BLOB NOT NULL,
    PRIMARY KEY (scan, chunk)
) WITHOUT ROWID;
"""


def new_epoch() -> str:
    return secrets.token_hex(3)


def create(connection: sqlite3.Connection, epoch: str) -> None:
    """Makes the tables of an empty journal."""
    first = f"INSERT INTO meta VALUES ('epoch', '{epoch}'), ('placed_n', 0);"
    connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} {first} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")


def migrate(connection: sqlite3.Connection) -> None:
    """Brings a journal of the older format up to date, whole or not at all: there the events lay by scan, and `last_n`
    was the last number given out. Raises sqlite3.IntegrityError when two events have one number."""
    try:
        connection.executescript(
            f"""
            BEGIN IMMEDIATE;
            ALTER TABLE events RENAME TO older;
            {_EVENTS}
            INSERT INTO events ({COLUMNS}) SELECT {COLUMNS} FROM older ORDER BY n;
            DROP TABLE older;
            INSERT INTO places SELECT scan, n FROM events ORDER BY scan, n;
            UPDATE meta SET key = 'placed_n' WHERE key = 'last_n';
            PRAGMA user_version={SCHEMA_VERSION};
            COMMIT;
            """
        )
    except sqlite3.Error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def are_placed(connection: sqlite3.Connection) -> bool:
    """Whether it is noted of every event where it lies."""
    return connection.execute(f"SELECT 1 FROM events WHERE n > {_PLACED_N} LIMIT 1").fetchone() is None


def place_events(connection: sqlite3.Connection) -> None:
    """Notes where the events lie that came since this was done last. Needs a transaction: what is noted, and up
    to where, go together."""
    connection.execute(
        f"INSERT OR IGNORE INTO places SELECT scan, n FROM events WHERE n > {_PLACED_N} ORDER BY scan, n"
    )
    connection.execute(
        "UPDATE meta SET value = max(value, (SELECT coalesce(max(n), 0) FROM events)) WHERE key = 'placed_n'"
    )


def insert_events(connection: sqlite3.Connection, rows: Sequence[tuple[object, ...]]) -> None:
    """Adds rows of COLUMNS, in as few statements as powers of two allow: each one lets go of the interpreter, and
    waits for it."""
    at = 0
    while left := len(rows) - at:
        power = min(left.bit_length(), len(_INSERT_SOME)) - 1
        connection.execute(_INSERT_SOME[power], tuple(chain.from_iterable(rows[at : at + 2**power])))
        at += 2**power


def remove_events(connection: sqlite3.Connection, scan: str, but_n: int = 0) -> None:
    """Forgets the events of a scan, all but one perhaps, and its checkpoints."""
    place_events(connection)
    connection.execute(
        "DELETE FROM events WHERE n IN (SELECT n FROM places WHERE scan = ?1 AND n != ?2)", (scan, but_n)
    )
    connection.execute("DELETE FROM places WHERE scan = ? AND n != ?", (scan, but_n))
    connection.execute("DELETE FROM checkpoints WHERE scan = ?", (scan,))


def read_last_n(connection: sqlite3.Connection) -> int:
    """The last number that was given out."""
    (last_n,) = connection.execute(f"SELECT max({_PLACED_N}, (SELECT coalesce(max(n), 0) FROM events))").fetchone()
    return int(last_n)


def renew_epoch(connection: sqlite3.Connection, epoch: str) -> None:
    """Gives every event a cursor of another epoch: none that was given out before fits any more."""
    connection.execute("UPDATE meta SET value = ? WHERE key = 'epoch'", (epoch,))
    connection.execute("DELETE FROM meta WHERE key = 'boot'")
    # An event begins with its id: {"id":"k3f9a1-1042", …
    text = "CAST(json AS TEXT)"
    connection.execute(
        f"UPDATE events SET json = CAST('{{\"id\":\"' || ? || substr({text}, instr({text}, '-')) AS BLOB)", (epoch,)
    )
