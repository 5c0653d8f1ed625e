"""Rules of running scans: slots, queue, turns, crashes, deadline, restart, reaping."""

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from app.core.errors import (
    AtCapacity,
    Draining,
    InvalidParams,
    JournalUnavailable,
    RateLimited,
)
from app.core.event import EventType
from app.core.scan import Scan, State, digest_rows
from app.core.settings import Settings
from app.engine.admission import Admission, Submission
from app.engine.external import Producers
from app.engine.limits import Limits
from app.engine.reaper import Reaper
from app.engine.runner import Runner
from app.engine.sessions import Sessions
from app.log.eventlog import EventLog
from app.log.sqlite import SqliteJournal
from app.market.store import open_store
from tests.conftest import Gate
from tests.serving import GENEROUS

pytestmark = pytest.mark.usefixtures("trial_scanners")


class Engine:
    """The engine without the web: log, runner, admission, reaper, on a clock of the test's own."""

    now = 1000.0  # seconds; the runner's own clock stays real, since worker processes are

    def __init__(self, state_dir: Path, prices: Path, **settings: Any) -> None:
        self.settings = Settings(
            state_dir=state_dir, prices=prices, **(GENEROUS | {"chunk_rows": 1, "workers": 2} | settings)
        )
        self.log = EventLog(
            SqliteJournal(state_dir / "journal.db"), now_ms=lambda: int(self.now * 1000), memory_bytes=2**20
        )
        self.limits = Limits(self.settings, clock=lambda: self.now)
        self.sessions = Sessions(idle_s=90, max_sessions=100, clock=lambda: self.now)
        self.store = open_store(prices)

    @asynccontextmanager
    async def run(self) -> AsyncIterator["Engine"]:
        loop = asyncio.get_running_loop()
        await self.log.open()
        try:
            async with Runner(self.settings, self.log, clock=loop.time) as self.runner:
                self.producers = Producers(self.settings, self.log, clock=lambda: self.now)
                self.admission = Admission(
                    self.settings,
                    self.log,
                    self.runner,
                    self.producers,
                    self.limits,
                    self.sessions,
                    self.store,
                    clock=lambda: self.now,
                )
                self.reaper = Reaper(
                    self.settings,
                    self.log,
                    self.runner,
                    self.producers,
                    self.admission,
                    self.sessions,
                    self.limits,
                )
                await self.admission.take_up()
                yield self
        finally:
            await self.log.close()

    async def submit(
        self, scanner: str = "trial-gated", client: str = "me", reuse: str = "never", **params: Any
    ) -> Scan:
        key = params.pop("key", None)
        asked = Submission.model_validate({"scanner": scanner, "params": params, "reuse": reuse})
        return (await self.admission.submit(client, asked, key)).scan

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Waits for what the log tells."""
        changed = asyncio.Event()
        self.log.listen(lambda scan_ids: changed.set())
        async with asyncio.timeout(60):
            while not is_so():
                changed.clear()
                await changed.wait()

    async def finish(self, scan: Scan) -> Scan:
        await self.until(lambda: self.log.get(scan.id).state.is_terminal)
        return self.log.get(scan.id)

    async def until_running(self, *scans: Scan) -> None:
        await self.until(lambda: all(self.log.get(scan.id).state is State.RUNNING for scan in scans))

    async def events(self, scan: Scan) -> list[Any]:
        events: list[Any] = []
        while page := await self.log.read(scan.id, events[-1].n if events else 0):
            events += page
        return events

    async def rows(self, scan: Scan) -> list[Any]:
        return [
            row for event in await self.events(scan) if event.type == "matches" for row in event.load_data()["rows"]
        ]

    def is_at_rest(self) -> bool:
        return self.runner.active == 0 and self.runner.statistics().workers_busy == 0


@asynccontextmanager
async def running(state_dir: Path, prices: Path, **settings: Any) -> AsyncIterator[Engine]:
    async with Engine(state_dir, prices, **settings).run() as engine:
        yield engine


async def test_a_scan_runs_from_queued_to_one_end(tmp_path: Path, sample_prices: Path) -> None:
    async with running(tmp_path, sample_prices) as engine:
        scan = await engine.finish(await engine.submit("gap-up", preset="relaxed"))
        events = await engine.events(scan)
        types = [event.type for event in events]
        assert types[:2] == [EventType.QUEUED, EventType.STARTED]
        assert types.count(EventType.END) == 1
        assert types[-1] is EventType.END
        end, rows = events[-1].load_data(), await engine.rows(scan)
        assert end["state"] == "completed"
        assert end["last_seq"] == events[-1].seq == len(events)
        assert end["matches"] == len(rows) == scan.matches > 100
        assert end["digest"] == digest_rows(rows)
        assert [(row["symbol"], row["date"]) for row in rows] == sorted((row["symbol"], row["date"]) for row in rows)
        assert engine.is_at_rest()


async def test_progress_comes_from_chunks_and_never_runs_backwards(tmp_path: Path, sample_prices: Path) -> None:
    async with running(tmp_path, sample_prices) as engine:
        seen: list[tuple[int, int]] = []

        def note(scan_ids: Sequence[str]) -> None:
            progress = engine.log.get_progress(scan_ids[0])
            if progress is not None:
                seen.append((progress.done, progress.matches))

        engine.log.listen(note)
        await engine.finish(await engine.submit("trial-everything"))
        assert seen == sorted(seen)
        assert {done for done, _ in seen} == {1, 2, 3, 4, 5}


async def test_never_more_scans_run_than_there_are_slots_and_the_others_wait_in_order(
    tmp_path: Path, sample_prices: Path, gate: Gate
) -> None:
    async with running(tmp_path, sample_prices, max_running=2) as engine:
        scans = [await engine.submit(gate=str(gate.path)) for _ in range(5)]
        await engine.until_running(*scans[:2])
        await engine.until(lambda: [engine.log.get(scan.id).position for scan in scans[2:]] == [1, 2, 3])
        assert engine.runner.statistics()[:2] == (2, 3)
        assert all(engine.log.get(scan.id).eta_s is not None for scan in scans[2:])
        gate.open()
        for scan in scans:
            assert (await engine.finish(scan)).state is State.COMPLETED
        starts = [engine.log.get(scan.id).n for scan in scans]
        assert len(set(starts)) == 5
        assert engine.is_at_rest()


async def test_chunks_of_concurrent_scans_take_turns(tmp_path: Path, synthetic_prices: Path) -> None:
    async with running(tmp_path, synthetic_prices, workers=1) as engine:
        symbols = [f"{entry.symbol}" for entry in engine.store.symbols[:20]]
        first = await engine.submit("trial-everything", symbols=symbols)
        second = await engine.submit("trial-everything", symbols=symbols)
        await engine.finish(first)
        # Had the first one taken all turns, the second would not have got to its second chunk yet.
        assert engine.log.get(second.id).matches > 0
        await engine.finish(second)


async def test_a_full_queue_refuses_and_says_when_to_come_back(tmp_path: Path, sample_prices: Path, gate: Gate) -> None:
    async with running(tmp_path, sample_prices, max_running=1, max_queued=0, submit_per_min=2) as engine:
        scan = await engine.submit(gate=str(gate.path))
        with pytest.raises(AtCapacity) as refusal:
            await engine.submit()
        assert refusal.value.retry_after_s is not None
        assert refusal.value.extra["limit"] == "max_queued"
        gate.open()
        await engine.finish(scan)
        # The refused one was not charged: two a minute are two.
        assert (await engine.finish(await engine.submit())).state is State.COMPLETED


async def test_one_client_cannot_take_every_place(tmp_path: Path, sample_prices: Path, gate: Gate) -> None:
    async with running(tmp_path, sample_prices, max_active_per_client=2) as engine:
        scans = [await engine.submit(gate=str(gate.path)) for _ in range(2)]
        with pytest.raises(RateLimited):
            await engine.submit()
        scans.append(await engine.submit(client="you"))
        gate.open()
        for scan in scans:
            await engine.finish(scan)


async def test_submitting_is_charged_and_joining_is_not(tmp_path: Path, sample_prices: Path) -> None:
    async with running(tmp_path, sample_prices, submit_per_min=2) as engine:
        scan = await engine.submit("gap-up", reuse="auto")
        for _ in range(5):
            assert (await engine.submit("gap-up", reuse="auto")).id == scan.id
        await engine.submit("gap-up")
        with pytest.raises(RateLimited) as refusal:
            await engine.submit("gap-up")
        engine.now += refusal.value.retry_after_s or 0
        await engine.submit("gap-up")


async def test_heavy_scans_have_a_bucket_of_their_own_and_a_refusal_gives_the_submit_token_back(
    tmp_path: Path, sample_prices: Path
) -> None:
    async with running(tmp_path, sample_prices, heavy_rows=10_000, submit_heavy_per_hour=1, submit_per_min=2) as engine:
        await engine.submit("gap-up")
        with pytest.raises(RateLimited) as refusal:
            await engine.submit("gap-up")
        assert refusal.value.extra["limit"] == "submit-heavy"
        await engine.submit("gap-up", symbols=["AAPL"])


async def test_a_symbol_that_nothing_looks_like_is_answered_with_those_there_are(
    tmp_path: Path, sample_prices: Path, synthetic_prices: Path
) -> None:
    async with running(tmp_path / "few", sample_prices) as engine:
        with pytest.raises(InvalidParams, match=r"ZZZZ: not in .*; there are 5: AAPL, FB, GOOG, IBM, MSFT$"):
            await engine.submit("gap-up", symbols=["ZZZZ"])
        with pytest.raises(InvalidParams, match="did you mean AAPL"):
            await engine.submit("gap-up", symbols=["AAPPL"])
    async with running(tmp_path / "many", synthetic_prices) as engine:
        with pytest.raises(InvalidParams, match=r"there are 100, such as SYN00000, SYN00001, .*, SYN00007$"):
            await engine.submit("gap-up", symbols=["ZZZZ"])


async def test_a_scan_past_its_deadline_fails_and_gives_its_slot_back(
    tmp_path: Path, sample_prices: Path, gate: Gate
) -> None:
    async with running(tmp_path, sample_prices, max_running=1, scan_deadline_s=0.5) as engine:
        scan = await engine.finish(await engine.submit(gate=str(gate.path)))
        assert scan.state is State.FAILED
        assert scan.end is not None
        assert scan.end["error"]["type"].endswith("deadline-exceeded")
        assert engine.is_at_rest()


async def test_a_chunk_whose_worker_dies_is_retried_once_in_a_fresh_one(tmp_path: Path, sample_prices: Path) -> None:
    async with running(tmp_path, sample_prices) as engine:
        marker = str(tmp_path / "crashed")
        scan = await engine.finish(await engine.submit("trial-crashing", marker=marker, only_symbol="IBM"))
        assert (scan.state, scan.matches) == (State.COMPLETED, 5)
        assert engine.runner.statistics().worker_crashes == 1


async def test_a_chunk_that_kills_its_worker_twice_fails_its_scan_alone(tmp_path: Path, sample_prices: Path) -> None:
    async with running(tmp_path, sample_prices) as engine:
        scan = await engine.submit("trial-crashing", only_symbol="IBM")
        other = await engine.submit("gap-up", preset="relaxed")
        scan, other = await engine.finish(scan), await engine.finish(other)
        assert scan.end is not None
        assert (scan.state, scan.end["error"]["type"]) == (State.FAILED, "urn:scanwire:problem:worker-crashed")
        assert other.state is State.COMPLETED
        assert engine.is_at_rest()


async def test_a_scanner_that_raises_fails_its_scan_and_shows_no_inside_of_the_server(
    tmp_path: Path, sample_prices: Path
) -> None:
    async with running(tmp_path, sample_prices) as engine:
        scan = await engine.finish(await engine.submit("trial-raising"))
        assert scan.end is not None
        assert scan.end["error"]["type"].endswith("scanner-error")
        assert "secret" not in str(scan.end)


async def test_matches_over_the_bound_are_counted_and_not_kept(tmp_path: Path, sample_prices: Path) -> None:
    async with running(tmp_path, sample_prices, max_matches=3000) as engine:
        scan = await engine.finish(await engine.submit("trial-everything"))
        rows = await engine.rows(scan)
        assert scan.end is not None
        assert (scan.matches, len(rows), scan.end["truncated"]) == (3000, 3000, True)
        assert scan.end["digest"] == digest_rows(rows)


async def test_a_restart_goes_on_from_the_checkpoints_and_loses_and_doubles_nothing(
    tmp_path: Path, sample_prices: Path, gate: Gate
) -> None:
    async with running(tmp_path / "whole", sample_prices) as engine:
        undisturbed = await engine.finish(await engine.submit())
        whole_rows = await engine.rows(undisturbed)
    async with running(tmp_path, sample_prices, max_running=1) as engine:
        scan = await engine.submit(gate=str(gate.path), only_symbol="IBM")
        waiting = await engine.submit("gap-up")
        await engine.until(lambda: engine.log.get(scan.id).matches == 3)
        epoch, before = engine.log.epoch, [event.json for event in await engine.events(scan)]
    gate.open()
    async with running(tmp_path, sample_prices, max_running=1) as engine:
        scan = await engine.finish(scan)
        assert (engine.log.epoch, scan.attempt, scan.state) == (epoch, 2, State.COMPLETED)
        after = [event.json for event in await engine.events(scan)]
        assert after[: len(before)] == before
        assert await engine.rows(scan) == whole_rows
        assert scan.end is not None
        assert undisturbed.end is not None
        assert scan.end["digest"] == undisturbed.end["digest"]
        assert (await engine.finish(waiting)).state is State.COMPLETED


async def test_the_time_of_a_scan_counts_over_a_restart_and_says_nothing_of_the_rate(
    tmp_path: Path, sample_prices: Path, gate: Gate
) -> None:
    async with running(tmp_path, sample_prices) as engine:
        scan = await engine.submit(gate=str(gate.path))
        await engine.until_running(scan)
    gate.open()
    restarted = Engine(tmp_path, sample_prices)
    restarted.now += 60
    async with restarted.run() as engine:
        scan = await engine.finish(scan)
        assert scan.end is not None
        assert (scan.attempt, scan.end["elapsed_s"], engine.runner.rows_per_s) == (2, 60.0, None)
        fresh = await engine.finish(await engine.submit("gap-up"))
        assert fresh.end is not None
        assert 0 < fresh.end["elapsed_s"] < 60
        assert engine.runner.rows_per_s is not None


async def test_a_scan_whose_prices_changed_over_a_restart_is_lost_with_the_reason(
    tmp_path: Path, sample_prices: Path, synthetic_prices: Path, gate: Gate
) -> None:
    async with running(tmp_path, sample_prices) as engine:
        scan = await engine.submit(gate=str(gate.path))
        await engine.until_running(scan)
    async with running(tmp_path, synthetic_prices) as engine:
        scan = engine.log.get(scan.id)
        assert scan.state is State.LOST
        assert scan.end is not None
        assert scan.end["error"]["type"].endswith("prices-changed")


async def test_a_draining_or_faulty_service_takes_no_new_scan(tmp_path: Path, sample_prices: Path) -> None:
    async with running(tmp_path, sample_prices) as engine:
        engine.admission.is_draining = True
        with pytest.raises(Draining):
            await engine.submit()
        engine.admission.is_draining = False
        engine.log._journal.fault = "The journal cannot be written (disk full)."
        with pytest.raises(JournalUnavailable, match="disk full"):
            await engine.submit()
        engine.log._journal.fault = None
        assert engine.is_at_rest()
        await engine.finish(await engine.submit())


async def test_a_dead_idle_worker_is_replaced_without_anyone_noticing(tmp_path: Path, sample_prices: Path) -> None:
    async with running(tmp_path, sample_prices, workers=1) as engine:
        pid = await engine.runner.pool.call(os.getpid)
        os.kill(pid, signal.SIGKILL)
        assert (await engine.finish(await engine.submit("gap-up"))).state is State.COMPLETED


# The reaper


async def test_finished_scans_are_trimmed_after_their_retention_and_removed_later(
    tmp_path: Path, sample_prices: Path
) -> None:
    async with running(tmp_path, sample_prices, retention_s=60, tombstone_s=60) as engine:
        scan = await engine.finish(await engine.submit("gap-up", preset="relaxed"))
        engine.now += 59
        assert "trimmed" not in await engine.reaper.reap()
        engine.now += 1
        assert (await engine.reaper.reap())["trimmed"] == 1
        assert [event.type for event in await engine.events(scan)] == [EventType.END]
        engine.now += 60
        assert (await engine.reaper.reap())["removed"] == 1
        assert engine.log.find(scan.id) is None
        assert engine.reaper.reaped == {"trimmed": 1, "removed": 1, "buckets": 1}


async def test_no_more_finished_scans_are_kept_than_allowed_and_the_oldest_go(
    tmp_path: Path, sample_prices: Path
) -> None:
    async with running(tmp_path, sample_prices, max_scans_kept=2) as engine:
        scans = [await engine.finish(await engine.submit("gap-up")) for _ in range(3)]
        assert (await engine.reaper.reap())["removed"] == 1
        assert [engine.log.find(scan.id) is None for scan in scans] == [True, False, False]


async def test_a_queued_scan_that_nobody_watches_is_cancelled_and_a_watched_one_is_not(
    tmp_path: Path, sample_prices: Path, gate: Gate
) -> None:
    async with running(tmp_path, sample_prices, max_running=1, queued_unwatched_s=30) as engine:
        await engine.until_running(await engine.submit(gate=str(gate.path)))
        unwatched, watched = await engine.submit(), await engine.submit()
        with engine.sessions.stream("me", [watched.id]):
            engine.now += 31
            assert (await engine.reaper.reap())["unwatched"] == 1
            assert engine.log.get(unwatched.id).state is State.CANCELLED
            assert engine.log.get(watched.id).state is State.QUEUED
        engine.now += 29
        assert "unwatched" not in await engine.reaper.reap()
        engine.now += 2
        assert (await engine.reaper.reap())["unwatched"] == 1


async def test_a_running_scan_is_cancelled_when_unwatched_only_if_it_asked_for_it(
    tmp_path: Path, sample_prices: Path, gate: Gate
) -> None:
    async with running(tmp_path, sample_prices) as engine:
        plain = await engine.submit(gate=str(gate.path))
        asked = Submission(
            scanner="trial-gated", params={"gate": str(gate.path)}, reuse="never", cancel_when_unwatched_s=10
        )
        picky = (await engine.admission.submit("me", asked)).scan
        await engine.until_running(plain, picky)
        with engine.sessions.stream("me", [picky.id]):
            engine.now += 100
            assert "unwatched" not in await engine.reaper.reap()
        engine.now += 10
        await engine.reaper.reap()
        assert (await engine.finish(picky)).state is State.CANCELLED
        assert engine.log.get(plain.id).state is State.RUNNING


async def test_sessions_buckets_and_keys_are_given_back(tmp_path: Path, sample_prices: Path) -> None:
    async with running(tmp_path, sample_prices, idempotency_s=100, retention_s=1000) as engine:
        scan = await engine.finish(await engine.submit("gap-up", key="k1"))
        engine.sessions.poll("me", scan.id, 1, None)
        engine.limits.charge("read", "me")
        assert engine.sessions.statistics().sessions == 1
        engine.now += 101
        assert await engine.reaper.reap() == {"sessions": 1, "buckets": 2, "idempotency_keys": 1}
        assert engine.sessions.statistics() == (0, 0)
        assert engine.limits.statistics().buckets == 0


async def test_poll_hints_grow_while_nothing_changes_and_start_anew_when_something_does(
    tmp_path: Path, sample_prices: Path
) -> None:
    sessions = Sessions(idle_s=90, max_sessions=2, clock=lambda: 0.0)
    hints = [sessions.poll("me", "s_a", 1, None) for _ in range(5)]
    assert all(later >= earlier * 1.1 for earlier, later in itertools.pairwise(hints))
    assert sessions.poll("me", "s_a", 2, None) == hints[0]
    assert sessions.poll("you", "s_a", 1, None) != hints[0]  # jitter belongs to the client
    assert sessions.poll("they", "s_a", 1, None) == sessions.poll("they", "s_a", 1, None)  # past max_sessions
    assert sessions.statistics().sessions == 2
