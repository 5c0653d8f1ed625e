"""The engine side of external scans, without the web and on a clock of the test's own."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.core.errors import AtCapacity, Conflict, InvalidParams, JournalUnavailable
from app.core.scan import Scan, State, digest_rows
from app.core.settings import Settings
from app.engine.admission import Admission, Submission
from app.engine.external import Producers
from app.engine.limits import Limits
from app.engine.reaper import Reaper
from app.engine.runner import Runner
from app.engine.said import MatchesFound, ProgressMade, Said, WorkEnded
from app.engine.sessions import Sessions
from app.log.eventlog import EventLog
from app.log.sqlite import SqliteJournal
from app.market.store import Store, open_store
from tests.serving import GENEROUS

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROW = {"city": "Oslo", "population": 717_710}


class Engine:
    now = 1000.0  # seconds

    def __init__(self, state_dir: Path, store: Store, **bounds: Any) -> None:
        self.settings = Settings(state_dir=state_dir, prices=store.path, **(GENEROUS | bounds))
        self.store = store

    @asynccontextmanager
    async def run(self) -> AsyncIterator["Engine"]:
        def clock() -> float:
            return self.now

        self.log = EventLog(
            SqliteJournal(self.settings.state_dir / "journal.db"),
            now_ms=lambda: int(self.now * 1000),
            memory_bytes=2**20,
        )
        await self.log.open()
        try:
            async with Runner(self.settings, self.log, clock=clock) as runner:
                limits, sessions = Limits(self.settings, clock), Sessions(idle_s=90, max_sessions=100, clock=clock)
                self.producers = Producers(self.settings, self.log, clock=clock)
                self.admission = Admission(
                    self.settings, self.log, runner, self.producers, limits, sessions, self.store, clock=clock
                )
                self.reaper = Reaper(self.settings, self.log, runner, self.producers, self.admission, sessions, limits)
                self.producers.finished = sessions.forget
                await self.admission.take_up()
                yield self
        finally:
            await self.log.close()

    async def submit(self, **others: Any) -> Scan:
        asked = Submission.model_validate({"scanner": "external", **others})
        return (await self.admission.submit("me", asked)).scan

    async def rows(self, scan: Scan) -> list[Any]:
        events = await self.log.read(scan.id, 0)
        return [row for event in events if event.type == "matches" for row in event.load_data()["rows"]]


@pytest.fixture(scope="module")
def store(sample_prices: Path) -> Store:
    return open_store(sample_prices)


@pytest_asyncio.fixture(loop_scope="module")
async def engine(tmp_path: Path, store: Store) -> AsyncIterator[Engine]:
    async with Engine(tmp_path, store, max_external=5).run() as engine:
        yield engine


async def test_a_producer_silent_for_too_long_ends_its_scan_as_lost(engine: Engine) -> None:
    silent, alive = await engine.submit(), await engine.submit()
    await engine.producers.append(silent.id, [MatchesFound(type="matches", rows=[ROW])])
    engine.now += 59
    await engine.producers.append(alive.id, [])
    assert (await engine.reaper.reap())["lost"] == 0
    engine.now += 1
    assert (await engine.reaper.reap())["lost"] == 1
    lost = engine.log.get(silent.id)
    assert lost.state is State.LOST
    assert lost.end is not None
    assert lost.end["error"]["type"] == "urn:scanwire:problem:producer-lost"
    assert lost.end["digest"] == digest_rows([ROW])
    assert lost.end["elapsed_s"] == 60
    assert engine.log.get(alive.id).state is State.RUNNING
    assert engine.reaper.reaped["lost"] == 1
    engine.now += 60
    await engine.reaper.reap()
    assert engine.log.get(alive.id).state is State.LOST
    assert engine.producers.active == 0


async def test_a_refused_request_is_no_sign_of_life(engine: Engine) -> None:
    scan = await engine.submit(params={"total": 1})
    engine.now += 59
    with pytest.raises(InvalidParams):
        await engine.producers.append(scan.id, [ProgressMade(type="progress", done=2)])
    engine.now += 1
    assert (await engine.reaper.reap())["lost"] == 1


async def test_while_the_journal_cannot_be_written_a_post_is_refused_and_yet_a_sign_of_life(engine: Engine) -> None:
    scan = await engine.submit()
    engine.now += 59
    engine.log._journal.fault = "The journal cannot be written (disk is full)."
    with pytest.raises(JournalUnavailable) as refused:
        await engine.producers.append(scan.id, [MatchesFound(type="matches", rows=[ROW])], 1)
    assert refused.value.retry_after_s == 10
    engine.log._journal.fault = None
    engine.now += 59
    assert (await engine.reaper.reap())["lost"] == 0
    await engine.producers.append(scan.id, [MatchesFound(type="matches", rows=[ROW])], 1)
    assert await engine.rows(engine.log.get(scan.id)) == [ROW]


async def test_an_end_whose_request_did_not_wait_for_the_journal_is_an_end(engine: Engine) -> None:
    scan = await engine.submit()
    ending = engine.producers.append(scan.id, [WorkEnded(type="end", state="completed")], 1)
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending
    # The same again is acknowledged when it is committed, and not before.
    assert (await engine.producers.append(scan.id, [], 1)).state is State.COMPLETED
    await engine.reaper.reap()
    assert engine.producers.active == 0


async def test_after_a_restart_silence_counts_from_the_restart(tmp_path: Path, store: Store) -> None:
    engine = Engine(tmp_path, store)
    async with engine.run():
        scan = await engine.submit()
    engine.now += 1000
    async with engine.run():
        engine.now += 59
        assert (await engine.reaper.reap())["lost"] == 0
        engine.now += 1
        assert (await engine.reaper.reap())["lost"] == 1
        assert engine.log.get(scan.id).state is State.LOST


async def test_one_that_nobody_watches_is_cancelled_when_it_asked_for_that(engine: Engine) -> None:
    scan = await engine.submit(cancel_when_unwatched_s=10)
    engine.now += 10
    assert (await engine.reaper.reap())["unwatched"] == 1
    assert engine.log.get(scan.id).state is State.CANCELLED
    assert engine.producers.active == 0
    assert (await engine.reaper.reap())["unwatched"] == 0


async def test_there_is_a_bound_on_external_scans_in_all(engine: Engine) -> None:
    scans = [await engine.submit() for _ in range(5)]
    with pytest.raises(AtCapacity):
        await engine.submit()
    assert engine.producers.active == 5
    await engine.admission.cancel("me", scans[0].id)
    await engine.submit()


async def test_rate_and_eta_come_from_work_and_time(engine: Engine) -> None:
    scan = await engine.submit(params={"total": 100})
    engine.now += 10
    await engine.producers.append(scan.id, [ProgressMade(type="progress", done=20)])
    told = engine.log.get_progress(scan.id)
    assert told is not None
    assert told.rate == 2.0
    assert told.eta_s is not None
    assert told.eta_s[0] < 40 < told.eta_s[1]


async def test_work_done_before_a_restart_says_nothing_of_the_rate_after_it(tmp_path: Path, store: Store) -> None:
    engine = Engine(tmp_path, store)
    async with engine.run():
        scan = await engine.submit(params={"total": 100})
        engine.now += 1
        await engine.producers.append(scan.id, [ProgressMade(type="progress", done=50)], 1)
    engine.now += 1000
    async with engine.run():
        engine.now += 10
        await engine.producers.append(scan.id, [ProgressMade(type="progress", done=60)], 2)
        told = engine.log.get_progress(scan.id)
        assert told is not None
        assert told.rate == 1.0
        assert told.eta_s is not None
        assert told.eta_s[0] < 40 < told.eta_s[1]


async def test_rows_that_were_only_counted_are_not_forgotten_by_a_restart(tmp_path: Path, store: Store) -> None:
    engine = Engine(tmp_path, store, max_matches=1)
    async with engine.run():
        scan = await engine.submit()
        await engine.producers.append(scan.id, [MatchesFound(type="matches", rows=[ROW])])
        await engine.producers.append(scan.id, [MatchesFound(type="matches", rows=[ROW])])
    async with engine.run():
        ended = await engine.producers.append(scan.id, [WorkEnded(type="end", state="completed")])
        assert ended.end is not None
        assert (ended.end["matches"], ended.end["truncated"]) == (1, True)


async def test_a_row_may_have_as_many_bytes_as_the_bound_says(tmp_path: Path, store: Store) -> None:
    async with Engine(tmp_path, store, max_row_bytes=20).run() as engine:
        scan = await engine.submit()
        await engine.producers.append(scan.id, [MatchesFound(type="matches", rows=[{"a": "x" * 12}])])
        with pytest.raises(InvalidParams, match=r"events\.0\.rows\.0: has more than 20 bytes"):
            await engine.producers.append(scan.id, [MatchesFound(type="matches", rows=[{"a": "x" * 13}])])
        assert await engine.rows(engine.log.get(scan.id)) == [{"a": "x" * 12}]


ROWS = st.dictionaries(
    st.text(max_size=5),
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    min_size=1,
    max_size=3,
)  # fmt: skip
SAID: st.SearchStrategy[Said] = st.one_of(
    st.builds(ProgressMade, type=st.just("progress"), done=st.integers(0, 12), total=st.none() | st.integers(0, 12)),
    st.builds(MatchesFound, type=st.just("matches"), rows=st.lists(ROWS, max_size=4)),
    st.builds(WorkEnded, type=st.just("end"), state=st.sampled_from(["completed", "cancelled"])),
)
REQUESTS = st.lists(st.tuples(st.lists(SAID, max_size=4), st.none() | st.integers(-1, 1)), max_size=8)


class Oracle:
    """What must come of requests, told by lists."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.done, self.total, self.number = 0, 10, 0
        self.ended: str | None = None

    def take(self, said: list[Said], number: int | None) -> bool:
        """Whether the request is accepted."""
        if number is not None and number <= self.number:
            return True
        if self.ended is not None or number not in (None, self.number + 1):
            return False
        rows, done, total, ended = list(self.rows), self.done, self.total, None
        for one in said:
            if ended is not None:
                return False
            if isinstance(one, MatchesFound):
                rows += one.rows
            elif isinstance(one, WorkEnded):
                ended = one.state
            else:
                total = total if one.total is None else one.total
                if not done <= one.done <= total:
                    return False
                done = one.done
        self.rows, self.done, self.total, self.ended = rows, done, total, ended
        self.number = number or self.number
        return True


