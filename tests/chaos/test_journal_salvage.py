"""Rules of a damaged journal: it is found, it stops the start, and all that can be read of it is kept."""

import asyncio
import os
import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from app.core.errors import JournalUnavailable
from app.core.event import Event, EventType
from app.core.scan import Producer, Scan, State, digest_rows, make_end
from app.log.check import check_journal
from app.log.eventlog import EventLog
from app.log.journal import Checkpoint
from app.log.mending import Salvaged
from app.log.pages import Pages
from app.log.salvage import salvage_journal
from tests.test_cli import find_port, run
from tests.test_log import open_log
from tests.test_scan import QUEUED, make_scan

PAGE = 4096
NOW_MS = 5000
DATE = "20250102T030405Z"
ROWS = [{"symbol": f"S{number}", "close": number * 1.25, "text": "x" * 40} for number in range(30)]


def started(scan: Scan) -> tuple[EventType, dict[str, Any]]:
    params = {"scanner": scan.scanner, "params": scan.params, "data_version": scan.data_version, "attempt": 1}
    return EventType.STARTED, {"total": 10, "unit": "symbols", **params}


async def find(log: EventLog, scan_id: str, chunks: int, rows: int = len(ROWS)) -> None:
    """Appends the matches of so many chunks."""
    for chunk in range(chunks):
        part = (EventType.MATCHES, {"chunk": chunk, "rows": ROWS[:rows]})
        await log.append(scan_id, part, checkpoint=Checkpoint(chunk=chunk, found=rows))


async def finish(log: EventLog, scan_id: str, chunks: int, rows: int = len(ROWS)) -> None:
    await find(log, scan_id, chunks, rows)
    matches = chunks * rows
    digest = digest_rows(ROWS[:rows] * chunks)
    last_seq = log.next_seq(scan_id)
    end = make_end(State.COMPLETED, matches=matches, found=matches, last_seq=last_seq, digest=digest, elapsed_s=1)
    await log.append(scan_id, (EventType.END, end))


async def fill(path: Path) -> None:
    """A journal with scans of every kind, in a few dozen pages."""
    async with open_log(path) as log:
        names = ["s_small", "s_large", "s_running", "s_late", "s_queued", "s_trimmed"]
        for name in names:
            scan = make_scan(name)
            log.create(scan)
            await log.append(name, QUEUED, *([] if name == "s_queued" else [started(scan)]))
        outside = make_scan("s_outside")._replace(scanner="external", producer=Producer(token_hash="0" * 64))
        log.create(outside)
        await log.append("s_outside", started(outside))
        matches = (EventType.MATCHES, {"chunk": 0, "rows": ROWS})
        await log.append("s_outside", matches, producer=Producer(token_hash="0" * 64, seq=1))
        await finish(log, "s_trimmed", 2)
        await log.trim("s_trimmed")
        await asyncio.gather(finish(log, "s_small", 3, 3), finish(log, "s_large", 11), find(log, "s_running", 7))
        # A chunk that finds nothing writes the record, which knows of all events then; "s_late" ends with matches.
        await log.append("s_running", checkpoint=Checkpoint(chunk=7))
        await find(log, "s_late", 5)


class Kept(NamedTuple):
    epoch: str
    scans: dict[str, Scan]
    events: dict[str, list[Event]]


async def read(path: Path) -> Kept:
    async with open_log(path, memory_bytes=0) as log:
        scans = {scan.id: scan for scan in log.list_scans()}
        return Kept(log.epoch, scans, {id: await log.read(id, 0, 2**30) for id in scans})


def spoil(path: Path, page: int, seed: int, size: int = PAGE) -> None:
    """Overwrites a page with garbage, or the end of it."""
    with path.open("r+b") as file:
        file.seek(page * PAGE - size)
        file.write(random.Random(seed).randbytes(size))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    asyncio.run(fill(path))
    return path / "journal.db"


def compare(before: Kept, after: Kept, salvaged: Salvaged) -> None:
    """What may become of a scan, and nothing else."""
    for id, scan in after.scans.items():
        was, events = before.scans[id], after.events[id]
        told = [(event.type, event.seq, event.n, event.load_data()) for event in before.events[id]]
        tells = [(event.type, event.seq, event.n, event.load_data()) for event in events]
        assert all(event.json.startswith(b'{"id":"%s-%d",' % (after.epoch.encode(), event.n)) for event in events)
        if was.end is not None:
            assert (scan.state, scan.end) == (was.state, was.end)
            assert tells in (told, told[-1:])
            assert (tells == told) or scan.is_trimmed
        elif scan.state is State.LOST:
            assert tells[:-1] == told[: len(tells) - 1]
            assert scan.end is not None
            assert scan.end["error"]["type"].endswith("events-lost")
            rows = [row for _, _, _, data in tells for row in data.get("rows", ())]
            assert (scan.end["digest"], scan.end["matches"]) == (digest_rows(rows), len(rows))
        else:
            assert (tells, scan.state) == (told, was.state)
    if after.epoch == before.epoch:
        assert (after.events.keys(), after.scans) == (before.events.keys(), before.scans)
        assert salvaged.is_epoch_kept
        for id, events in before.events.items():
            assert [event.json for event in after.events[id]] == [event.json for event in events]


