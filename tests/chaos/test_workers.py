"""Rules of worker processes that die, run out of memory or hang: one chunk is retried, nobody else notices."""

import asyncio
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import uvloop

from app.core.errors import WorkerCrashed
from app.core.scan import Scan, State
from app.engine.pool import Pool
from tests.chaos.servers import find_port, make_environment, started
from tests.conftest import require
from tests.test_engine import Engine, running

pytestmark = pytest.mark.usefixtures("trial_scanners")

WORST = "SYN00042"  # the symbol on whose chunk the workers die
REASONS = {
    "killed": r"was killed by signal 9 \(SIGKILL\)",
    "killed, with a child": r"was killed by signal 9 \(SIGKILL\)",
    "segfault": r"was killed by signal 11 \(SIGSEGV\)",
    "no memory in Python": r"ran out of its memory of 400 MB",
    "no memory in native code": r"ran out of its memory of 400 MB",
    "hanging in native code": r"did not return within 3 s, its deadline, and was killed",
}


def list_children(parent: int) -> set[int]:
    """The processes of a parent, zombies too."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            its_parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:  # it has just gone
            continue
        if int(its_parent) == parent:
            found.add(int(process.name))
    return found


async def check_whole(pool: Pool, before: set[int]) -> int:
    """Has every worker at work at the same time, and says how many files this process has open then."""
    pids = set(await asyncio.gather(*(pool.call(os.getpid) for _ in range(2))))
    async with asyncio.timeout(5):
        # The last one that was killed may be about to go.
        while list_children(os.getpid()) - before != pids:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert pool.busy == 0
    return len(os.listdir("/proc/self/fd"))


async def read_result(engine: Engine, scan: Scan) -> tuple[State, int, str, list[object]]:
    scan = await engine.finish(scan)
    assert scan.end is not None
    return scan.state, scan.attempt, scan.end["digest"], await engine.rows(scan)


@pytest.mark.parametrize("how", REASONS)
async def test_a_chunk_is_retried_once_and_then_fails_its_scan_with_the_reason_and_nobody_else_notices(
    tmp_path: Path, synthetic_prices: Path, how: str
) -> None:
    require(sys.platform == "linux", "no /proc to count processes in")
    before = list_children(os.getpid())
    bounds = {"worker_memory_mb": 400, "chunk_deadline_s": 3 if "hanging" in how else 60}
    async with running(tmp_path, synthetic_prices, max_running=3, workers=2, **bounds) as engine:
        whole = await read_result(engine, await engine.submit("trial-crashing", only_symbol="none"))
        other = await read_result(engine, await engine.submit("gap-up", preset="relaxed"))
        assert (whole[0], other[0]) == (State.COMPLETED, State.COMPLETED)
        assert len(other[3]) > 100
        files = await check_whole(engine.runner.pool, before)

        once = await engine.submit("trial-crashing", how=how, only_symbol=WORST, marker=str(tmp_path / "crashed"))
        twice = await engine.submit("trial-crashing", how=how, only_symbol=WORST)
        beside = await engine.submit("gap-up", preset="relaxed")

        assert await read_result(engine, beside) == other
        assert await read_result(engine, once) == whole
        failed = await engine.finish(twice)
        assert failed.end is not None
        assert (failed.state, failed.end["error"]["type"]) == (State.FAILED, "urn:scanwire:problem:worker-crashed")
        reason = REASONS[how]
        said = rf"The worker process {reason} on chunk 42, and the fresh one that tried it again {reason}\. "
        assert re.match(said, failed.end["error"]["detail"])

        assert engine.runner.statistics().worker_crashes == 3
        assert engine.is_at_rest()
        assert await check_whole(engine.runner.pool, before) == files
    assert list_children(os.getpid()) == before


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_death_is_told_and_leaves_nothing_on_either_loop(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    require(sys.platform == "linux", "no /proc to count processes in")
    before = list_children(os.getpid())

    async def check() -> None:
        pool = Pool(2, memory_mb=400)
        files = await check_whole(pool, before)
        for function, argument, reason in (
            (os._exit, 3, "ended by itself with exit code 3"),
            (bytearray, 2**30, "ran out of its memory of 400 MB"),
            (signal.raise_signal, signal.SIGSEGV, r"was killed by signal 11 \(SIGSEGV\)"),
        ):
            with pytest.raises(WorkerCrashed, match=f"The worker process {reason}"):
                await pool.call(function, argument)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await pool.call(time.sleep, 3600)
        with pytest.raises(ZeroDivisionError):
            await pool.call(divmod, 1, 0)
        assert len(await pool.call(bytes, 10**7)) == 10**7
        assert await check_whole(pool, before) == files
        await pool.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(check())
    assert list_children(os.getpid()) == before


async def test_workers_that_died_while_idle_are_no_try_of_a_chunk(tmp_path: Path, sample_prices: Path) -> None:
    async with running(tmp_path, sample_prices, workers=3) as engine:
        pool = engine.runner.pool
        await pool.warm_up()
        for pid in await asyncio.gather(*(pool.call(os.getpid) for _ in range(3))):
            os.kill(pid, signal.SIGKILL)
        marker = str(tmp_path / "crashed")
        scan = await engine.finish(await engine.submit("trial-crashing", marker=marker, only_symbol="AAPL"))
        assert (scan.state, engine.runner.statistics().worker_crashes) == (State.COMPLETED, 1)


async def test_the_retry_has_a_fresh_worker_where_others_are_idle(tmp_path: Path, sample_prices: Path) -> None:
    require(sys.platform == "linux", "no /proc to count processes in")
    before = list_children(os.getpid())
    async with running(tmp_path, sample_prices, workers=2) as engine:
        await check_whole(engine.runner.pool, before)
        warm = list_children(os.getpid())
        scan = await engine.submit("trial-crashing", marker=str(tmp_path / "crashed"), symbols=["AAPL"])
        assert (await engine.finish(scan)).state is State.COMPLETED
        assert len(list_children(os.getpid()) - warm) == 1


@pytest.mark.parametrize("how", ["hanging", "hanging in native code"])
async def test_no_worker_outlives_a_server_that_is_killed_not_even_one_that_hangs(
    tmp_path: Path, sample_prices: Path, how: str
) -> None:
    require(sys.platform == "linux", "workers end with their parent on Linux alone")
    environment = make_environment(tmp_path, sample_prices, workers=2, chunk_rows=1)
    async with started(find_port(), environment) as server, httpx.AsyncClient(base_url=server.url) as http:
        gate = tmp_path / "hangs"
        asked = {"scanner": "trial-crashing", "params": {"how": how, "marker": str(gate), "only_symbol": "IBM"}}
        (await http.post("/v1/scans", json=asked)).raise_for_status()
        async with asyncio.timeout(20):
            while not gate.exists():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        workers = list_children(server.process.pid)
        assert len(workers) == 2
        handles = [os.pidfd_open(pid) for pid in workers]
        try:
            server.process.kill()
            for handle in handles:
                ended, _, _ = await asyncio.to_thread(select.select, [handle], [], [], 5.0)
                assert ended, "a worker lives on"
        finally:
            for handle, pid in zip(handles, workers, strict=True):
                if not select.select([handle], [], [], 0)[0]:
                    os.kill(pid, signal.SIGKILL)
                os.close(handle)
