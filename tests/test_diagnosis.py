"""The diagnosis: each fault is caused for real and found, and a calm service raises nothing."""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from app.core.settings import Settings, hash_key
from app.eventstream import SseDecoder
from app.observe.diagnosis import Diagnosis, diagnose
from app.observe.incidents import Change, Emergency, Incidents
from app.observe.measures import Reading, Severity, judge
from app.observe.metrics import LAG_EVERY_S
from app.observe.tally import Numbers, State, Tally
from tests.conftest import Gate
from tests.serving import Serving, serve

pytestmark = pytest.mark.usefixtures("trial_scanners")

# The service looks often, and what is over is forgotten soon.
QUICK: dict[str, Any] = {"diagnose_every_s": 0.1, "diagnosis_window_s": 4, "incident_resolve_s": 0.5}
EXTERNAL = {"scanner": "external", "params": {"title": "work"}}


async def get_report(serving: Serving) -> Any:
    answer = await serving.http.get("/v1/diagnosis")
    assert answer.status_code == 200, answer.text
    return answer.json()


async def until_report(serving: Serving, is_so: Any) -> Any:
    """The first report of which something is so; each look of the service is waited for."""
    report: Any = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(20):
            while not is_so(report := await get_report(serving)):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    assert is_so(report), report
    return report


async def until_cause(serving: Serving, name: str) -> Any:
    report = await until_report(serving, lambda report: name in [cause["name"] for cause in report["causes"]])
    return next(cause for cause in report["causes"] if cause["name"] == name)


async def submit_external(serving: Serving) -> Any:
    return (await serving.http.post("/v1/scans", json=EXTERNAL)).json()


@contextlib.asynccontextmanager
async def following(serving: Serving) -> AsyncIterator[Any]:
    """The events of operations, one at a time."""
    async with serving.http.stream("GET", "/v1/operations/events") as stream:
        decoder = SseDecoder()

        async def read() -> AsyncIterator[Any]:
            async for piece in stream.aiter_bytes():
                for frame in decoder.feed_frames(piece):
                    yield orjson.loads(frame)

        yield read()


async def read_event(events: Any, **wanted: Any) -> Any:
    """The next one with these members in its data."""
    async with asyncio.timeout(20):
        async for event in events:
            if event["data"].items() >= wanted.items():
                return event
    raise AssertionError(wanted)


# Calm


async def test_a_calm_service_raises_nothing(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices, **(QUICK | {"diagnosis_window_s": 300})) as serving:
        for setup in ("gap-up", "volume-surge", "momentum-breakout"):
            await serving.finish((await serving.submit(setup))["id"])
        scan = await submit_external(serving)
        for _ in range(4):  # a client that heeds its hints
            snapshot = (await serving.http.get(scan["links"]["self"])).json()
            await asyncio.sleep(snapshot["poll_after_s"] / 2)
        report = await get_report(serving)
        assert report["severity"] == "healthy", report
        assert (report["causes"], report["incidents"]) == ([], [])
        assert report["emergency"] == {"is_on": False, "since_ts": None, "reason": ""}
        measured = {measure["measure"]: measure["value"] for measure in report["measures"]}
        assert len(measured) == 8
        assert 0 < measured["scan duration p95"] < 30
        assert 0 < measured["answer time p95"] < 2
        assert measured["memory growth"] is None  # too short a time to tell
        assert serving.service.lookout.changes == {}
        assert b'scanwire_incidents_open{severity="P0"} 0.0' in (await serving.http.get("/metrics")).content


# Faults


async def test_a_client_that_polls_at_10_hz_is_found_and_told_apart_from_one_that_heeds_its_hints(
    tmp_path: Path, sample_prices: Path
) -> None:
    keys = tuple(f"{name}:{hash_key(name)}" for name in ("rude", "kind"))
    settings = {"api_keys": keys, "operator_keys": (f"root:{hash_key('root')}",), "early_polls_max": 20}
    async with serve(tmp_path, sample_prices, **(QUICK | settings)) as serving:
        root, rude, kind = ({"Authorization": f"Bearer {name}"} for name in ("root", "rude", "kind"))
        scan = (await serving.http.post("/v1/scans", json=EXTERNAL, headers=rude)).json()
        serving.http.headers.update(root)
        await serving.http.get(scan["links"]["self"], headers=kind)
        for _ in range(30):
            await serving.http.get(scan["links"]["self"], headers=rude)
            await asyncio.sleep(0.1)  # the fault itself
        cause = await until_cause(serving, "aggressive polling")
        assert cause["kind"] == "API behaviour"
        assert list(cause["clients"]) == [serving.service.lookout._tally.hash_client("key:rude")]
        assert "rude" not in str(cause)
        assert cause["evidence"].startswith("1 client polled ")
        assert "poll_after_s" in cause["cure"]


