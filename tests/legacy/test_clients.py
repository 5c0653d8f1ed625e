"""Clients of old get complete, ordered and true results, though nothing in them was changed."""

import asyncio
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Gate
from tests.legacy.clients import (
    BackoffPoller,
    ChunkingClient,
    Clock,
    GaveUpError,
    PageClient,
    ServiceClient,
    benchmark,
    try_rate_limit,
)
from tests.legacy.oracle import Oracle
from tests.serving import GENEROUS, Serving, serve

# Every limit as it is by default: these clients were built for them.
STRICT: dict[str, Any] = {
    "submit_per_min": 2,
    "submit_heavy_per_hour": 10,
    "read_per_s": 5,
    "read_burst": 20,
    "connect_per_s": 2,
    "connect_burst": 10,
    "legacy_execute_per_min": 100,
    "max_active_per_client": 8,
    "max_queued": 16,
    "max_streams_per_client": 32,
}
# A scan that waits for so long, by the clock of these tests, is not taken for a hung one.
PATIENT: dict[str, Any] = STRICT | {"max_running": 1, "legacy_wait_s": 0, "scan_deadline_s": 3600}
WHOLE = {"start_date": "2000-01-03", "end_date": "2013-03-01"}
DAYS = tuple(WHOLE.values())

pytestmark = pytest.mark.usefixtures("trial_scanners")


async def block(serving: Serving, gate: Gate) -> str:
    """Takes the only slot until the gate is opened."""
    blocking = await serving.submit("trial-gated", gate=str(gate.path))
    return str(blocking["id"])


@pytest.mark.usefixtures("both_paths")
async def test_a_page_gets_all_rows_by_its_socket_and_by_its_polls(
    tmp_path: Path, sample_prices: Path, clock: Clock, oracle: Oracle
) -> None:
    async with serve(
        tmp_path, sample_prices, workers=1, chunk_rows=500, legacy_wait_s=0, clock=clock, **STRICT
    ) as serving:

        async def see(status: dict[str, Any]) -> None:
            if page.polls == 60:  # the clock runs with the polls, and must not outrun the work that is done meanwhile
                await serving.finish(status["scan_id"])

        page = PageClient(serving.url, serving.http, clock, see)
        seen = await page.show(**WHOLE)
    oracle.check(seen.pushed, *DAYS)
    assert seen.polled == seen.pushed
    assert {message["type"] for message in seen.messages} == {"connected", "status", "progress", "final"}


async def test_a_script_polls_for_half_an_hour_and_no_poll_is_refused(
    tmp_path: Path, sample_prices: Path, clock: Clock, oracle: Oracle, gate: Gate
) -> None:
    statuses = []
    async with serve(tmp_path, sample_prices, clock=clock, **PATIENT) as serving:
        blocking = await block(serving, gate)

        async def see(status: dict[str, Any]) -> None:
            statuses.append(status["status"])
            if len(statuses) == 890:
                gate.open()
                await serving.finish(blocking)
            if len(statuses) == 891:
                await serving.finish(status["scan_id"])

        client = ServiceClient(serving.http, clock, see)
        oracle.check(await client.run(**WHOLE), *DAYS)
    assert clock.now > 1000 + 890 * 2
    assert set(statuses[:890]) == {"initializing"}
    assert statuses[-1] == "completed"


async def test_a_script_is_told_when_its_scan_was_cancelled(
    tmp_path: Path, sample_prices: Path, clock: Clock, gate: Gate
) -> None:
    async with serve(tmp_path, sample_prices, max_running=1, legacy_wait_s=0, clock=clock) as serving:
        await block(serving, gate)

        async def see(status: dict[str, Any]) -> None:
            await serving.http.delete(f"/v1/scans/{status['scan_id']}")

        with pytest.raises(GaveUpError, match="cancelled before it had looked at everything"):
            await ServiceClient(serving.http, clock, see).run(**WHOLE)


async def test_a_client_that_sends_three_ranges_at_a_time_and_believes_the_first_answers_has_every_row(
    tmp_path: Path, sample_prices: Path, clock: Clock, oracle: Oracle
) -> None:
    start, end = "2004-01-02", "2007-12-31"
    async with serve(tmp_path, sample_prices, clock=clock, **STRICT) as serving:
        client = ChunkingClient(serving.http, clock)
        rows = await client.run(start_date=start, end_date=end, chunk_size_days=90, max_concurrent_chunks=3)
        scans = (await serving.http.get("/api/scan/list")).json()["scans"]
    assert len(scans) == len(list(client.cut(date.fromisoformat(start), date.fromisoformat(end)))) == 17
    oracle.check(sorted(rows, key=lambda row: -row["parabolic_score"]), start, end)
    assert len(rows) > 30


async def test_two_clients_that_ask_the_same_share_one_run(
    tmp_path: Path, sample_prices: Path, clock: Clock, oracle: Oracle
) -> None:
    async with serve(tmp_path, sample_prices, clock=clock, **STRICT) as serving:
        client = ServiceClient(serving.http, clock)
        executed = await asyncio.gather(*(client.execute(**WHOLE) for _ in range(5)))
    assert len({one["scan_id"] for one in executed}) == 1
    for one in executed:
        oracle.check(one["results"], *DAYS)


async def test_the_playbooks_backoff_poller_gets_the_rows_within_its_hundred_attempts(
    tmp_path: Path, sample_prices: Path, clock: Clock, oracle: Oracle, gate: Gate
) -> None:
    async with serve(tmp_path, sample_prices, clock=clock, **PATIENT) as serving:
        blocking = await block(serving, gate)

        async def see(status: dict[str, Any]) -> None:
            if poller.polls == 98:
                gate.open()
                await serving.finish(blocking)
                await serving.finish(status["scan_id"])

        poller = BackoffPoller(serving.http, clock, see)
        oracle.check(await poller.run(**WHOLE), *DAYS)
    assert poller.polls == 99
    assert 2500 < clock.now - 1000 < 3000


async def test_the_playbooks_rate_limit_test_passes(tmp_path: Path, sample_prices: Path, clock: Clock) -> None:
    async with serve(tmp_path, sample_prices, clock=clock, **STRICT) as serving:
        assert await try_rate_limit(serving.http, {"operation": "load test", "n": 1}) == [200, 200, 429]
        await clock.sleep(60)
        assert await try_rate_limit(serving.http, ["anything"]) == [200, 200, 429]


async def test_the_playbooks_benchmark_has_no_errors_and_is_far_below_its_target(
    tmp_path: Path, sample_prices: Path, clock: Clock
) -> None:
    async with serve(tmp_path, sample_prices, clock=clock, **STRICT) as serving:
        await ServiceClient(serving.http, clock).execute(**WHOLE)
        works: list[tuple[str, str, dict[str, Any]]] = [
            ("GET", "/api/health", {}),
            ("GET", "/api/performance", {}),
            ("POST", "/api/scan/execute", {"json": WHOLE}),
        ]
        for method, path, request in works:
            measured = await benchmark(serving.http, method, path, **request)
            assert measured.error_rate == 0, path
            assert measured.min_s <= measured.average_s <= measured.max_s < 2, path


def test_the_defaults_are_what_these_tests_call_strict() -> None:
    from app.core.settings import Settings

    assert STRICT.keys() >= GENEROUS.keys() - {"message_per_s", "message_burst", "drain_s", "workers"}
    assert {name: getattr(Settings(), name) for name in STRICT} == STRICT
