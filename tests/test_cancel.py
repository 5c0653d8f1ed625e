"""Rules of ending early: whenever a cancel comes, the scan ends once, its matches are kept, and its slot is free."""

import asyncio
from pathlib import Path

import pytest

from app.core.errors import Forbidden
from app.core.event import EventType
from app.core.scan import Scan, State, digest_rows
from tests.conftest import Gate, until
from tests.test_engine import Engine, running

pytestmark = pytest.mark.usefixtures("trial_scanners")


async def test_cancel_kills_the_work_keeps_the_matches_and_gives_the_slot_back(
    tmp_path: Path, sample_prices: Path, gate: Gate
) -> None:
    async with running(tmp_path, sample_prices, max_running=1) as engine:
        scan = await engine.submit(gate=str(gate.path), only_symbol="IBM")
        waiting = await engine.submit("gap-up")
        await engine.until(lambda: engine.log.get(scan.id).matches == 3)
        await engine.admission.cancel("me", scan.id)
        scan = await engine.finish(scan)
        types = [event.type for event in await engine.events(scan)]
        assert types[-2:] == [EventType.CANCELLING, EventType.END]
        assert (scan.state, scan.matches, len(await engine.rows(scan))) == (State.CANCELLED, 3, 3)
        assert (await engine.finish(waiting)).state is State.COMPLETED
        assert engine.is_at_rest()


async def test_cancelling_a_queued_scan_moves_the_others_up(tmp_path: Path, sample_prices: Path, gate: Gate) -> None:
    async with running(tmp_path, sample_prices, max_running=1) as engine:
        scans = [await engine.submit(gate=str(gate.path)) for _ in range(3)]
        assert (await engine.admission.cancel("me", scans[1].id)).state is State.CANCELLED
        await engine.until(lambda: engine.log.get(scans[2].id).position == 1)
        gate.open()
        await engine.finish(scans[2])


async def test_cancelling_a_finished_scan_answers_its_final_state(tmp_path: Path, sample_prices: Path) -> None:
    async with running(tmp_path, sample_prices) as engine:
        scan = await engine.finish(await engine.submit("gap-up"))
        assert await engine.admission.cancel("me", scan.id) == scan
        assert (await engine.events(scan))[-1].type is EventType.END


async def test_cancelling_twice_is_cancelling_once(tmp_path: Path, sample_prices: Path, gate: Gate) -> None:
    async with running(tmp_path, sample_prices) as engine:
        scan = await engine.submit(gate=str(gate.path))
        await engine.until_running(scan)
        await asyncio.gather(*(engine.admission.cancel("me", scan.id) for _ in range(3)))
        await engine.finish(scan)
        assert [event.type for event in await engine.events(scan)].count(EventType.CANCELLING) == 1


async def test_only_its_client_may_cancel_a_scan(tmp_path: Path, sample_prices: Path, gate: Gate) -> None:
    async with running(tmp_path, sample_prices) as engine:
        scan = await engine.submit(gate=str(gate.path))
        with pytest.raises(Forbidden):
            await engine.admission.cancel("you", scan.id)
        gate.open()
        assert (await engine.finish(scan)).state is State.COMPLETED


async def test_a_scan_cancelled_before_its_first_step_gives_its_slot_back(
    tmp_path: Path, sample_prices: Path, gate: Gate
) -> None:
    """A task that is cancelled before it began runs none of its code, nor what would have given the slot back."""
    async with running(tmp_path, sample_prices, max_running=1) as engine:
        first, second = await engine.submit(gate=str(gate.path)), await engine.submit(gate=str(gate.path))
        await engine.until_running(first)
        fill_slots = engine.runner._fill_slots
        cancelling: list[asyncio.Task[Scan]] = []

        def fill_slots_and_cancel() -> None:
            if engine.runner.statistics()[:2] == (0, 1):
                # A task made before the scan's own has its first step before it.
                cancelling.append(asyncio.create_task(engine.runner.cancel(second.id, "someone quick")))
            fill_slots()

        engine.runner._fill_slots = fill_slots_and_cancel  # type: ignore[method-assign]
        await engine.runner.cancel(first.id, "me")
        second = await engine.finish(second)
        assert len(await asyncio.gather(*cancelling)) == 1
        assert [event.type for event in await engine.events(second)][-1] is EventType.END
        assert second.state is State.CANCELLED
        assert engine.is_at_rest()
        assert (await engine.finish(await engine.submit("gap-up"))).state is State.COMPLETED


async def test_a_cancel_that_its_caller_gave_up_on_is_done_all_the_same(
    tmp_path: Path, sample_prices: Path, gate: Gate
) -> None:
    async with running(tmp_path, sample_prices, max_running=1) as engine:
        scan = await engine.submit(gate=str(gate.path))
        await engine.until_running(scan)
        cancelling = asyncio.create_task(engine.runner.cancel(scan.id, "someone impatient"))
        await asyncio.sleep(0)
        cancelling.cancel()
        await asyncio.gather(cancelling, return_exceptions=True)
        await engine.runner.cancel(scan.id, "the same again")
        assert (await engine.finish(scan)).state is State.CANCELLED
        assert engine.is_at_rest()


# After a restart


async def check_end(engine: Engine, scan: Scan) -> None:
    """The end says the count and the digest of the rows that are there."""
    rows = await engine.rows(scan)
    assert scan.end is not None
    assert (scan.end["matches"], scan.matches) == (len(rows), len(rows))
    assert scan.end["digest"] == digest_rows(rows)
    assert len(rows) > 0


async def test_a_scan_cancelled_in_the_queue_after_a_restart_says_what_its_first_run_found(
    tmp_path: Path, sample_prices: Path, gate: Gate
) -> None:
    async with running(tmp_path, sample_prices, max_running=2, workers=3) as engine:
        await engine.submit(gate=str(gate.path), only_symbol="YHOO")
        engine.now += 1
        scan = await engine.submit(gate=str(gate.path), only_symbol="IBM")
        await engine.until(lambda: engine.log.get(scan.id).matches >= 2)
    async with running(tmp_path, sample_prices, max_running=1, workers=1) as engine:
        await engine.until(lambda: engine.log.get(scan.id).state is State.QUEUED)
        scan = await engine.runner.cancel(scan.id, "me")
        assert scan.state is State.CANCELLED
        await check_end(engine, scan)


async def test_a_scan_lost_by_changed_prices_says_what_its_first_run_found(
    tmp_path: Path, sample_prices: Path, synthetic_prices: Path, gate: Gate
) -> None:
    async with running(tmp_path, sample_prices) as engine:
        scan = await engine.submit(gate=str(gate.path), only_symbol="IBM")
        await engine.until(lambda: engine.log.get(scan.id).matches >= 2)
    async with running(tmp_path, synthetic_prices) as engine:
        scan = engine.log.get(scan.id)
        assert scan.state is State.LOST
        await check_end(engine, scan)


async def test_a_scan_cancelled_while_its_second_run_takes_up_the_first_ends_with_the_right_count(
    tmp_path: Path, sample_prices: Path, gate: Gate
) -> None:
    async with running(tmp_path, sample_prices, max_running=1) as engine:
        scan = await engine.submit(gate=str(gate.path), only_symbol="IBM")
        await engine.until(lambda: engine.log.get(scan.id).matches >= 2)
    async with running(tmp_path, sample_prices, max_running=1) as engine:
        await until(lambda: scan.id in engine.runner._running)
        await engine.runner.cancel(scan.id, "me")
        scan = await engine.finish(scan)
        assert scan.state is State.CANCELLED
        await check_end(engine, scan)
        assert engine.is_at_rest()