async def test_a_blocked_loop_is_found(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices, block_report_ms=100, target_loop_lag_s=0.1, **QUICK) as serving:
        for _ in range(3):
            time.sleep(0.5)  # noqa: ASYNC251 - the fault itself
            await asyncio.sleep(2 * LAG_EVERY_S)
        cause = await until_cause(serving, "blocked event loop")
        assert cause["kind"] == "application logic"
        assert "action=loop_blocked" in cause["cure"]
        report = await get_report(serving)
        (lag,) = (measure for measure in report["measures"] if measure["measure"] == "loop lag p99")
        assert lag["value"] > 0.3
        assert (lag["severity"], lag["act_within_h"]) in (("P1", 24), ("P0", 4))


async def test_a_reconnect_storm_is_found(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices, storm_connects_min=30, **QUICK) as serving:
        scan = await submit_external(serving)
        for _ in range(35):
            async with serving.http.stream(
                "GET", scan["links"]["events"], headers={"Accept": "application/x-ndjson"}
            ) as stream:
                await anext(stream.aiter_bytes())
        cause = await until_cause(serving, "reconnect storm")
        assert sum(cause["clients"].values()) >= 30


async def test_full_slots_with_scans_that_wait_are_found(tmp_path: Path, sample_prices: Path, gate: Gate) -> None:
    async with serve(tmp_path, sample_prices, max_running=1, **QUICK) as serving:
        ids = [(await serving.submit("trial-gated", gate=str(gate.path)))["id"] for _ in range(2)]
        cause = await until_cause(serving, "saturated concurrency")
        assert cause["kind"] == "resource contention"
        assert cause["evidence"].startswith("all 1 slots were taken and up to 1 scans waited")
        gate.open()
        for scan_id in ids:
            await serving.finish(scan_id)
        await until_report(serving, lambda report: not report["causes"])


async def test_memory_that_grows_is_found(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices, memory_window_s=2, **QUICK) as serving:
        leaked = []
        for _ in range(16):
            leaked.append(bytes(bytearray(4 * 2**20).replace(b"\0", b"x")))
            await asyncio.sleep(0.1)
        cause = await until_cause(serving, "memory growing")
        assert cause["kind"] == "application logic"
        report = await get_report(serving)
        (growth,) = (measure for measure in report["measures"] if measure["measure"] == "memory growth")
        assert growth["severity"] == "P0"
        del leaked


async def test_a_scanner_whose_chunks_blow_their_budget_is_found_by_name(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices, target_chunk_s=0.5, **QUICK) as serving:
        await serving.finish((await serving.submit("gap-up"))["id"])
        await serving.finish((await serving.submit("trial-slow", pause_ms=800))["id"])
        cause = await until_cause(serving, "chunks over their budget")
        assert re.search(r"one chunk: trial-slow [0-9.]+ s; the budget", cause["evidence"])
        assert "gap-up" not in cause["evidence"]


async def test_refusals_are_measured(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices, **(QUICK | {"read_burst": 20, "read_per_s": 1})) as serving:
        for _ in range(100):
            await serving.http.get("/v1/scanners")

        def is_measured(report: Any) -> bool:
            (refusals,) = (measure for measure in report["measures"] if measure["measure"] == "refusal rate")
            return bool(refusals["severity"] == "P1" and 0.3 < refusals["value"] < 0.9)

        report = await until_report(serving, is_measured)
        assert report["emergency"]["is_on"] is False  # the limits hold; that is no emergency


# Incidents and emergency


async def test_p0_tightens_the_limits_leaves_streams_alone_and_lifts_by_itself(
    tmp_path: Path, sample_prices: Path
) -> None:
    tight = {"target_scan_s": 0.01, "emergency_calm_s": 1, "heavy_rows": 1000}
    async with serve(tmp_path, sample_prices, **(QUICK | tight)) as serving, following(serving) as events:
        external = await submit_external(serving)
        accept = {"Accept": "application/x-ndjson"}
        async with serving.http.stream("GET", external["links"]["events"], headers=accept) as stream:
            lines = stream.aiter_lines()
            first = (await serving.http.get(external["links"]["self"])).json()["poll_after_s"]
            await serving.finish((await serving.submit("trial-slow", pause_ms=300))["id"])
            opened = await read_event(events, subject="scan duration p95")
            assert (opened["type"], opened["data"]["change"], opened["data"]["severity"]) == (
                "incident",
                "opened",
                "P0",
            )
            refused = await serving.http.post("/v1/scans", json={"scanner": "gap-up", "reuse": "never"})
            while refused.status_code != 503:  # the emergency begins with the same look or one before
                await read_event(events, is_on=True)
                refused = await serving.http.post("/v1/scans", json={"scanner": "gap-up", "reuse": "never"})
            assert refused.json()["limit"] == "emergency"
            assert "no heavy scan" in refused.json()["detail"]
            snapshot = await serving.http.get(external["links"]["self"])
            assert snapshot.json()["poll_after_s"] > 3 * first
            assert snapshot.headers["RateLimit-Policy"] == '"read";q=5;w=5'
            assert serving.service.lookout.is_emergency

            token = {"Authorization": f"Bearer {external['producer_token']}"}
            row = [{"type": "matches", "rows": [{"page": "a"}]}]
            assert (await serving.http.post(external["links"]["events"], json=row, headers=token)).status_code == 202
            async with asyncio.timeout(5):
                while '"page"' not in await anext(lines):
                    pass

            resolved = await read_event(events, change="resolved")
            assert resolved["data"]["subject"] == "scan duration p95"
            lifted = await read_event(events, is_on=False)
            assert lifted["data"]["by"] == "diagnosis"
        policy = (await serving.http.get(external["links"]["self"])).headers["RateLimit-Policy"]
        assert policy.startswith('"read";q=100000;')
        assert (await serving.http.post("/v1/scans", json={"scanner": "gap-up"})).status_code in (200, 202)


