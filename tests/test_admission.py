"""Rules of the door: what is the same is answered by one scan, what is asked twice runs once, and what it costs."""

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect

from app.core.errors import Conflict, InvalidParams
from app.core.scan import State
from app.engine.limits import PolicyName
from tests.conftest import Gate, until
from tests.serving import Serving, serve
from tests.test_bad_input import ask
from tests.test_engine import running
from tests.test_log import open_log

pytestmark = pytest.mark.usefixtures("trial_scanners")


async def test_the_same_question_is_answered_by_one_scan(tmp_path: Path, sample_prices: Path, gate: Gate) -> None:
    async with running(tmp_path, sample_prices, reuse_s=60) as engine:
        same: dict[str, Any] = {"scanner": "trial-gated", "reuse": "auto", "gate": str(gate.path)}
        scans = await asyncio.gather(*(engine.submit(**same, client=f"c{number}") for number in range(5)))
        assert len({scan.id for scan in scans}) == 1
        assert (await engine.submit(**same | {"symbols": ["AAPL"]})).id != scans[0].id
        gate.open()
        await engine.finish(scans[0])
        assert (await engine.submit(**same)).id == scans[0].id
        engine.now += 61
        assert (await engine.submit(**same)).id != scans[0].id


async def test_a_scan_that_did_not_complete_is_not_joined(tmp_path: Path, sample_prices: Path) -> None:
    async with running(tmp_path, sample_prices) as engine:
        scan = await engine.finish(await engine.submit("trial-raising", reuse="auto"))
        assert scan.state is State.FAILED
        assert (await engine.submit("trial-raising", reuse="auto")).id != scan.id


async def test_a_repeated_post_with_the_same_key_runs_once(tmp_path: Path, sample_prices: Path) -> None:
    async with running(tmp_path, sample_prices) as engine:
        scans = await asyncio.gather(*(engine.submit(key="k1") for _ in range(3)))
        assert len({scan.id for scan in scans}) == 1
        assert (await engine.submit(key="k1", client="you")).id != scans[0].id
        with pytest.raises(Conflict):
            await engine.submit("gap-up", key="k1")
        with pytest.raises(InvalidParams):
            await engine.submit(key="k" * 300)
    async with running(tmp_path, sample_prices) as engine:
        assert (await engine.submit(key="k1")).id == scans[0].id


async def test_a_run_that_was_forced_does_not_take_the_place_of_a_scan_that_can_be_joined(
    tmp_path: Path, sample_prices: Path, gate: Gate
) -> None:
    async with running(tmp_path, sample_prices) as engine:
        joinable = await engine.finish(await engine.submit("gap-up", reuse="auto"))
        forced = await engine.submit("gap-up", reuse="never")
        await engine.runner.cancel(forced.id, "me")
        await engine.finish(forced)
        assert (await engine.submit("gap-up", reuse="auto")).id == joinable.id


# What a submission costs


def count_left(serving: Serving, policy: PolicyName) -> int:
    return int(serving.service.limits.headers(policy, "ip:127.0.0.1")["RateLimit"].partition("r=")[2].partition(";")[0])


async def test_what_is_refused_or_joined_costs_a_read_and_what_runs_does_not(
    tmp_path: Path, sample_prices: Path
) -> None:
    async with serve(tmp_path, sample_prices, read_burst=9, read_per_s=0.001, submit_per_min=5) as serving:
        good, bad = {"scanner": "gap-up"}, {"scanner": "gap-down"}
        assert (await serving.http.post("/v1/scans", json=good)).status_code == 202
        assert (count_left(serving, "read"), count_left(serving, "submit")) == (9, 4)
        assert (await serving.http.post("/v1/scans", json=good)).json()["joined"] is True
        assert (count_left(serving, "read"), count_left(serving, "submit")) == (8, 4)
        for body in (bad, {**good, "params": {"symbols": ["NOSUCH"]}}):
            assert (await serving.http.post("/v1/scans", json=body)).status_code == 422
        assert (await serving.http.post("/v1/scans", content=b"no json")).status_code == 415
        assert (count_left(serving, "read"), count_left(serving, "submit")) == (5, 4)
        async with connect(serving.url.replace("http", "ws") + "/v1/ws") as socket:
            for message, left in (
                ('{"op":"submit","scanner":"gap-up"}', 4),
                ('{"op":"submit","scanner":"gap-down"}', 3),
                ('{"op":"submit","scanner":"gap-up","reuse":"never"}', 3),
            ):
                await ask(socket, message)
                assert count_left(serving, "read") == left
        for status in (422, 422, 422, 429):
            answer = await serving.http.post("/v1/scans", json=bad)
            assert answer.status_code == status
        assert answer.json()["limit"] == "read"


# A journal that cannot be written


async def test_a_journal_that_cannot_be_written_holds_up_neither_a_request_nor_the_stop(
    tmp_path: Path, sample_prices: Path, gate: Gate
) -> None:
    async with serve(tmp_path, sample_prices, chunk_rows=1, commit_wait_s=0.2) as serving:
        scan = await serving.submit("trial-gated", gate=str(gate.path))
        await until(lambda: serving.service.log.get(scan["id"]).state is State.RUNNING)
        other = sqlite3.connect(tmp_path / "journal.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        async with asyncio.timeout(10):  # each of them waits 0.2 s for the journal, and nothing else
            for answer in (
                await serving.http.post("/v1/scans", json={"scanner": "gap-up"}),
                await serving.http.delete(f"/v1/scans/{scan['id']}"),
            ):
                assert answer.status_code == 503, answer.text
                assert answer.json()["retry_after_s"] == int(answer.headers["retry-after"]) == 10
            assert (await serving.http.get(f"/v1/scans/{scan['id']}")).json()["state"] == "running"
            stopping = asyncio.get_running_loop().time()
    # SQLite itself waits up to 2 s for a lock, once for what is under way.
    assert asyncio.get_running_loop().time() - stopping < 10
    other.execute("ROLLBACK")
    other.close()
    async with open_log(tmp_path) as log:
        assert [kept.id for kept in log.list_scans()] == [scan["id"]]
        events = await log.read(scan["id"], 0)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert log.get(scan["id"]).seq == len(events)
