"""The routes of old, one by one: what they take, what they answer, and what each answer says of its own end."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app.api.deprecation import ROUTES
from app.core.settings import Settings
from app.engine.worker import find_rows
from app.scanners.registry import get_scanner, validate_params
from tests import naive
from tests.legacy.clients import Clock, listen
from tests.legacy.oracle import Oracle
from tests.serving import Serving, serve
from tests.test_scanners import histories_of, make_table

WHOLE = {"start_date": "2000-01-03", "end_date": "2013-03-01"}
DAYS = tuple(WHOLE.values())
UNKNOWN = "s_" + "A" * 22


async def execute(serving: Serving, **request: Any) -> Any:
    answer = await serving.http.post("/api/scan/execute", json=request)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def ask(serving: Serving, path: str) -> Any:
    return (await serving.http.get(path)).json()


async def test_every_answer_has_the_members_of_old(serving: Serving) -> None:
    assert await ask(serving, "/api/scan/status") == {"scan_id": None, "status": "no_scans", "progress_percent": 0}
    executed = await execute(serving, **WHOLE)
    assert list(executed) == ["success", "scan_id", "message", "execution_time", "results", "total_found"]
    scan_id = executed["scan_id"]
    status = await ask(serving, f"/api/scan/status/{scan_id}")
    assert set(status) == {
        *("scan_id", "status", "progress_percent", "message", "start_date", "end_date", "created_at"),
        *("results", "total_found", "execution_time", "error"),
    }
    assert (status["status"], status["progress_percent"], status["error"]) == ("completed", 100, None)
    assert (status["start_date"], status["end_date"]) == DAYS
    assert await ask(serving, "/api/scan/status") == status
    results = await ask(serving, f"/api/scan/results/{scan_id}")
    assert set(results) == {"scan_id", "status", "results", "total_found", "execution_time", "date_range"}
    assert results["date_range"] == WHOLE
    listed = await ask(serving, "/api/scan/list")
    assert listed == {"scans": [{name: value for name, value in status.items() if name != "results"}]}
    execution = await ask(serving, f"/api/scans/{scan_id}")
    assert set(execution) == {
        *("success", "execution_id", "scan_id", "status", "progress_percent", "message", "results", "total_found"),
        "timestamp",
    }
    assert execution["success"]
    assert list(results["results"][0]) == [
        *("ticker", "date", "gap_pct", "parabolic_score", "lc_frontside_d2_extended", "volume", "close"),
        "confidence_score",
    ]
    assert set(await ask(serving, "/api/health")) == {"status", "timestamp", "active_scans", "version", "mode"}
    performance = await ask(serving, "/api/performance")
    assert set(performance) == {
        *("cpu_cores", "max_concurrent_scans", "active_scans", "rate_limit", "scan_cleanup_interval", "memory_usage"),
        *("response_time_avg", "available_scanners"),
    }
    assert 0 < performance["response_time_avg"] < 2
    assert performance["memory_usage"] > 10


async def test_what_is_not_there_is_told_as_of_old(serving: Serving) -> None:
    for path in (f"/api/scan/status/{UNKNOWN}", f"/api/scan/results/{UNKNOWN}"):
        answer = await serving.http.get(path)
        assert (answer.status_code, answer.json()) == (404, {"detail": "Scan not found"})
    answer = await serving.http.get(f"/api/scans/{UNKNOWN}")
    assert answer.status_code == 200
    assert (answer.json()["success"], answer.json()["status"]) == (False, "not_found")
    other = (await serving.submit())["id"]  # its rows have no form of old
    assert (await serving.http.get(f"/api/scan/status/{other}")).status_code == 404


async def test_every_answer_says_since_when_it_is_deprecated_and_what_takes_its_place(serving: Serving) -> None:
    scan_id = (await execute(serving, **WHOLE))["scan_id"]
    one = f"/v1/scans/{scan_id}"
    successors = {
        "/api/scan/status": "/v1/scans",
        "/api/scan/list": "/v1/scans",
        f"/api/scan/status/{scan_id}": one,
        f"/api/scan/results/{scan_id}": f"{one}/matches",
        f"/api/scans/{scan_id}": one,
        "/api/health": "/v1/performance",
        "/api/performance": "/v1/performance",
    }
    answers = [(await serving.http.get(path), successor) for path, successor in successors.items()]
    bodies: list[Any] = [{}, {"uploaded_code": "print()"}, {"start_date": "soon"}]  # refusals too
    answers += [(await serving.http.post("/api/scan/execute", json=body), "/v1/scans") for body in bodies]
    answers.append((await serving.http.post("/api/operation/execute", json={}), "/v1/scans"))
    answers.append((await serving.http.get("/api/nothing/here"), "/v1/scans"))
    answers.append((await serving.http.put("/api/scan/execute"), "/v1/scans"))
    answers.append((await serving.http.get(f"/api/scan/status/{UNKNOWN}"), f"/v1/scans/{UNKNOWN}"))
    answers.append((await serving.http.get("/api/scan/status/%3E%22é"), "/v1/scans/ID"))
    answers.append((await serving.http.get("/api/health", headers={"Host": "evil.example"}), "/v1/performance"))
    for answer, successor in answers:
        assert answer.headers["Deprecation"] == "@1793491200"
        assert answer.headers["Link"] == f'<{successor}>; rel="successor-version"'
    assert {answer.status_code for answer, _ in answers} == {200, 400, 404, 405, 422}
    for path in ("/v1/scans", "/healthz", "/apix"):
        assert "Deprecation" not in (await serving.http.get(path)).headers


async def test_metrics_count_the_calls_by_route(serving: Serving) -> None:
    scan_id = (await execute(serving, **WHOLE))["scan_id"]
    for _ in range(3):
        await serving.http.get(f"/api/scan/status/{scan_id}")
    await serving.http.get("/api/scan/nothing")
    await listen(serving.url, scan_id)
    text = (await serving.http.get("/metrics")).text
    counts = {
        line.partition('route="')[2].partition('"')[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith("scanwire_legacy_calls_total{")
    }
    expected = {"/api/scan/execute": 1, "/api/scan/status/{id}": 3, "/api/scan/progress/{id}": 1, "other": 1}
    assert counts == dict.fromkeys(ROUTES, 0) | expected


@pytest.mark.parametrize(
    ("request_", "setups"),
    [
        ({"scanner_type": "lc"}, ()),
        ({"filters": {"scan_type": "gap_up"}}, ("gap-up",)),
        ({"filters": {"scan_type": "breakout"}}, ("momentum-breakout",)),
        ({"filters": {"scan_type": "volume"}}, ("volume-surge",)),
        ({"filters": {"scan_type": "general"}}, ("gap-up", "momentum-breakout", "volume-surge")),
        ({"filters": {"scan_type": "another", "new_highs": True}, "scanner_type": None}, ()),
        ({"scanner_type": "a_plus", "filters": {"scan_type": "gap_up"}}, ("a-plus",)),
    ],
    ids=str,
)
async def test_scan_types_choose_the_setups(
    serving: Serving, oracle: Oracle, request_: dict[str, Any], setups: tuple[str, ...]
) -> None:
    oracle.check((await execute(serving, **WHOLE, **request_))["results"], *DAYS, *setups)


@pytest.mark.parametrize("least", [{"volume": 60e6}, {"gap_atr": 0.75}, {"volume": 3.5e7, "gap_atr": 1.25e-3}], ids=str)
async def test_filters_choose_rows_and_never_cut_history(
    serving: Serving, oracle: Oracle, least: dict[str, Any]
) -> None:
    answer = await execute(serving, **WHOLE, filters={f"min_{name}": bound for name, bound in least.items()})
    oracle.check(answer["results"], *DAYS, **least)
    assert 0 < answer["total_found"] < len(oracle.list_rows(*DAYS))


async def test_the_rows_of_the_merge_are_those_of_the_setups_over_v1(serving: Serving) -> None:
    merged = {}
    for setup in ("gap-up", "volume-surge", "lc-d2", "lc-d2-1", "lc-d3-1"):
        scan = await serving.submit(setup, start=DAYS[0], end=DAYS[1])
        await serving.finish(scan["id"])
        for row in (await ask(serving, scan["links"]["matches"]))["rows"]:
            merged[row["symbol"], row["date"]] = row
    rows = (await execute(serving, **WHOLE))["results"]
    assert {(row["ticker"], row["date"]) for row in rows} == merged.keys()
    for row in rows:
        other = merged[row["ticker"], row["date"]]
        for name in ("gap_pct", "parabolic_score", "volume", "close"):
            assert row[name] == other[name]


async def test_days_that_are_left_out_are_the_last_thirty_that_there_are_prices_for(
    serving: Serving, oracle: Oracle
) -> None:
    last = serving.service.store.last
    first = last - timedelta(days=30)
    for request in ({}, {"start_date": None, "end_date": None}):
        answer = await execute(serving, **request)
        status = await ask(serving, f"/api/scan/status/{answer['scan_id']}")
        assert (status["start_date"], status["end_date"]) == (first.isoformat(), last.isoformat())
        oracle.check(answer["results"], first.isoformat(), last.isoformat())
    empty = await serving.http.post("/api/scan/execute")
    assert empty.json()["scan_id"] == answer["scan_id"]
    later = (last + timedelta(days=400)).isoformat()
    answer = await execute(serving, start_date=later)
    assert (await ask(serving, f"/api/scan/status/{answer['scan_id']}"))["end_date"] == later


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"uploaded_code": "def main(): pass", "scanner_type": "uploaded"}, 400, "never runs code"),
        ([], 400, "not a JSON object"),
        ({"scanner_type": "uploaded"}, 422, "scanner_type"),
        ({"start_date": "03/01/2013"}, 422, "start_date"),
        ({"end_date": 20130301}, 422, "end_date"),
        ({"start_date": "2013-03-01", "end_date": "2013-02-28"}, 422, "is after end_date"),
        ({"filters": {"min_volume": "many"}}, 422, "min_volume"),
        ({"filters": {"min_gap_atr": -1}}, 422, "min_gap_atr"),
        ({"filters": {"min_gap_atr": True}}, 422, "min_gap_atr"),
        ({"filters": []}, 422, "filters"),
    ],
    ids=str,
)
async def test_what_cannot_be_meant_is_refused_with_the_reason(
    serving: Serving, body: Any, status: int, says: str
) -> None:
    answer = await serving.http.post("/api/scan/execute", json=body)
    assert answer.status_code == status
    assert says in answer.json()["detail"]


async def test_no_code_and_no_json_are_refused_by_the_operation_too(serving: Serving) -> None:
    for content in (b"{", b'{"uploaded_code": "x"}'):
        assert (await serving.http.post("/api/operation/execute", content=content)).status_code == 400
    for content in (b"", b"{}", b"[1]", b'"text"', b'{"start_date": 7}'):
        answer = await serving.http.post("/api/operation/execute", content=content)
        assert answer.json()["success"], answer.text


async def test_execute_has_a_bucket_of_its_own_that_is_given_back_when_there_is_no_place(
    tmp_path: Path, sample_prices: Path, clock: Clock
) -> None:
    async with serve(
        tmp_path,
        sample_prices,
        workers=1,
        clock=clock,
        legacy_execute_per_min=3,
        submit_per_min=1,
        max_active_per_client=2,
    ) as serving:
        serving.service.admission.is_draining = True
        for _ in range(5):
            answer = await serving.http.post("/api/scan/execute", json={})
            assert answer.status_code == 503
            assert "Retry-After" in answer.headers
            assert (await serving.http.post("/api/operation/execute", json={})).status_code == 503
        serving.service.admission.is_draining = False
        for year in (2001, 2002, 2003):
            await execute(serving, start_date=f"{year}-01-02")
        refused = await serving.http.post("/api/scan/execute", json={})
        assert refused.status_code == 429
        assert refused.json()["limit"] == "legacy-execute"
        assert int(refused.headers["Retry-After"]) == 20
        await clock.sleep(20)
        await execute(serving)
        assert (await serving.http.post("/api/operation/execute", json={})).status_code == 200
        assert (await serving.http.post("/api/operation/execute", json={})).json()["limit"] == "submit"


async def test_a_scan_that_another_client_submitted_is_the_newest_of_who_joined_it(
    tmp_path: Path, sample_prices: Path, clock: Clock
) -> None:
    async with serve(
        tmp_path, sample_prices, workers=1, clock=clock, trusted_proxies=("127.0.0.0/8",), session_idle_s=90
    ) as serving:
        submitted = await execute(serving, **WHOLE)
        another = {"X-Forwarded-For": "192.0.2.1"}
        newest = await serving.http.get("/api/scan/status", headers=another)
        assert newest.json()["status"] == "no_scans"
        joined = await serving.http.post("/api/scan/execute", json=WHOLE, headers=another)
        assert joined.json()["scan_id"] == submitted["scan_id"]
        newest = await serving.http.get("/api/scan/status", headers=another)
        assert newest.json()["scan_id"] == submitted["scan_id"]
        listed = await serving.http.get("/api/scan/list", headers=another)
        assert [scan["scan_id"] for scan in listed.json()["scans"]] == [submitted["scan_id"]]


async def test_a_scan_past_its_retention_is_gone_rather_than_empty(
    tmp_path: Path, sample_prices: Path, clock: Clock
) -> None:
    async with serve(tmp_path, sample_prices, clock=clock) as serving:
        scan_id = (await execute(serving, **WHOLE))["scan_id"]
        await clock.sleep(serving.service.settings.retention_s + 1)
        await serving.service.reaper.reap()
        assert serving.service.log.get(scan_id).is_trimmed
        assert (await serving.http.get(f"/api/scan/status/{scan_id}")).status_code == 404
        assert (await serving.http.get(f"/api/scan/results/{scan_id}")).status_code == 404
        assert (await ask(serving, "/api/scan/list")) == {"scans": []}
        (error,) = await listen(serving.url, scan_id)
        assert error["type"] == "error"


async def test_rows_are_held_in_memory_only_up_to_their_bound(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices, legacy_memory_bytes=30_000) as serving:
        for year in (2000, 2001, 2002):
            executed = await execute(serving, start_date=f"{year}-01-03", end_date="2013-03-01")
            assert len(json.dumps(executed["results"])) > 10_000
            again = await ask(serving, f"/api/scan/results/{executed['scan_id']}")
            assert again["results"] == executed["results"]


def test_a_day_of_lc_d2_is_marked_whatever_was_asked_for() -> None:
    """No real large cap is wild enough: a made-up one is."""
    calm: list[Any] = [(0.0, 0.004, 0.002, 0.002, 40_000_000, 1, "good")] * 60
    wild: list[Any] = [(0.06, 0.2, 0.01, 0.001, 400_000_000, 1, "good")] * 6
    frame = make_table([calm + wild + calm, calm])
    histories = histories_of(frame)
    params = get_scanner("lc-d2").params()
    marked = set(naive.find("lc-d2", histories, params).rows)
    assert marked
    scanner = get_scanner("legacy")
    for setups in (["gap-up"], ["volume-surge", "lc-d2"], ["lc-d3-1", "gap-up", "a-plus"]):
        rows = find_rows(scanner, validate_params(scanner, {"setups": setups}), frame)
        found = {name: naive.find(name, histories, get_scanner(name).params()).rows for name in setups}
        assert {(row["symbol"], row["date"]) for row in rows} == set().union(*found.values())
        for row in rows:
            key = (row["symbol"], row["date"])
            assert row["lc_frontside_d2_extended"] == (key in marked)
            assert set(row["setups"].split(",")) == {name for name in setups if key in found[name]}
        assert any(row["lc_frontside_d2_extended"] for row in rows)


async def test_the_same_rows_come_from_the_real_universe(tmp_path: Path, real_prices: Path) -> None:
    """Half a year of 505 symbols: more rows than are made on the event loop, from a worker process."""
    days = ("2017-06-01", "2018-02-07")
    async with serve(tmp_path, real_prices) as serving:
        rows = (await execute(serving, start_date=days[0], end_date=days[1]))["results"]
        merged = set()
        for setup in ("gap-up", "volume-surge", "lc-d2", "lc-d2-1", "lc-d3-1"):
            scan = await serving.submit(setup, start=days[0], end=days[1])
            await serving.finish(scan["id"])
            merged |= {(row["symbol"], row["date"]) for row in (await ask(serving, scan["links"]["matches"]))["rows"]}
    assert len(rows) > 1000
    assert {(row["ticker"], row["date"]) for row in rows} == merged
    assert len(rows) == len(merged)


def test_waiting_for_the_end_is_bounded_by_a_setting() -> None:
    assert Settings().legacy_wait_s == 20