async def test_an_operator_declares_and_lifts_an_emergency_and_nobody_else_does(
    tmp_path: Path, sample_prices: Path
) -> None:
    keys: dict[str, Any] = {"api_keys": (f"ann:{hash_key('ann')}",), "operator_keys": (f"root:{hash_key('root')}",)}
    async with serve(tmp_path, sample_prices, **keys) as serving:
        ann, root = ({"Authorization": f"Bearer {name}"} for name in ("ann", "root"))
        switch = {"is_on": True, "reason": "a drill"}
        for path in ("/v1/diagnosis", "/v1/operations/events"):
            assert (await serving.http.get(path, headers=ann)).status_code == 403
        path = "/v1/operations/emergency"
        assert (await serving.http.post(path, json=switch, headers=ann)).status_code == 403
        assert not serving.service.lookout.is_emergency
        on = await serving.http.post(path, json=switch, headers=root)
        assert (on.json()["is_on"], on.json()["reason"]) == (True, "a drill")
        assert b"scanwire_emergency 1.0" in (await serving.http.get("/metrics", headers=ann)).content
        off = await serving.http.post(path, json={"is_on": False}, headers=root)
        assert off.json()["is_on"] is False
        assert (await serving.http.post(path, json={"is_on": 7}, headers=root)).status_code == 422
        told = [event["data"]["is_on"] for event in serving.service.lookout._kept]
        assert told == [True, False]


# Rules on numbers


@pytest.mark.parametrize(
    ("ratio", "severity"),
    [(0, "healthy"), (1.49, "healthy"), (1.5, "P2"), (2.99, "P2"), (3, "P1"), (10, "P1"), (10.01, "P0")],
)
def test_the_severity_is_the_ratio_to_the_target(ratio: float, severity: str) -> None:
    assert judge(ratio) == severity


def test_no_numbers_are_no_fault() -> None:
    found = diagnose(Numbers(window_s=300, states=[State()]), Settings())
    assert (found.severity, found.causes) == (Severity.HEALTHY, [])
    assert [reading.value for reading in found.readings] == [None] * 8


def test_what_happened_before_the_first_look_counts_too() -> None:
    refused = {"read": 0}
    tally = Tally(300, 3600, lambda: State(refused=dict(refused)))
    for _ in range(100):
        tally.note_answer(0.01)
    refused["read"] += 60
    tally.sample()
    (refusals,) = (one for one in diagnose(tally.read(), Settings()).readings if one.measure == "refusal rate")
    assert (refusals.value, refusals.severity) == (0.6, Severity.P1)


def look(ratio: float) -> Diagnosis:
    severity = judge(ratio)
    reading = Reading("answer time p95", 2 * ratio, 2, "s", ratio, severity, None, True)
    return Diagnosis(severity, [reading], [])


def test_an_incident_opens_at_the_second_look_escalates_and_is_over_after_a_calm_while_without_flapping() -> None:
    incidents = Incidents(resolve_s=10)

    def step(now: float, ratio: float) -> list[tuple[Change, Severity]]:
        return [(change, incident.severity) for change, incident in incidents.step(now, look(ratio))]

    assert step(0, 2) == []
    assert step(1, 0) == []  # one bad look is none
    assert step(2, 2) == []
    assert step(3, 2) == [(Change.OPENED, Severity.P2)]
    assert step(4, 20) == [(Change.ESCALATED, Severity.P0)]
    for now in range(5, 40):  # flickers
        assert step(now, 20 if now % 3 else 0) == []
    assert [step(now, 0) for now in (45, 47)] == [[], []]
    assert step(49, 0) == [(Change.RESOLVED, Severity.P0)]
    assert incidents.open == []


def test_an_emergency_lasts_until_nothing_urgent_was_wrong_for_a_while() -> None:
    emergency = Emergency(calm_s=10)
    assert not emergency.step(0, look(9))
    assert emergency.step(1, look(11))
    assert not emergency.step(2, look(11))
    assert not emergency.step(8, look(4))  # better, and not well yet
    assert not emergency.step(17, look(0))
    assert emergency.step(18, look(0))
    assert emergency.since is None
