"""Rules of the log: commit before show, order, cursors that survive a restart, nothing lost on faults."""

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.errors import JournalUnavailable, UnknownScan, WrongState
from app.core.event import EventType
from app.core.scan import Progress, Skipped, State
from app.log.eventlog import EventLog
from app.log.journal import Checkpoint, Write
from app.log.sqlite import SqliteJournal
from tests.conftest import until
from tests.test_scan import CANCELLING, QUEUED, STARTED, ended, found, make_scan


class SlowJournal(SqliteJournal):
    """Commits when the test says so."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.may_commit = threading.Event()

    def _commit(self, connection: sqlite3.Connection, writes: Sequence[Write]) -> None:
        self.may_commit.wait(10)
        super()._commit(connection, writes)


@asynccontextmanager
async def open_log(path: Path, *, memory_bytes: int = 2**20, journal: Any = None) -> AsyncIterator[EventLog]:
    log = EventLog(journal or SqliteJournal(path / "journal.db"), now_ms=lambda: 1000, memory_bytes=memory_bytes)
    await log.open()
    try:
        yield log
    finally:
        await log.close()


async def test_a_durable_event_is_shown_only_when_it_is_committed(tmp_path: Path) -> None:
    journal = SlowJournal(tmp_path / "journal.db")
    async with open_log(tmp_path, journal=journal) as log:
        log.create(make_scan())
        appending = asyncio.create_task(log.append("s_test", QUEUED))
        await asyncio.sleep(0)
        with pytest.raises(UnknownScan):
            log.get("s_test")
        assert log.read_nowait("s_test", 0) == []
        journal.may_commit.set()
        scan = await appending
        assert log.get("s_test") is scan
        events = await log.read("s_test", 0)
        assert [event.json for event in events] == _rows(tmp_path)


def _rows(path: Path) -> list[bytes]:
    connection = sqlite3.connect(path / "journal.db")
    try:
        return [json for (json,) in connection.execute("SELECT json FROM events ORDER BY n")]
    finally:
        connection.close()


async def test_what_arrives_during_a_commit_goes_into_the_next_one_together(tmp_path: Path) -> None:
    journal = SlowJournal(tmp_path / "journal.db")
    batches: list[int] = []
    commit = journal._commit

    def count(connection: sqlite3.Connection, writes: Sequence[Write]) -> None:
        batches.append(len(writes))
        commit(connection, writes)

    journal._commit = count  # type: ignore[method-assign]
    async with open_log(tmp_path, journal=journal) as log:
        for number in range(20):
            log.create(make_scan(f"s_{number}"))
        tasks = [asyncio.create_task(log.append(f"s_{number}", QUEUED)) for number in range(20)]
        await asyncio.sleep(0)
        journal.may_commit.set()
        await asyncio.gather(*tasks)
    assert sum(batches) == 20
    assert len(batches) <= 2


async def test_seq_has_no_gap_and_n_only_grows_over_all_scans(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        for name in ("s_a", "s_b"):
            log.create(make_scan(name))
        for part in (QUEUED, STARTED, found(1), ended(State.COMPLETED)):
            await asyncio.gather(log.append("s_a", part), log.append("s_b", part))
        a, b = await log.read("s_a", 0), await log.read("s_b", 0)
    assert [event.seq for event in a] == [event.seq for event in b] == [1, 2, 3, 4]
    assert sorted(event.n for event in a + b) == list(range(1, 9))


async def test_an_event_that_may_not_come_leaves_no_trace(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        log.create(make_scan())
        await log.append("s_test", QUEUED)
        with pytest.raises(WrongState):
            await log.append("s_test", STARTED, ended(State.COMPLETED), found(1))
        scan = await log.append("s_test", STARTED)
        assert (scan.seq, scan.n) == (2, 2)


async def test_a_restart_keeps_epoch_scans_events_and_numbers(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        log.create(make_scan())
        for part in (QUEUED, STARTED, found(2)):
            await log.append("s_test", part)
        epoch, before = log.epoch, await log.read("s_test", 0)
    async with open_log(tmp_path) as log:
        assert log.epoch == epoch
        assert [event.json for event in await log.read("s_test", 0)] == [event.json for event in before]
        scan = await log.append("s_test", ended(State.LOST))
        assert (scan.seq, scan.n, scan.matches) == (4, 4, 2)


async def test_numbers_of_removed_scans_are_never_given_again(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        log.create(make_scan("s_old"))
        await log.append("s_old", QUEUED, ended(State.LOST))
        await log.remove("s_old")
        with pytest.raises(UnknownScan):
            log.get("s_old")
    async with open_log(tmp_path) as log:
        log.create(make_scan("s_new"))
        assert (await log.append("s_new", QUEUED)).n == 3


async def test_a_checkpoint_and_its_matches_are_one_transaction(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        log.create(make_scan())
        await log.append("s_test", QUEUED, STARTED)
        skipped = (Skipped(symbol="AAL", reason="1 row without a volume"),)
        await log.append("s_test", found(2), checkpoint=Checkpoint(chunk=4, found=3, skipped=skipped))
        await log.append("s_test", checkpoint=Checkpoint(chunk=5))
        with pytest.raises(WrongState):
            await log.append("s_test", QUEUED, found(1), checkpoint=Checkpoint(chunk=6))
    async with open_log(tmp_path) as log:
        assert await log.read_checkpoints("s_test") == [
            Checkpoint(chunk=4, found=3, skipped=skipped),
            Checkpoint(chunk=5),
        ]
        assert log.get("s_test").matches == 2


async def test_finished_scans_are_read_back_from_the_journal_when_memory_is_full(tmp_path: Path) -> None:
    async with open_log(tmp_path, memory_bytes=0) as log:
        log.create(make_scan())
        await log.append("s_test", QUEUED, STARTED, found(3), ended(State.COMPLETED))
        assert log.read_nowait("s_test", 0) is None
        assert [event.seq for event in await log.read("s_test", 0)] == [1, 2, 3, 4]
        assert [event.seq for event in await log.read("s_test", 3)] == [4]
        assert log.statistics().memory_bytes == 0


async def test_a_page_has_at_least_one_event_and_then_keeps_to_its_size(tmp_path: Path) -> None:
    for memory_bytes in (2**20, 0):
        path = tmp_path / str(memory_bytes)
        async with open_log(path, memory_bytes=memory_bytes) as log:
            log.create(make_scan())
            await log.append("s_test", QUEUED, STARTED, *[found(5)] * 10, ended(State.COMPLETED))
            sizes, after = [], 0
            while page := await log.read("s_test", after, 500):
                after = page[-1].n
                sizes.append(sum(len(event.json) for event in page))
                assert len(page) == 1 or sizes[-1] <= 500
            assert after == 13


async def test_a_trimmed_scan_keeps_its_end_alone(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        log.create(make_scan())
        await log.append("s_test", QUEUED, STARTED, found(3), ended(State.COMPLETED))
        await log.trim("s_test")
        assert [event.type for event in await log.read("s_test", 0)] == [EventType.END]
        assert log.get("s_test").is_trimmed
    async with open_log(tmp_path) as log:
        assert log.get("s_test").is_trimmed
        assert log.get("s_test").end == {"state": "completed"}


async def test_progress_is_the_latest_and_goes_with_the_end(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        log.create(make_scan())
        await log.append("s_test", QUEUED, STARTED)
        for done in (1, 2):
            log.publish("s_test", Progress(done=done, total=2, unit="symbols"))
        event = log.get_progress_event("s_test")
        assert event is not None
        assert (event.load_data()["done"], event.seq, event.id) == (1, 2, None)
        assert log.get_progress("s_test") == Progress(done=2, total=2, unit="symbols")
        await log.append("s_test", ended(State.COMPLETED))
        assert log.get_progress_event("s_test") is None


async def test_a_caller_that_is_cancelled_has_appended_all_the_same(tmp_path: Path) -> None:
    journal = SlowJournal(tmp_path / "journal.db")
    async with open_log(tmp_path, journal=journal) as log:
        log.create(make_scan())
        first = asyncio.create_task(log.append("s_test", QUEUED))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        journal.may_commit.set()
        assert (await log.append("s_test", STARTED)).seq == 2


class BrokenJournal(SqliteJournal):
    """A disk that is full until the test says otherwise."""

    is_full = True

    def _commit(self, connection: sqlite3.Connection, writes: Sequence[Write]) -> None:
        if self.is_full:
            raise sqlite3.OperationalError("database or disk is full")
        super()._commit(connection, writes)


async def test_a_full_disk_shows_nothing_and_loses_nothing(tmp_path: Path) -> None:
    journal = BrokenJournal(tmp_path / "journal.db")
    async with open_log(tmp_path, journal=journal) as log:
        log.create(make_scan())
        appending = asyncio.create_task(log.append("s_test", QUEUED, STARTED))
        await until(lambda: log.fault)
        assert "full" in str(log.fault)
        assert not appending.done()
        with pytest.raises(UnknownScan):
            log.get("s_test")
        journal.is_full = False
        assert (await appending).seq == 2
        assert log.fault is None


async def test_what_could_not_be_written_before_the_close_says_so(tmp_path: Path) -> None:
    journal = BrokenJournal(tmp_path / "journal.db")
    async with open_log(tmp_path, journal=journal) as log:
        log.create(make_scan())
        appending = asyncio.create_task(log.append("s_test", QUEUED))
        await until(lambda: log.fault)
    with pytest.raises(JournalUnavailable):
        await appending
    with pytest.raises(JournalUnavailable):
        await log.append("s_test", QUEUED)


class HaltingJournal(SqliteJournal):
    """Cannot write matches; all else it can."""

    def _commit(self, connection: sqlite3.Connection, writes: Sequence[Write]) -> None:
        if any(event.type is EventType.MATCHES for write in writes for event in write.events):
            raise sqlite3.OperationalError("database is locked")
        super()._commit(connection, writes)


async def test_nothing_is_written_behind_what_could_not_be(tmp_path: Path) -> None:
    async with open_log(tmp_path, journal=HaltingJournal(tmp_path / "journal.db")) as log:
        log.create(make_scan())
        await log.append("s_test", QUEUED, STARTED)
        lost = [asyncio.create_task(log.append("s_test", found(1)))]
        await until(lambda: log.fault)
        lost.append(asyncio.create_task(log.append("s_test", CANCELLING)))
        await asyncio.sleep(0)
    for task in lost:
        with pytest.raises(JournalUnavailable):
            await task
    async with open_log(tmp_path) as log:
        assert [event.seq for event in await log.read("s_test", 0)] == [1, 2]
        assert (log.get("s_test").seq, log.get("s_test").state) == (2, State.RUNNING)


async def test_scans_that_are_active_are_in_memory_after_a_restart_and_finished_ones_are_not(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        for name in ("s_active", "s_finished"):
            log.create(make_scan(name))
            await log.append(name, QUEUED, STARTED, *[found(3)] * 300)
        await log.append("s_finished", ended(State.COMPLETED))
    async with open_log(tmp_path) as log:
        events = log.read_nowait("s_active", 0, 2**30)
        assert [event.seq for event in events or ()] == list(range(1, 303))
        assert log.read_nowait("s_finished", 0) is None
        await log.append("s_active", found(1))
        assert [event.seq for event in log.read_nowait("s_active", events[-1].n) or ()] == [303]  # type: ignore[index]


@pytest.mark.parametrize(
    "content", [b"not a database at all, but some text that is long enough", b"SQLite format 3\0cut"]
)
async def test_a_file_that_is_no_journal_is_refused_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal.db").write_bytes(content)
    with pytest.raises(JournalUnavailable, match="SCANWIRE_STATE_DIR"):
        async with open_log(tmp_path):
            pass


async def test_a_second_writer_of_the_same_journal_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        with pytest.raises(JournalUnavailable, match="Another Scanwire"):
            async with open_log(tmp_path):
                pass
        log.create(make_scan())
        await log.append("s_test", QUEUED)
    async with open_log(tmp_path) as log:
        assert log.get("s_test").seq == 1


async def test_a_journal_of_another_format_is_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "journal.db")
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(JournalUnavailable, match="format 99"):
        async with open_log(tmp_path):
            pass


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["s_a", "s_b", "s_c"]), st.integers(0, 3)), max_size=30), st.integers(0, 40))
def test_a_reader_at_any_cursor_gets_exactly_what_a_list_would_give(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]], after: int
) -> None:
    async def run() -> None:
        async with open_log(tmp_path_factory.mktemp("log")) as log:
            oracle: list[tuple[int, str, int]] = []
            seqs = dict.fromkeys(("s_a", "s_b", "s_c"), 0)
            is_ended = dict.fromkeys(seqs, False)
            for name in seqs:
                log.create(make_scan(name))
                await log.append(name, QUEUED, STARTED)
                oracle += [(len(oracle) + 1, name, 1), (len(oracle) + 2, name, 2)]
                seqs[name] = 2
            for name, kind in steps:
                if not is_ended[name]:
                    part = (found(1), found(2), CANCELLING, ended(State.FAILED))[kind]
                    try:
                        await log.append(name, part)
                    except WrongState:  # a second cancelling
                        continue
                    seqs[name] += 1
                    oracle.append((len(oracle) + 1, name, seqs[name]))
                    is_ended[name] = kind == 3
            for name in seqs:
                got = [(event.n, event.scan, event.seq) for event in await log.read(name, after)]
                assert got == [entry for entry in oracle if entry[0] > after and entry[1] == name]

    asyncio.run(run())


async def test_a_scan_that_is_removed_twice_hides_nothing_that_was_committed_with_it(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        for name in ("s_a", "s_b"):
            log.create(make_scan(name))
        await log.append("s_a", QUEUED, ended(State.LOST))
        await asyncio.gather(log.remove("s_a"), log.remove("s_a"), log.append("s_b", QUEUED))
        assert (log.find("s_a"), log.get("s_b").seq) == (None, 1)


async def test_a_write_without_events_wakes_nobody(tmp_path: Path) -> None:
    async with open_log(tmp_path) as log:
        log.create(make_scan())
        await log.append("s_test", QUEUED, STARTED)
        told: list[str] = []
        log.listen(told.extend)
        await log.append("s_test", checkpoint=Checkpoint(chunk=0))
        assert told == []
        await log.append("s_test", found(1))
        assert told == ["s_test"]
