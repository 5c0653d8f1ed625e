"""What a commit costs: the journal with both durabilities, beside a bare loop of SQLite inserts in the same run.

    python -m bench.journal                    # in the system's temporary directory
    python -m bench.journal --dir /mnt/disk    # on the disk that counts

Each appender waits for its event to be committed before it appends the next one, as a running scan does. Whatever
arrives while a commit is under way goes into the next one. The bare loop writes the same JSON into the same table and
commits each event by itself: the floor for a single appender, and what sharing commits is measured against. Afterwards
every event must be in the file.
"""

import argparse
import asyncio
import secrets
import sqlite3
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, get_args

from app.core.event import Cursor, EventType, make_event
from app.core.scan import Scan
from app.log.eventlog import EventLog
from app.log.journal import Write
from app.log.schema import INSERT_EVENT, create
from app.log.sqlite import Durability, SqliteJournal
from bench.measure import print_table

APPENDERS = (1, 10, 100)
ROWS = [{"symbol": "SYN00042", "date": "2024-05-06", "close": 12.5, "volume": 1_234_567, "gap_pct": 0.08}] * 2
MATCHES = {"chunk": 0, "rows": ROWS}
STARTED = {"attempt": 1}


class Cost(NamedTuple):
    commits_per_s: float
    events_per_s: float


class CountingJournal(SqliteJournal):
    """Counts its transactions."""

    commits = 0

    def _commit(self, connection: sqlite3.Connection, writes: Sequence[Write]) -> None:
        super()._commit(connection, writes)
        self.commits += 1


def make_scan(number: int) -> Scan:
    return Scan(
        id=f"s_{number:022d}",
        scanner="gap-up",
        params={},
        client="ip:127.0.0.1",
        created_ts=1,
        data_version="bench",
        same_key="bench",
        cost_rows=1,
        chunk_rows=1,
    )


async def measure_journal(path: Path, durability: Durability, appenders: int, seconds: float) -> Cost:
    journal = CountingJournal(path, durability)
    log = EventLog(journal, now_ms=lambda: time.time_ns() // 1_000_000, memory_bytes=0)
    await log.open()
    scans = [make_scan(number) for number in range(appenders)]
    for scan in scans:
        log.create(scan)
        await log.append(scan.id, (EventType.STARTED, STARTED))
    before, began = journal.commits, time.perf_counter()
    until = began + seconds

    async def append(scan_id: str) -> int:
        count = 0
        while time.perf_counter() < until:
            await log.append(scan_id, (EventType.MATCHES, MATCHES))
            count += 1
        return count

    events = sum(await asyncio.gather(*(append(scan.id) for scan in scans)))
    took_s = time.perf_counter() - began
    commits = journal.commits - before
    await log.close()
    check(path, events + appenders)
    return Cost(commits / took_s, events / took_s)


def measure_bare(path: Path, durability: Durability, seconds: float) -> Cost:
    scan, count = make_scan(0).id, 0
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={'FULL' if durability == 'power' else 'NORMAL'}")
        create(connection, secrets.token_hex(3))
        event = make_event(EventType.MATCHES, scan, 1, MATCHES, time.time_ns() // 1_000_000, Cursor("bench0", 1))
        began = time.perf_counter()
        while time.perf_counter() < began + seconds:
            count += 1
            connection.execute(INSERT_EVENT, (count, scan, count, event.type.value, event.ts, event.json))
        took_s = time.perf_counter() - began
    check(path, count)
    return Cost(count / took_s, count / took_s)


def check(path: Path, expected: int) -> None:
    with closing(sqlite3.connect(path)) as connection:
        (found,) = connection.execute("SELECT count(*) FROM events").fetchone()
    if found != expected:
        raise SystemExit(f"{expected} events were committed and {found} are in the file")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4, help="of each measurement")
    parser.add_argument("--dir", type=Path, help="where the journals are written")
    options = parser.parse_args()
    rows: list[Sequence[object]] = []
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        for durability in get_args(Durability):
            bare = measure_bare(Path(folder) / f"bare-{durability}.db", durability, options.seconds)
            rows.append((durability, "bare inserts", f"{bare.commits_per_s:,.0f}", f"{bare.events_per_s:,.0f}", 1.0))
            for appenders in APPENDERS:
                path = Path(folder) / f"{durability}-{appenders}.db"
                cost = asyncio.run(measure_journal(path, durability, appenders, options.seconds))
                per_s = f"{cost.commits_per_s:,.0f}", f"{cost.events_per_s:,.0f}"
                rows.append((durability, f"{appenders} appending", *per_s, cost.events_per_s / bare.events_per_s))
    print_table("Commits", ("durability", "who", "commits/s", "events/s", "× bare inserts"), rows)


if __name__ == "__main__":
    main()
