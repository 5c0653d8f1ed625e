"""A blocked event loop is told of with the stack that blocks it; a calm one is not."""

import asyncio
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.observe.watchdog import Watchdog
from tests.conftest import until
from tests.serving import serve

BLOCKED, UNBLOCKED = "loop_blocked", "loop_unblocked"


def block_for_real(seconds: float) -> None:
    time.sleep(seconds)


def find(caplog: pytest.LogCaptureFixture, action: str) -> list[logging.LogRecord]:
    return [record for record in caplog.records if getattr(record, "action", None) == action]


async def test_a_blocked_loop_is_logged_once_with_its_stack_and_once_with_its_length(
    tmp_path: Path, sample_prices: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(tmp_path, sample_prices) as serving:
        # A first request loads what the next ones share, which may take its time on a busy machine.
        assert "scanwire_loop_blocks_total" in (await serving.http.get("/metrics")).text
        before, caplog_start = len(find(caplog, BLOCKED)), len(find(caplog, UNBLOCKED))
        block_for_real(0.6)
        async with asyncio.timeout(5):
            await until(lambda: len(find(caplog, UNBLOCKED)) > caplog_start)
        (blocked,) = find(caplog, BLOCKED)[before:]
        (unblocked,) = find(caplog, UNBLOCKED)[caplog_start:]
        assert "block_for_real(0.6)" in blocked.getMessage()
        assert "in block_for_real" in blocked.getMessage()
        # It is told while it lasts: the stack is what was running then, not what came after.
        assert blocked.created < unblocked.created
        assert 0.5 < unblocked.blocked_s < 5  # type: ignore[attr-defined]
        text = (await serving.http.get("/metrics")).text
        assert f"scanwire_loop_blocks_total {before + 1}.0" in text


async def test_a_block_within_the_bound_is_not_logged(
    tmp_path: Path, sample_prices: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(tmp_path, sample_prices, block_report_ms=3000) as serving:
        for _ in range(3):
            block_for_real(0.4)
            assert (await serving.http.get("/healthz")).status_code == 200
    assert find(caplog, BLOCKED) == []


async def test_a_calm_loop_logs_nothing_and_the_watch_ends_with_its_block(caplog: pytest.LogCaptureFixture) -> None:
    watchdog = Watchdog(0.25)
    before = time.thread_time(), time.process_time()
    with watchdog.watch():
        for _ in range(60):
            watchdog.due = time.monotonic() + 0.05
            await asyncio.sleep(0.05)
    own, all_threads = time.thread_time() - before[0], time.process_time() - before[1]
    assert find(caplog, BLOCKED) == []
    assert watchdog.blocks == 0
    # What it costs beside the loop itself, of one core.
    assert (all_threads - own) / 3 < 0.01


@pytest.mark.parametrize("loop", ["asyncio.new_event_loop", "uvloop.new_event_loop"])
def test_a_loop_that_is_late_while_it_runs_nothing_is_not_taken_for_a_blocked_one(loop: str) -> None:
    """So it is after the whole process was stopped, or had no CPU."""
    code = f"""
import asyncio, logging, sys, time, uvloop
from app.observe.watchdog import Watchdog
logging.basicConfig(level="INFO", stream=sys.stdout)
watchdog = Watchdog(0.1)
async def main():
    with watchdog.watch():
        watchdog.due = time.monotonic() - 1
        await asyncio.sleep(0.5)
        print("idle", watchdog.blocks)
        watchdog.due = time.monotonic()
        time.sleep(0.5)
        print("blocked", watchdog.blocks)
with asyncio.Runner(loop_factory={loop}) as runner:
    runner.run(main())
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=30, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "idle 0"
    assert "blocked 1" in lines
