"""Rules of worker processes: one that goes wrong ends nothing else, none is left over, and rows come ready to send."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from app.core.errors import WorkerCrashed
from app.core.scan import Rows, State, digest_rows
from app.engine import runner as runner_module
from app.engine.worker import ROWS_PER_EVENT, ChunkResult, warm_up
from app.market.sample import make_synthetic
from tests.conftest import Gate, require
from tests.test_engine import running

pytestmark = pytest.mark.usefixtures("trial_scanners")


@pytest.mark.parametrize(("interrupts", "problem"), [(False, "scanner-error"), (True, "worker-crashed")])
async def test_a_scanner_that_leaves_the_program_fails_its_scan_alone(
    tmp_path: Path, sample_prices: Path, interrupts: bool, problem: str
) -> None:
    async with running(tmp_path, sample_prices) as engine:
        scan = await engine.submit("trial-leaving", interrupts=interrupts)
        other = await engine.submit("gap-up")
        scan, other = await engine.finish(scan), await engine.finish(other)
        assert scan.state is State.FAILED
        assert scan.end is not None
        assert scan.end["error"]["type"].endswith(problem)
        assert other.state is State.COMPLETED
        assert engine.is_at_rest()


async def test_a_scanner_that_raises_what_ends_tasks_ends_its_scan_and_no_task(
    tmp_path: Path, sample_prices: Path
) -> None:
    """Sent on into the event loop, it ended the scan's task, and the scan had no end."""
    async with running(tmp_path, sample_prices) as engine:
        scan = await engine.finish(await engine.submit("trial-crashing", how="cancelled"))
        assert scan.end is not None
        assert scan.end["error"]["type"].endswith("worker-crashed")
        assert engine.is_at_rest()


async def test_what_a_scanner_prints_stays_out_of_the_pipe(tmp_path: Path, sample_prices: Path) -> None:
    async with running(tmp_path, sample_prices, workers=1) as engine:
        assert await engine.runner.pool.call(os.write, 1, b"noise") == 5
        assert await engine.runner.pool.call(print, "noise", True) is None
        assert await engine.runner.pool.call(abs, -1) == 1


async def test_a_worker_that_is_left_counts_as_dead_and_the_next_call_is_served(
    tmp_path: Path, sample_prices: Path
) -> None:
    async with running(tmp_path, sample_prices, workers=1) as engine:
        with pytest.raises(WorkerCrashed, match="ended by itself with exit code 3"):
            await engine.runner.pool.call(sys.exit, 3)
        assert await engine.runner.pool.call(abs, -1) == 1


async def test_ctrl_c_is_the_servers_business_and_not_the_workers(tmp_path: Path, sample_prices: Path) -> None:
    async with running(tmp_path, sample_prices, workers=1) as engine:
        pid = await engine.runner.pool.call(warm_up)
        os.kill(pid, signal.SIGINT)
        assert await engine.runner.pool.call(os.getpid) == pid


def count_workers() -> int:
    """Worker processes of this process, as the system sees it."""
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            found += int(parent) == os.getpid() and b"app.engine.calls" in (process / "cmdline").read_bytes()
        except OSError:  # it has just gone
            continue
    return found


async def test_scans_cancelled_while_their_workers_start_leave_no_process_behind(
    tmp_path: Path, sample_prices: Path, gate: Gate
) -> None:
    require(sys.platform == "linux", "no /proc to count processes in")
    before = count_workers()
    async with running(tmp_path, sample_prices, workers=1) as engine:
        for _ in range(6):
            scan = await engine.submit(gate=str(gate.path))
            await engine.until_running(scan)
            await engine.runner.cancel(scan.id, "someone who changed his mind")
            assert (await engine.finish(scan)).state is State.CANCELLED
        await engine.runner.pool.warm_up()
        assert 1 <= count_workers() - before <= 2


async def test_match_rows_are_json_when_they_come_from_a_worker_however_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100,000 rows that the event loop turned into JSON itself held up everybody else for seconds."""
    prices = tmp_path / "prices.parquet"
    make_synthetic(prices, symbols=200, days=500, seed=7)
    results: list[ChunkResult] = []
    async with running(tmp_path, prices, chunk_rows=25_000, max_matches=100_000) as engine:
        call_worker = engine.runner.pool.call

        async def call_noting(function: Any, *args: Any) -> Any:
            result = await call_worker(function, *args)
            results.append(result)
            return result

        def refuse(*_: object) -> None:
            raise AssertionError("rows were turned into JSON in the process of the event loop")

        with monkeypatch.context() as patch:
            patch.setattr(engine.runner.pool, "call", call_noting)
            patch.setattr(runner_module, "pack_rows", refuse)
            patch.setattr("app.core.scan.canonical_row", refuse)
            scan = await engine.finish(await engine.submit("trial-everything"))
        assert (scan.state, scan.matches) == (State.COMPLETED, 100_000)
        parts = [part for result in results for part in result.parts]
        assert all(type(part) is Rows and part.count <= ROWS_PER_EVENT for part in parts)
        assert scan.end is not None
        assert scan.end["digest"] == digest_rows(await engine.rows(scan))
