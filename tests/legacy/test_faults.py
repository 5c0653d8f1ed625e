"""What was wrong with the server of old, fault by fault: none of it comes back."""

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from app.core.scan import State
from app.market.store import write_store
from tests.conftest import Gate, until
from tests.legacy.clients import listen
from tests.legacy.oracle import Oracle
from tests.serving import Serving, serve

WHOLE = {"start_date": "2000-01-03", "end_date": "2013-03-01"}
DAYS = tuple(WHOLE.values())

pytestmark = pytest.mark.usefixtures("trial_scanners")


async def execute(serving: Serving, **request: Any) -> Any:
    answer = await serving.http.post("/api/scan/execute", json=request)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def ask(serving: Serving, path: str) -> Any:
    return (await serving.http.get(path)).json()


async def test_fault_1_a_long_range_is_answered_with_all_its_rows(serving: Serving, oracle: Oracle) -> None:
    answer = await execute(serving, **WHOLE)
    oracle.check(answer["results"], *DAYS)
    assert answer["total_found"] == len(answer["results"]) > 100
    assert answer["execution_time"] > 0


async def test_fault_2_the_last_day_of_a_range_is_in_it(serving: Serving, oracle: Oracle) -> None:
    ticker, day = max(oracle.list_rows(*DAYS), key=lambda key: key[1])
    for start in ("2000-01-03", day):
        rows = (await execute(serving, start_date=start, end_date=day))["results"]
        oracle.check(rows, start, day)
        assert (ticker, day) in {(row["ticker"], row["date"]) for row in rows}


async def test_fault_3_a_slot_is_given_back_on_every_path(tmp_path: Path, sample_prices: Path) -> None:
    """Completed, failed, cancelled, and a client that left: after each, the one slot and all places are free."""
    async with serve(tmp_path, sample_prices, max_running=1, chunk_rows=500) as serving:
        service = serving.service

        async def expect_free() -> None:
            await until(lambda: all(scan.state.is_terminal for scan in service.log.list_scans()))
            await until(lambda: service.runner.active == 0 and service.limits.statistics().streams == 0)
            await until(lambda: service.hub.statistics().subscribers == {})

        await execute(serving, **WHOLE)
        await expect_free()
        body = {**WHOLE, "scanner_type": "a_plus"}
        leaving = asyncio.create_task(serving.http.post("/api/scan/execute", json=body))
        await until(lambda: len(list(service.log.list_scans())) == 2)
        leaving.cancel()
        await expect_free()
        worker = await service.runner.pool.call(os.getpid)
        os.kill(worker, signal.SIGSTOP)  # else the scan may come to its end before it is cancelled
        cancelled = asyncio.create_task(serving.http.post("/api/scan/execute", json={"start_date": "2001-01-02"}))
        await until(lambda: len(list(service.log.list_scans())) == 3)
        newest = next(service.log.list_scans()).id
        await until(lambda: service.log.get(newest).state is State.RUNNING)
        cancelling = asyncio.create_task(serving.http.delete(f"/v1/scans/{newest}"))
        await until(lambda: service.log.get(newest).state is not State.RUNNING)
        with contextlib.suppress(ProcessLookupError):  # it was ended, since it did not let go of the scan
            os.kill(worker, signal.SIGCONT)
        assert (await cancelling).status_code == 202
        assert (await cancelled).status_code == 500
        await expect_free()
        assert (await execute(serving, start_date="2002-01-02"))["total_found"] > 0
        await expect_free()