@pytest.mark.parametrize("size", [PAGE, 1500])
def test_whichever_page_is_overwritten_the_rest_is_kept_and_no_scan_has_a_hole(
    whole: Path, tmp_path: Path, size: int
) -> None:
    before = asyncio.run(read(whole.parent))
    pages = whole.stat().st_size // PAGE
    kept_epochs = found = 0
    kept = dict.fromkeys(before.scans, 0)
    for page in range(1, pages + 1):
        path = tmp_path / str(page) / "journal.db"
        path.parent.mkdir()
        shutil.copy(whole, path)
        spoil(path, page, seed=page, size=size)
        damaged = path.read_bytes()
        if not check_journal(path).problems:
            continue  # what is there belongs to no row
        found += 1
        assert path.read_bytes() == damaged
        salvaged = salvage_journal(path, NOW_MS, DATE)
        assert (path.parent / f"journal-damaged-{DATE}.db").read_bytes() == damaged
        assert sorted(file.name for file in path.parent.iterdir() if file.suffix != ".lock") == [
            f"journal-damaged-{DATE}.db",
            "journal.db",
        ]
        assert check_journal(path).problems == []
        after = asyncio.run(read(path.parent))
        compare(before, after, salvaged)
        kept_epochs += after.epoch == before.epoch
        for id in after.scans:
            kept[id] += len(after.events[id]) == len(before.events[id])
    assert found > pages * 0.6
    assert 0 < kept_epochs < found
    # A page is a small part of the file: most scans are as they were, most of the time.
    assert min(kept.values()) > found * 0.3


def spoil_first(path: Path, type: str) -> None:
    """Overwrites the page on which this text is."""
    spoil(path, path.read_bytes().index(type.encode()) // PAGE + 1, seed=1)


def copy_to(whole: Path, folder: Path) -> Path:
    return Path(shutil.copy(whole, folder / "journal.db"))


async def test_a_digit_that_fell_over_is_found_by_the_digest_and_the_end_is_kept(whole: Path, tmp_path: Path) -> None:
    path = copy_to(whole, tmp_path)
    with closing(sqlite3.connect(path)) as connection, connection:
        change = "UPDATE events SET json = replace(CAST(json AS TEXT), '3.75', '3.76') WHERE scan = ? AND seq = 4"
        connection.execute(change, ("s_large",))
    assert check_journal(path).problems == [
        "scan s_large: its rows are not the ones that it found: their digest differs"
    ]
    salvaged = salvage_journal(path, NOW_MS, DATE)
    assert (salvaged.trimmed, salvaged.whole, salvaged.is_epoch_kept) == (1, 6, False)
    after = await read(tmp_path)
    assert [event.type for event in after.events["s_large"]] == [EventType.END]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("UPDATE meta SET value = 5 WHERE key = 'placed_n'", "is not where it was noted"),
        ("UPDATE events SET n = 1000 WHERE scan = 's_large' AND seq = 3", "is not where it was noted"),
        ("DELETE FROM places WHERE n = 5", "is not noted with it"),
        ("DELETE FROM events WHERE scan = 's_running' AND seq = 4", "s_running: event 4 is missing"),
        ("DELETE FROM events WHERE scan = 's_large' AND type = 'end'", "s_large: event 14 is missing"),
        ("DELETE FROM scans WHERE id = 's_small'", "s_small: there are events of it, and no record"),
        ("DELETE FROM events WHERE scan = 's_queued'", "s_queued: there is a record of it, and no event"),
        ("DELETE FROM events WHERE scan = 's_trimmed'", "s_trimmed: there is a record of it, and no event"),
        ("DELETE FROM checkpoints WHERE scan = 's_running' AND chunk = 2", "chunk 2 has matches, and is not checked"),
        (
            "UPDATE scans SET record = replace(record, '\"attempt\":1', '\"attempt\":2') WHERE id = 's_large'",
            "s_large: its record is not what its events make of it",
        ),
        ("UPDATE scans SET record = '{}' WHERE id = 's_large'", "s_large: its record cannot be read"),
        ("UPDATE events SET seq = 9 WHERE scan = 's_large' AND seq = 3", "its JSON contradicts its columns"),
        ("DELETE FROM meta", "Its epoch or its last number is missing"),
        ("PRAGMA user_version=7", "It has format 7"),
    ],
)
def test_each_rule_is_checked_and_what_breaks_it_can_be_salvaged(
    whole: Path, tmp_path: Path, change: str, problem: str
) -> None:
    path = copy_to(whole, tmp_path)
    before = asyncio.run(read(whole.parent))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(change)
    assert any(problem in found for found in check_journal(path).problems)
    salvaged = salvage_journal(path, NOW_MS, DATE)
    assert check_journal(path).problems == []
    compare(before, asyncio.run(read(tmp_path)), salvaged)


