"""Rules of the journal's tables: where events lie, that no number is used twice, and what comes of an older file."""

import asyncio
import itertools
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from app.core.errors import JournalUnavailable
from app.core.scan import State
from app.log import sqlite
from app.log.check import check_journal
from app.log.journal import Checkpoint
from app.log.salvage import salvage_journal
from app.log.sqlite import SqliteJournal
from tests.test_log import open_log
from tests.test_scan import QUEUED, STARTED, ended, found, make_scan

# As version 1 wrote it.
OLDER = """
PRAGMA older.journal_mode=WAL;
CREATE TABLE older.meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE older.scans (id TEXT PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE older.events (
    scan TEXT NOT NULL, n INTEGER NOT NULL, seq INTEGER NOT NULL, type TEXT NOT NULL, id TEXT NOT NULL,
    ts INTEGER NOT NULL, json BLOB NOT NULL,
    PRIMARY KEY (scan, n)
);
CREATE TABLE older.checkpoints (
    scan TEXT NOT NULL, chunk INTEGER NOT NULL, found INTEGER NOT NULL, skipped BLOB NOT NULL,
    PRIMARY KEY (scan, chunk)
) WITHOUT ROWID;
PRAGMA older.user_version=1;
INSERT INTO older.meta SELECT 'epoch', value FROM meta WHERE key = 'epoch' UNION ALL SELECT 'last_n', 100;
INSERT INTO older.scans SELECT * FROM scans;
INSERT INTO older.checkpoints SELECT * FROM checkpoints;
INSERT INTO older.events
    SELECT scan, n, seq, type, (SELECT value FROM meta WHERE key = 'epoch') || '-' || n, ts, json FROM events
    ORDER BY seq, n;
"""
SCANS = ("s_a", "s_b", "s_c")


async def fill(path: Path) -> None:
    """Scans whose events take turns; one has ended, and one goes on."""
    async with open_log(path) as log:
        for id in SCANS:
            log.create(make_scan(id))
            await log.append(id, QUEUED, STARTED)
        for number in range(4):
            for id in SCANS:
                await log.append(id, found(2), checkpoint=Checkpoint(chunk=number, found=2))
        await log.append("s_a", ended(State.COMPLETED))


async def read(path: Path) -> tuple[str, dict[str, list[bytes]]]:
    async with open_log(path, memory_bytes=0) as log:
        return log.epoch, {scan.id: [event.json for event in await log.read(scan.id, 0)] for scan in log.list_scans()}


@pytest.fixture
async def older(tmp_path: Path) -> Path:
    """A directory with a journal of the older format, beside one ("new") with the same events."""
    new, old = tmp_path / "new", tmp_path / "old"
    new.mkdir()
    old.mkdir()
    await fill(new)
    with closing(sqlite3.connect(new / "journal.db", isolation_level=None)) as connection:
        connection.execute("ATTACH ? AS older", (str(old / "journal.db"),))
        connection.executescript(OLDER)
    return old


async def test_a_journal_of_the_older_format_goes_on_with_all_it_holds(older: Path) -> None:
    before = await read(older.parent / "new")
    assert await read(older) == before
    assert check_journal(older / "journal.db").problems == []
    async with open_log(older) as log:
        assert (await log.append("s_b", found(1))).n == 101  # behind the last number that was given out


async def test_a_journal_of_the_older_format_that_breaks_the_rules_is_refused_and_left_as_it_is(older: Path) -> None:
    with closing(sqlite3.connect(older / "journal.db", isolation_level=None)) as connection:
        connection.execute("UPDATE events SET n = 1 WHERE scan = 's_b' AND seq = 3")
        with pytest.raises(JournalUnavailable, match="damaged"):
            async with open_log(older):
                pass
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        assert connection.execute("SELECT count(*) FROM events WHERE id != ''").fetchone() == (19,)


@pytest.mark.parametrize("is_readable", [True, False])
async def test_a_journal_of_the_older_format_can_be_salvaged(older: Path, is_readable: bool) -> None:
    """Table by table, and page by page."""
    path = older / "journal.db"
    if not is_readable:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            query = "SELECT rootpage FROM sqlite_schema WHERE name = 'checkpoints'"
            (page,) = connection.execute(query).fetchone()
        with path.open("r+b") as file:
            file.seek((page - 1) * 4096)
            file.write(b"\xff" * 4096)
    salvaged = salvage_journal(path, 5000, "20250102T030405Z")
    assert salvaged.is_epoch_kept == is_readable
    assert salvaged.events == 19 + salvaged.ended  # each of which got an end
    before, after = await read(older.parent / "new"), await read(older)
    assert len(after[1]["s_a"]) == len(before[1]["s_a"])


@pytest.mark.parametrize("every", [1, 3, 4, 1000])
async def test_events_are_read_wherever_they_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Some are in `places` and the rest is not, and none is read twice."""
    monkeypatch.setattr(sqlite, "_PLACE_EVENTS", every)
    journal = SqliteJournal(tmp_path / "journal.db")
    async with open_log(tmp_path, journal=journal) as log:
        written: dict[str, list[int]] = {id: [] for id in SCANS}
        for id in SCANS:
            log.create(make_scan(id))
        for number in range(8):
            part = (QUEUED, STARTED)[number] if number < 2 else found(1)
            for id in SCANS[: 1 + number % 3] if number > 1 else SCANS:
                checkpoint = Checkpoint(chunk=0, found=1) if number == 2 else None
                written[id].append((await log.append(id, part, checkpoint=checkpoint)).n)
        for (id, ns), after in itertools.product(written.items(), range(20)):
            events = await asyncio.to_thread(journal.read, id, after, 2**20)
            assert [event.n for event in events] == [n for n in ns if n > after]
        assert check_journal(journal.path).problems == []
        await log.append("s_b", ended(State.COMPLETED))
        end = log.get("s_b").n
        await log.trim("s_b")
        await log.remove("s_c")
        assert [event.n for event in await asyncio.to_thread(journal.read, "s_b", 0, 2**20)] == [end]
        assert await asyncio.to_thread(journal.read, "s_c", 0, 2**20) == []
        assert check_journal(journal.path).problems == []


@pytest.mark.parametrize("every", [1, 1000])
async def test_no_number_is_used_twice_after_a_kill_though_its_event_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    monkeypatch.setattr(sqlite, "_PLACE_EVENTS", every)
    live, killed = tmp_path / "live", tmp_path / "killed"
    live.mkdir()
    killed.mkdir()
    async with open_log(live) as log:
        for id in SCANS[:2]:
            log.create(make_scan(id))
            await log.append(id, QUEUED, STARTED)
        last_n = (await log.append("s_b", ended(State.COMPLETED))).n
        await log.remove("s_b")
        for file in live.glob("journal.db*"):
            shutil.copy(file, killed)
    async with open_log(killed) as log:
        assert (await log.append("s_a", found(1))).n == last_n + 1