async def test_whatever_comes_in_the_log_is_the_accepted_requests_in_order(tmp_path: Path, store: Store) -> None:
    # The journal is opened once: each example is a scan of its own, and half of them are read back after a restart.
    engine = Engine(tmp_path, store)
    expected: dict[str, Oracle] = {}
    loop = asyncio.get_running_loop()

    async def play(requests: list[tuple[list[Said], int | None]]) -> None:
        scan, oracle = await engine.submit(params={"total": 10}), Oracle()
        for said, step in requests:
            number = None if step is None else max(1, oracle.number + 1 + step)
            try:
                await engine.producers.append(scan.id, said, number)
                is_accepted = True
            except (Conflict, InvalidParams):
                is_accepted = False
            assert is_accepted == oracle.take(said, number)
            expected[scan.id] = oracle
            await compare(scan.id, oracle)
        if oracle.ended is None:
            await engine.producers.cancel(scan.id, "the test")

    async def compare(scan_id: str, oracle: Oracle) -> None:
        scan = engine.log.get(scan_id)
        assert scan.producer is not None
        assert await engine.rows(scan) == oracle.rows
        assert (scan.matches, scan.producer.seq) == (len(oracle.rows), oracle.number)
        if oracle.ended is not None:
            assert scan.end is not None
            assert (scan.end["state"], scan.end["digest"]) == (oracle.ended, digest_rows(oracle.rows))
            assert scan.end["last_seq"] == scan.seq

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(REQUESTS)
    def check(requests: list[tuple[list[Said], int | None]]) -> None:
        asyncio.run_coroutine_threadsafe(play(requests), loop).result(20)

    async with engine.run():
        await asyncio.to_thread(check)
    async with engine.run():
        for scan_id, oracle in expected.items():
            await compare(scan_id, oracle)
        assert engine.producers.active == 0