async def test_what_is_in_the_write_ahead_log_alone_is_salvaged_too(tmp_path: Path) -> None:
    """As a server leaves it that was killed."""
    killed = tmp_path / "killed"
    killed.mkdir()
    async with open_log(tmp_path / "live") as log:
        log.create(make_scan("s_early"))
        await log.append("s_early", QUEUED, started(make_scan()))
        with closing(sqlite3.connect(tmp_path / "live" / "journal.db")) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        await find(log, "s_early", 3)
        for file in ("journal.db", "journal.db-wal"):
            shutil.copy(tmp_path / "live" / file, killed / file)
    path = killed / "journal.db"
    assert [row.rowid for row in Pages(path).rows() if len(row.values) == 6] == [1, 2, 3, 4, 5]
    spoil(path, 1, seed=1)
    salvaged = salvage_journal(path, NOW_MS, DATE)
    assert (salvaged.whole, salvaged.events) == (1, 5)
    assert (killed / f"journal-damaged-{DATE}.db-wal").exists()
    async with open_log(killed) as log:
        assert (log.get("s_early").seq, len(await log.read_checkpoints("s_early"))) == (5, 3)


async def test_a_damaged_journal_stops_the_start_and_the_commands_say_what_is_wrong_and_put_it_right(
    whole: Path, tmp_path: Path, sample_prices: Path
) -> None:
    path = copy_to(whole, tmp_path)
    environment = {"SCANWIRE_STATE_DIR": str(tmp_path), "SCANWIRE_PRICES": str(sample_prices)}
    ended = await run("journal", "check", **environment)
    assert ended.code == 0
    assert f"{path} is whole: 7 scans, 40 events." in ended.out
    assert "nothing to salvage" in (await run("journal", "salvage", **environment)).out
    spoil_first(path, '"scan":"s_large","seq":9')  # of a finished scan: a start has no need of it
    ended = await run("serve", "--port", str(find_port()), **environment)
    assert ended.code == 2
    for words in ("is damaged", f"journal check --state-dir {tmp_path}", f"journal salvage --state-dir {tmp_path}"):
        assert words in ended.err
    ended = await run("journal", "check", "--state-dir", str(tmp_path))
    assert ended.code == 1
    assert f"{path} is damaged:\n  SQLite: " in ended.out
    assert f"journal salvage --state-dir {tmp_path}" in ended.out
    ended = await run("journal", "salvage", "--state-dir", str(tmp_path))
    assert ended.code == 0
    assert "        1 finished scans with their end alone" in ended.out
    assert "new epoch" in ended.out
    (aside,) = (name for name in os.listdir(tmp_path) if "-damaged-" in name)
    assert aside in ended.out
    assert (await run("journal", "check", **environment)).code == 0


async def test_without_a_journal_there_is_nothing_to_check(tmp_path: Path) -> None:
    for command in ("check", "salvage"):
        ended = await run("journal", command, "--state-dir", str(tmp_path))
        assert (ended.code, "There is no journal" in ended.err) == (2, True)
    assert os.listdir(tmp_path) == []


async def test_a_journal_in_use_is_checked_and_not_salvaged(whole: Path, tmp_path: Path) -> None:
    path = copy_to(whole, tmp_path)
    async with open_log(tmp_path):
        assert check_journal(path).problems == []
        with pytest.raises(JournalUnavailable, match="Another Scanwire"):
            salvage_journal(path, NOW_MS, DATE)
    assert not [name for name in os.listdir(tmp_path) if "damaged" in name]


async def test_a_page_that_is_damaged_while_the_server_runs_is_a_fault_that_names_the_commands(
    whole: Path, tmp_path: Path
) -> None:
    path = copy_to(whole, tmp_path)
    async with open_log(tmp_path, memory_bytes=0) as log:
        assert len(await log.read("s_large", 0, 2**30)) == 14
        for page in range(9, 26):
            spoil(path, page, seed=page)
        with pytest.raises(JournalUnavailable, match="scanwire journal salvage"):
            await log.read("s_large", 0, 2**30)
        assert "is damaged" in str(log.fault)
        # What can be committed is, and the fault stays all the same: no new scan should come into such a file.
        await log.append("s_outside", (EventType.MATCHES, {"chunk": 1, "rows": []}))
        assert "is damaged" in str(log.fault)


async def test_a_scan_with_a_missing_event_stops_the_start(whole: Path, tmp_path: Path) -> None:
    path = copy_to(whole, tmp_path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM events WHERE scan = 's_running' AND seq = 4")
    with pytest.raises(JournalUnavailable, match=r"event 4 of scan s_running is missing.*journal salvage"):
        async with open_log(tmp_path):
            pass
    salvage_journal(path, NOW_MS, DATE)  # the start that failed has let go of it