async def test_fault_3_a_slot_is_given_back_by_a_scan_that_failed(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(
        tmp_path, sample_prices, workers=1, max_running=1, chunk_rows=500, scan_deadline_s=0.02
    ) as failing:
        for year in (2001, 2002):
            answer = await failing.http.post("/api/scan/execute", json={"start_date": f"{year}-01-02"})
            assert answer.status_code == 500
            assert "its deadline" in answer.json()["detail"]
        assert failing.service.runner.active == 0


async def test_fault_4_every_accepted_scan_comes_to_its_end_also_over_a_restart(
    tmp_path: Path, sample_prices: Path, gate: Gate
) -> None:
    options: dict[str, Any] = {"workers": 1, "max_running": 1, "legacy_wait_s": 0}
    async with serve(tmp_path, sample_prices, **options) as serving:
        await serving.submit("trial-gated", gate=str(gate.path))
        accepted = [await execute(serving, start_date=f"{year}-01-03") for year in range(2000, 2006)]
        for one in accepted:
            assert (await ask(serving, f"/api/scan/status/{one['scan_id']}"))["status"] == "initializing"
    gate.open()
    async with serve(tmp_path, sample_prices, **options) as serving:
        for one in accepted:
            await serving.finish(one["scan_id"])
            assert (await ask(serving, f"/api/scan/status/{one['scan_id']}"))["status"] == "completed"


@pytest.mark.usefixtures("both_paths")
async def test_fault_5_two_tabs_both_get_everything(
    tmp_path: Path, sample_prices: Path, gate: Gate, oracle: Oracle
) -> None:
    async with serve(tmp_path, sample_prices, max_running=1, legacy_wait_s=0, chunk_rows=500) as serving:
        await serving.submit("trial-gated", gate=str(gate.path))
        scan_id = (await execute(serving, **WHOLE))["scan_id"]
        tabs = [asyncio.create_task(listen(serving.url, scan_id)) for _ in range(2)]
        await until(lambda: serving.service.hub.statistics().subscribers == {"websocket": 2})
        gate.open()
        one, two = await asyncio.gather(*tabs)
    for messages in (one, two):
        assert [message["type"] for message in messages].count("final") == 1
        oracle.check(messages[-1]["results"], *DAYS)
        assert {"connected", "status", "progress", "final"} == {message["type"] for message in messages}


@pytest.mark.usefixtures("both_paths")
async def test_fault_6_who_comes_late_gets_the_final_message(serving: Serving, oracle: Oracle) -> None:
    scan_id = (await execute(serving, **WHOLE))["scan_id"]
    for _ in range(2):
        connected, final = await listen(serving.url, scan_id)
        assert (connected["type"], final["type"]) == ("connected", "final")
        assert (final["status"], final["results_available"], final["progress_percent"]) == ("completed", True, 100)
        oracle.check(final["results"], *DAYS)
    (unknown,) = await listen(serving.url, "s_unknown")
    assert (unknown["type"], unknown["message"]) == ("error", "Scan not found")


async def watch_whole(tmp_path: Path, prices: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All messages of a scan of many chunks, and what polls saw meanwhile."""
    async with serve(tmp_path, prices, legacy_wait_s=0, chunk_rows=500, progress_per_s=1000) as serving:
        scan_id = (await execute(serving, **WHOLE))["scan_id"]
        watching = asyncio.create_task(listen(serving.url, scan_id))
        polled = [await ask(serving, f"/api/scan/status/{scan_id}")]
        while polled[-1]["status"] not in ("completed", "error"):
            polled.append(await ask(serving, f"/api/scan/status/{scan_id}"))
        return await watching, polled


@pytest.mark.usefixtures("both_paths")
async def test_fault_7_no_message_says_completed_before_the_final_one(tmp_path: Path, sample_prices: Path) -> None:
    messages, _ = await watch_whole(tmp_path, sample_prices)
    assert [message["type"] for message in messages if message.get("status") == "completed"] == ["final"]
    assert messages[-1]["type"] == "final"
    assert len(messages) > 4


@pytest.mark.usefixtures("both_paths")
async def test_fault_8_messages_come_in_one_order_and_nothing_runs_backwards(
    tmp_path: Path, sample_prices: Path
) -> None:
    messages, _ = await watch_whole(tmp_path, sample_prices)
    types = [message["type"] for message in messages]
    assert types[0] == "connected"
    assert types[-1] == "final"
    assert types.count("connected") == types.count("final") == 1
    percents = [message["progress_percent"] for message in messages[1:]]
    assert percents == sorted(percents)
    times = [message["timestamp"] for message in messages]
    assert times == sorted(times)
    order = ["initializing", "running", "completed"]
    places = [order.index(message["status"]) for message in messages[1:]]
    assert places == sorted(places)


async def test_fault_9_what_is_not_ready_does_not_look_like_no_hits(
    tmp_path: Path, sample_prices: Path, gate: Gate
) -> None:
    async with serve(tmp_path, sample_prices, max_running=1, legacy_wait_s=0.05) as serving:
        await serving.submit("trial-gated", gate=str(gate.path))
        answer = await execute(serving, **WHOLE)
        scan_id = answer["scan_id"]
        assert answer["message"].startswith("These are no results yet")
        for tail, status in (("results", 202), ("status", 200)):
            waiting = await serving.http.get(f"/api/scan/{tail}/{scan_id}")
            assert waiting.status_code == status
            assert int(waiting.headers["Retry-After"]) >= 1
        assert waiting.json()["status"] == "initializing"
        assert (await serving.http.get(f"/api/scan/results/{scan_id}")).json() == {"detail": "Scan still in progress"}
        await serving.http.delete(f"/v1/scans/{scan_id}")
        cancelled = await serving.http.get(f"/api/scan/results/{scan_id}")
        assert cancelled.status_code == 500
        assert "cancelled" in cancelled.json()["detail"]
        (_, error) = await listen(serving.url, scan_id)
        assert (error["type"], error["status"]) == ("error", "error")
        assert "results" not in error


async def test_fault_10_a_hundred_percent_and_the_end_come_together(tmp_path: Path, sample_prices: Path) -> None:
    messages, polled = await watch_whole(tmp_path, sample_prices)
    assert max(message["progress_percent"] for message in messages[1:-1]) == 99  # the last chunk was done
    assert messages[-1]["progress_percent"] == 100
    for status in polled:
        assert (status["progress_percent"] == 100) == (status["status"] == "completed")


async def test_fault_11_polls_are_limited_and_told_when_to_come_back(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices, read_per_s=5, read_burst=20) as serving:
        scan_id = (await execute(serving, **WHOLE))["scan_id"]
        paths = ("/api/scan/status", f"/api/scan/status/{scan_id}", "/api/scan/list", f"/api/scans/{scan_id}")
        answers = [await serving.http.get(paths[turn % len(paths)]) for turn in range(40)]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) > 10
        for answer in refused:
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["limit"] == "read"


async def test_fault_12_a_scan_does_not_hold_up_the_event_loop(tmp_path: Path, synthetic_prices: Path) -> None:
    latest, worst = time.monotonic(), 0.0

    async def tick() -> None:
        nonlocal latest, worst
        while True:
            await asyncio.sleep(0.002)
            worst = max(worst, time.monotonic() - latest)
            latest = time.monotonic()

    async with serve(tmp_path, synthetic_prices) as serving:
        await execute(serving, start_date="2000-01-03")
        latest = time.monotonic()
        ticking = asyncio.create_task(tick())
        began = time.monotonic()
        await asyncio.gather(*(execute(serving, start_date=f"20{year}-01-03") for year in ("01", "02", "03", "04")))
        took = time.monotonic() - began
        ticking.cancel()
    assert worst < took / 4


async def test_fault_13_symbols_that_could_not_be_read_are_told(tmp_path: Path, sample_prices: Path) -> None:
    prices = pl.read_parquet(sample_prices)
    is_dirty = (pl.col("symbol") == "IBM") & (pl.col("date").dt.year() == 2005)
    dirty = prices.with_columns(pl.when(~is_dirty).then("high").alias("high"))
    write_store(dirty, tmp_path / "dirty.parquet", source="test")
    async with serve(tmp_path, tmp_path / "dirty.parquet") as serving:
        answer = await serving.http.post("/api/scan/execute", json=WHOLE)
        scan_id = answer.json()["scan_id"]
        status = await ask(serving, f"/api/scan/status/{scan_id}")
        end = (await ask(serving, f"/v1/scans/{scan_id}"))["end"]
    assert f"Rows of 1 symbols could not be used and were left out: /v1/scans/{scan_id}" in status["message"]
    assert status["message"] == answer.json()["message"]
    assert [skipped["symbol"] for skipped in end["skipped"]] == ["IBM"]


async def test_fault_14_every_address_says_the_same_of_a_row(serving: Serving) -> None:
    executed = await execute(serving, **WHOLE)
    scan_id = executed["scan_id"]
    shown = [
        (await ask(serving, path))["results"]
        for path in (
            f"/api/scan/status/{scan_id}",
            "/api/scan/status",
            f"/api/scan/results/{scan_id}",
            f"/api/scans/{scan_id}",
        )
    ]
    shown.append((await listen(serving.url, scan_id))[-1]["results"])
    assert all(rows == executed["results"] for rows in shown)
    pushed = {(row["symbol"], row["date"]): row for row in (await ask(serving, f"/v1/scans/{scan_id}/matches"))["rows"]}
    assert pushed.keys() == {(row["ticker"], row["date"]) for row in executed["results"]}
    for row in executed["results"]:
        other = pushed[row["ticker"], row["date"]]
        assert [row[name] for name in ("close", "volume", "gap_pct", "parabolic_score")] == [
            other[name] for name in ("close", "volume", "gap_pct", "parabolic_score")
        ]


@pytest.mark.parametrize("use_real_scan", [True, False, None])
async def test_fault_15_every_row_is_in_the_price_table(
    serving: Serving, sample_prices: Path, use_real_scan: bool | None
) -> None:
    rows = (await execute(serving, **WHOLE, use_real_scan=use_real_scan))["results"]
    prices = {(row["symbol"], row["date"].isoformat()): row for row in pl.read_parquet(sample_prices).to_dicts()}
    assert rows
    for row in rows:
        bar = prices[row["ticker"], row["date"]]
        assert row["close"] == pytest.approx(bar["close"], abs=1e-6)
        assert row["volume"] == round(bar["volume"])
    nothing = await execute(serving, start_date="1990-01-02", end_date="1990-12-31", use_real_scan=use_real_scan)
    assert (nothing["results"], nothing["total_found"]) == ([], 0)
    assert nothing["message"] == "The scan is complete: 0 found."


async def test_fault_15_rows_from_invented_prices_are_marked(tmp_path: Path, synthetic_prices: Path) -> None:
    async with serve(tmp_path, synthetic_prices) as serving:
        answer = await execute(serving)
        assert answer["message"].startswith("SYNTHETIC, not real prices: ")
        assert (await ask(serving, "/api/health"))["mode"] == "synthetic"
        assert (await listen(serving.url, answer["scan_id"]))[-1]["message"].startswith("SYNTHETIC")
