"""Causes: each is caused for real, and found with its numbers, since when, who, and what helps."""

import asyncio
import contextlib
import hashlib
import re
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.core.settings import Settings, hash_key
from app.engine.limits import Limits
from app.observe.causes import LIMITS, find_memory_growth, find_missing_limits, find_slow_consumers
from app.observe.tally import OTHERS, Memory, Numbers, State, Tally
from tests.conftest import Gate
from tests.peers import meet
from tests.serving import Serving, serve
from tests.test_backpressure import find_wires, serving_tightly, until_all_behind
from tests.test_diagnosis import QUICK, get_report, submit_external, until_cause, until_report

pytestmark = pytest.mark.usefixtures("trial_scanners")

KEYS: dict[str, Any] = {
    "api_keys": (f"slow:{hash_key('slow')}", f"quick:{hash_key('quick')}"),
    "operator_keys": (f"root:{hash_key('root')}",),
}
LINES = {"Accept": "application/x-ndjson"}


def bear(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


def find_measure(report: Any, name: str) -> Any:
    return next(measure for measure in report["measures"] if measure["measure"] == name)


async def until_measured(serving: Serving, name: str) -> Any:
    report = await until_report(serving, lambda report: find_measure(report, name)["severity"] != "healthy")
    return find_measure(report, name)


# Who


@contextlib.asynccontextmanager
async def watching(serving: Serving, scan_id: str, *names: str) -> AsyncIterator[None]:
    """One stream for each of these keys, of which nothing is read."""
    async with contextlib.AsyncExitStack() as stack:
        for name in names:
            peer = await stack.enter_async_context(meet(serving.url, receive_buffer=4096))
            fields = ("Accept: text/event-stream", f"Authorization: Bearer {name}")
            await peer.ask(f"/v1/scans/{scan_id}/events", *fields)
        yield


async def test_slow_consumers_are_named_and_those_who_keep_up_are_not(tmp_path: Path, sample_prices: Path) -> None:
    async with serving_tightly(tmp_path, sample_prices, **QUICK, **KEYS) as serving:
        serving.http.headers.update(bear("root"))
        scan = await submit_external(serving)
        async with watching(serving, scan["id"], "slow", "slow"):
            await until_all_behind(serving, scan["id"])
            async with serving.http.stream("GET", scan["links"]["events"], headers=bear("quick") | LINES) as stream:
                lines = stream.aiter_lines()
                await anext(lines)
                began_ms = time.time() * 1000
                cause = await until_cause(serving, "slow consumers")
                assert len(find_wires(serving)) == 3
                assert cause["evidence"].startswith("2 of 3 streams are behind")
                assert cause["clients"] == {serving.service.lookout._tally.hash_client("key:slow"): 2}
                assert "slow:" not in str(cause)
                again = await until_report(serving, lambda report: report["ts"] > cause["since_ts"] + 500)
                (same,) = again["causes"]
                assert same["since_ts"] == pytest.approx(cause["since_ts"], abs=100)
                assert same["since_ts"] == pytest.approx(began_ms, abs=2000)


def test_who_is_behind_for_a_moment_is_no_slow_consumer() -> None:
    looks: list[dict[str, int]] = [{"a": 1, "b": 1}, {"b": 2}, {"c": 1}]
    states = [State(behind=look, streams=9) for look in looks]
    assert find_slow_consumers(Numbers(window_s=300, states=states), Settings()) is None
    states[-1] = State(behind={"b": 3, "c": 1, OTHERS: 5}, streams=9)
    cause = find_slow_consumers(Numbers(window_s=300, states=states), Settings())
    assert cause is not None
    assert cause.clients == {"b": 3}
    assert cause.evidence.startswith("3 of 9 streams")


def test_those_who_are_behind_are_kept_up_to_a_bound_and_hashed() -> None:
    tally = Tally(300, 3600, lambda: State(behind={f"ip:{number}": number for number in range(1000)}))
    tally.sample()
    (state,) = tally.read().states
    assert len(state.behind) == 51
    assert sum(state.behind.values()) == sum(range(1000))
    assert state.behind[tally.hash_client("ip:999")] == 999


# Limits that are none


async def test_polls_that_no_limit_would_ever_meet_are_found(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices, **(QUICK | {"diagnosis_window_s": 3})) as serving:
        scan = await submit_external(serving)
        asking = asyncio.create_task(_poll_for_ever(serving, scan["links"]["self"]))
        cause = await until_cause(serving, "missing limits")
        asking.cancel()
        assert "polls of one client where the limit has room for 400,000, and it was never hit" in cause["evidence"]
        assert "SCANWIRE_READ_PER_S (5 is usual)" in cause["cure"]
        assert list(cause["clients"]) == [serving.service.lookout._tally.hash_client("ip:127.0.0.1")]


async def _poll_for_ever(serving: Serving, path: str) -> None:
    while True:
        await serving.http.get(path)


async def test_wide_limits_are_a_cause_once_the_service_suffers_under_what_they_let_in(
    tmp_path: Path, sample_prices: Path, gate: Gate
) -> None:
    """More submissions and more scans that wait than is usual: harmless until they wait for too long."""
    settings = {"max_running": 1, "diagnosis_window_s": 4}
    async with serve(tmp_path, sample_prices, **(QUICK | settings | {"target_queue_wait_s": 0.2})) as serving:
        ids = [(await serving.submit("trial-gated", gate=str(gate.path)))["id"] for _ in range(19)]
        report = await until_report(serving, lambda report: report["causes"])
        assert [cause["name"] for cause in report["causes"]] == ["saturated concurrency"]
        await asyncio.sleep(0.5)  # the fault itself: they wait for longer than they should
        gate.open()
        cause = await until_cause(serving, "missing limits")
        assert (
            "19 submissions of one client where the limit has room for 106,667, and it was never hit"
            in (cause["evidence"])
        )
        assert "18 scans that wait where the limit has room for 1,000" in cause["evidence"]
        assert cause["evidence"].endswith("meanwhile not healthy: queue wait p95")
        assert "SCANWIRE_SUBMIT_PER_MIN (2 is usual), SCANWIRE_MAX_QUEUED (16 is usual)" in cause["cure"]
        for scan_id in ids:
            await serving.finish(scan_id)


def count_charges(limits: Limits) -> Numbers:
    tally = Tally(300, 3600, lambda: State(refused=limits.statistics().refused))
    tally.take_charged = limits.take_charged
    tally.sample()
    return tally.read()


@pytest.mark.parametrize("name", ["submit", "submit-heavy", "connect", "message", "legacy-execute"])
def test_each_bucket_is_missing_when_it_is_far_too_wide_and_not_when_it_is_usual_or_was_hit(name: Any) -> None:
    (limit,) = (limit for limit in LIMITS if limit.name == name)
    usual = limit.allow(Settings(), 300)
    wide = Settings().model_copy(update={limit.setting: 10**6, "connect_burst": 10**6, "message_burst": 10**6})
    for settings, times, is_found in ((wide, 11, True), (wide, 9, False), (Settings(), 11, False)):
        limits = Limits(settings)
        for _ in range(int(times * usual)):
            with contextlib.suppress(Exception):
                limits.charge(name, "key:greedy")
        numbers = count_charges(limits)
        assert (find_missing_limits(numbers, settings) is not None) is is_found, (settings is wide, times)
        assert limits.take_charged() == {}


def test_what_was_refunded_was_not_let_in() -> None:
    limits = Limits(Settings())
    limits.charge("submit", "key:a")
    limits.charge("submit", "key:a")
    limits.refund("submit", "key:a")
    limits.charge("read", "key:a")  # far too many to be counted one by one
    assert limits.take_charged() == {("submit", "key:a"): 1}


@pytest.mark.parametrize(
    ("seen", "names"),
    [
        ({"most_streams": {"a": 400}}, "MAX_STREAMS_PER_CLIENT"),
        ({"streams": 250_000}, "MAX_STREAMS"),
        ({"running": 999}, "MAX_RUNNING"),
        ({"queued": 999}, "MAX_QUEUED"),
    ],
)
def test_places_that_never_run_out_are_missing_limits(seen: Any, names: str) -> None:
    wide = Settings(max_streams_per_client=10**6, max_streams=10**6, max_running=1000, max_queued=100_000)
    states = [State(slots=1000, **seen)]
    cause = find_missing_limits(Numbers(window_s=300, states=states), wide)
    assert cause is not None
    assert f"SCANWIRE_{names} (" in cause.cure
    assert find_missing_limits(Numbers(window_s=300, states=states), Settings()) is None
    met = [State(slots=1000, refused={"streams": 1, "streams-in-all": 1}, **seen)]
    found = find_missing_limits(Numbers(window_s=300, states=met), wide)
    assert (found is None) is ("STREAMS" in names)


# Memory and CPU


async def test_a_scanner_that_leaks_is_found_in_the_workers(tmp_path: Path, sample_prices: Path) -> None:
    settings = QUICK | {"memory_window_s": 3, "workers": 1, "chunk_rows": 1}
    async with serve(tmp_path, sample_prices, **settings) as serving:
        leaking = asyncio.create_task(_scan_for_ever(serving, "trial-leaking"))
        cause = await until_cause(serving, "memory growing")
        leaking.cancel()
        assert cause["kind"] == "application logic"
        assert "A scanner keeps something" in cause["cure"]
        before, after = re.findall(r"its workers from ([0-9,]+) to ([0-9,]+)", cause["evidence"])[0]
        assert int(after.replace(",", "")) - int(before.replace(",", "")) >= 8


async def _scan_for_ever(serving: Serving, scanner: str) -> None:
    while True:
        await serving.finish((await serving.submit(scanner))["id"])


def grow(*megabytes: float) -> Numbers:
    """Over an hour, so many megabytes at even distances."""
    memory = [Memory(at * 3600 / len(megabytes), int(size * 2**20)) for at, size in enumerate(megabytes)]
    return Numbers(window_s=300, memory=memory, memory_window_s=3600)


def test_memory_that_was_taken_once_does_not_grow() -> None:
    settings = Settings()
    for step in (3, 10, 15, 20, 27):
        assert find_memory_growth(grow(*[100] * step, *[900] * (30 - step)), settings) is None, step
    assert find_memory_growth(grow(*[100, 1500] * 15), settings) is None
    cause = find_memory_growth(grow(*(100 + 20 * at for at in range(30))), settings)
    assert cause is not None
    assert cause.evidence.startswith("600 MB/h: in 3,480 s the server went from 100 to 680 MB")


async def test_a_server_that_needs_a_whole_core_is_found(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices, **(QUICK | {"diagnosis_window_s": 2})) as serving:
        is_over, data = threading.Event(), bytes(2**20)

        def burn() -> None:
            while not is_over.is_set():
                hashlib.sha256(data).digest()  # the fault itself, which other Python code does not wait for

        # Several, since other processes on the machine may want the cores too.
        burning = [asyncio.create_task(asyncio.to_thread(burn)) for _ in range(4)]
        try:
            cause = await until_cause(serving, "CPU of the server process")
        finally:
            is_over.set()
            await asyncio.gather(*burning)
        assert cause["kind"] == "resource contention"


# Measures that no other test brings out of their targets


async def test_slow_answers_are_measured(tmp_path: Path, sample_prices: Path) -> None:
    def wait(app: Any) -> Any:
        timing = app.app._otherwise
        inner = timing.app

        async def serve_slowly(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http" and scope["path"] == "/v1/scanners":
                await asyncio.sleep(0.2)  # the fault itself
            await inner(scope, receive, send)

        timing.app = serve_slowly
        return app

    async with serve(tmp_path, sample_prices, wrap=wait, target_answer_s=0.04, **QUICK) as serving:
        await asyncio.gather(*(serving.http.get("/v1/scanners") for _ in range(20)))
        measured = await until_measured(serving, "answer time p95")
        assert 0.2 <= measured["value"] < 2


async def test_long_waits_for_a_slot_are_measured(tmp_path: Path, sample_prices: Path, gate: Gate) -> None:
    async with serve(tmp_path, sample_prices, max_running=1, target_queue_wait_s=0.1, **QUICK) as serving:
        ids = [(await serving.submit("trial-gated", gate=str(gate.path)))["id"] for _ in range(2)]
        await asyncio.sleep(0.4)  # the fault itself
        gate.open()
        for scan_id in ids:
            await serving.finish(scan_id)
        assert (await until_measured(serving, "queue wait p95"))["value"] >= 0.4


async def test_pushing_late_is_measured(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices, batch_ms=300, target_push_lag_s=0.1, **QUICK) as serving:
        scan = await submit_external(serving)
        token = {"Authorization": f"Bearer {scan['producer_token']}"}
        async with serving.http.stream("GET", scan["links"]["events"], headers=LINES) as stream:
            lines = stream.aiter_lines()
            for number in range(6):
                row = [{"type": "matches", "rows": [{"number": number}]}]
                await serving.http.post(scan["links"]["events"], json=row, headers=token)
                while f'"number":{number}' not in await anext(lines):
                    pass
            assert (await until_measured(serving, "push lag p99"))["value"] >= 0.3


async def test_reads_that_are_mostly_polls_are_measured(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices, **QUICK) as serving:
        scan = await submit_external(serving)
        for _ in range(120):
            await serving.http.get(scan["links"]["self"])
        assert (await until_measured(serving, "poll share of reads"))["value"] > 0.9
        assert (await get_report(serving))["emergency"]["is_on"] is False
