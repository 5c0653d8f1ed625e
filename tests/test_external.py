"""Scans whose work is done elsewhere: what a producer may append, and that nothing comes of what it may not."""

import asyncio
import json
import re
import shutil
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest
import pytest_asyncio

from app.api import models
from app.core.scan import digest_rows
from app.core.settings import hash_key
from tests.conftest import require
from tests.peers import meet
from tests.serving import Serving, serve

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("both_paths")]

NDJSON = {"Content-Type": "application/x-ndjson"}
ROW = {"city": "Oslo", "population": 717_710, "area_km2": 480.75, "is_capital": True, "twin": None}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(
    tmp_path_factory: pytest.TempPathFactory, sample_prices: Path, both_paths: None
) -> AsyncIterator[Serving]:
    bounds: dict[str, Any] = {"max_row_bytes": 1000, "max_matches": 1000, "max_events_per_request": 2000}
    async with serve(tmp_path_factory.mktemp("state"), sample_prices, **bounds) as serving:
        yield serving


class Production:
    """One external scan, and the requests of its producer."""

    def __init__(self, serving: Serving, snapshot: dict[str, Any]) -> None:
        self.serving, self.snapshot, self.id = serving, snapshot, snapshot["id"]
        self.path = snapshot["links"]["events"]
        self.headers = {"Authorization": f"Bearer {snapshot['producer_token']}"}

    async def post(self, events: Any, number: int | str | None = None, **others: Any) -> httpx.Response:
        headers = self.headers | ({} if number is None else {"Producer-Seq": str(number)})
        return await self.serving.http.post(self.path, json=events, headers=headers, **others)

    async def appended(self, events: Any, number: int | None = None) -> dict[str, Any]:
        answer = await self.post(events, number)
        assert answer.status_code == 202, answer.text
        appended: dict[str, Any] = answer.json()
        return appended

    async def refused(self, status: int, events: Any, field: str | None = None, number: Any = None) -> dict[str, Any]:
        """The problem of a request that changes nothing."""
        before = await self.look()
        answer = await self.post(events, number)
        problem = check_refusal(answer, status, field)
        assert await self.look() == before
        return problem

    async def look(self) -> tuple[Any, ...]:
        snapshot = (await self.serving.http.get(f"/v1/scans/{self.id}")).json()
        del snapshot["poll_after_s"]
        return snapshot, await self.events(), self.serving.service.log.get(self.id).producer

    async def events(self) -> list[dict[str, Any]]:
        return [event for event in (await self.serving.http.get(self.path)).json()["events"] if "id" in event]

    async def rows(self) -> list[dict[str, Any]]:
        return list((await self.serving.http.get(f"/v1/scans/{self.id}/matches")).json()["rows"])


def check_refusal(answer: httpx.Response, status: int, field: str | None = None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    problem: dict[str, Any] = models.Problem.model_validate_json(answer.content).model_dump(exclude_none=True)
    if field is not None:
        assert problem["errors"][0]["field"] == field, problem
    return problem


async def produce(serving: Serving, **params: Any) -> Production:
    return Production(serving, await serving.submit("external", **params))


def progress(done: int, **others: Any) -> dict[str, Any]:
    return {"type": "progress", "done": done, **others}


def matches(*rows: Any) -> dict[str, Any]:
    return {"type": "matches", "rows": list(rows)}


END = {"type": "end", "state": "completed"}


# The life of a scan


async def test_it_starts_at_once_without_slot_or_queue_and_its_token_is_kept_as_a_hash(serving: Serving) -> None:
    scan = await produce(serving, title="Cities", total=3, unit="cities")
    token = scan.snapshot["producer_token"]
    assert scan.snapshot["state"] == "running"
    assert scan.snapshot["data_version"] == "external"
    assert len(token) >= 32
    kept = serving.service.log.get(scan.id)
    assert kept.producer is not None
    assert kept.producer.token_hash == hash_key(token)
    assert token.encode() not in kept.to_record()
    assert "producer" not in (await serving.http.get(f"/v1/scans/{scan.id}")).text
    (started,) = await scan.events()
    assert (started["seq"], started["type"]) == (1, "started")
    assert started["data"]["params"] == {"title": "Cities", "total": 3, "unit": "cities"}
    assert (started["data"]["total"], started["data"]["unit"], started["data"]["attempt"]) == (3, "cities", 1)
    assert serving.service.runner.active == 0


async def test_what_is_posted_reaches_a_subscriber_as_of_any_other_scan(serving: Serving) -> None:
    scan = await produce(serving, total=2)
    received: list[dict[str, Any]] = []
    async with (
        asyncio.timeout(20),
        serving.http.stream("GET", scan.path, headers={"Accept": "application/x-ndjson"}) as stream,
    ):
        lines = stream.aiter_lines()

        async def receive(type_: str) -> dict[str, Any]:
            async for line in lines:
                if line:
                    received.append(json.loads(line))
                    models.Event.model_validate_json(line, strict=True)
                    if received[-1]["type"] == type_:
                        return received[-1]
            raise AssertionError(type_)

        await receive("started")
        await scan.appended(progress(1, phase="counting"))
        data = (await receive("progress"))["data"]
        assert (data["done"], data["total"], data["unit"], data["phase"]) == (1, 2, "steps", "counting")
        assert data["rate"] > 0
        assert len(data["eta_s"]) == 2
        answer = await scan.appended([matches(ROW), matches(ROW, {"other": "columns"}), progress(2)])
        found = await receive("matches")
        assert found["data"] == {"chunk": 0, "rows": [ROW, ROW, {"other": "columns"}]}
        assert answer == {"cursor": found["id"], "seq": 2}
        assert (await receive("progress"))["data"]["matches"] == 3
        await scan.appended(END)
        end = (await receive("end"))["data"]
    assert [event["seq"] for event in received if "id" in event] == [1, 2, 3]
    assert end["digest"] == digest_rows([ROW, ROW, {"other": "columns"}])
    assert (end["state"], end["matches"], end["last_seq"], end["truncated"]) == ("completed", 3, 3, False)
    snapshot = (await serving.http.get(f"/v1/scans/{scan.id}")).json()
    assert snapshot["progress"]["done"] == 2
    models.Snapshot.model_validate_json(json.dumps(snapshot), strict=True)


async def test_one_object_an_array_and_lines_of_json_say_the_same(serving: Serving) -> None:
    events = [progress(1, total=5), matches(ROW), END]
    scans = [await produce(serving) for _ in range(3)]
    for event in events:
        await scans[0].appended(event)
    await scans[1].appended(events)
    lines = "\n\n".join(map(json.dumps, events)).encode() + b"\r\n"
    answer = await serving.http.post(scans[2].path, content=lines, headers=scans[2].headers | NDJSON)
    assert answer.status_code == 202
    told = [[(event["type"], event["data"].get("rows")) for event in await scan.events()] for scan in scans]
    assert told[0] == told[1] == told[2]
    digests = {(await scan.events())[-1]["data"]["digest"] for scan in scans}
    assert digests == {digest_rows([ROW])}


async def test_an_end_says_how_it_went(serving: Serving) -> None:
    failed, cancelled = await produce(serving), await produce(serving)
    await failed.appended({"type": "end", "state": "failed", "error": "The disk is full."})
    end = (await failed.events())[-1]["data"]
    assert (end["state"], end["error"]["detail"]) == ("failed", "The disk is full.")
    assert end["error"]["type"] == "urn:scanwire:problem:producer-failed"
    await cancelled.appended({"type": "end", "state": "cancelled"})
    end = (await cancelled.events())[-1]["data"]
    assert (end["state"], end["error"]) == ("cancelled", None)


async def test_nothing_to_post_is_a_sign_of_life(serving: Serving) -> None:
    scan = await produce(serving)
    before = await scan.look()
    assert (await scan.appended([]))["seq"] == 1
    empty = await serving.http.post(scan.path, content=b"", headers=scan.headers | NDJSON)
    assert empty.status_code == 202
    assert await scan.look() == before


async def test_without_a_total_progress_has_a_rate_and_no_eta(serving: Serving) -> None:
    scan = await produce(serving)
    await scan.appended(progress(10))
    data = (await serving.http.get(f"/v1/scans/{scan.id}")).json()["progress"]
    assert (data["total"], data["eta_s"]) == (None, None)
    assert data["rate"] > 0
    await scan.appended(progress(10, total=10))
    assert (await serving.http.get(f"/v1/scans/{scan.id}")).json()["progress"]["total"] == 10


async def test_rows_beyond_the_bound_are_counted_and_not_kept(serving: Serving) -> None:
    scan = await produce(serving)
    rows = [{"number": number} for number in range(1200)]
    await scan.appended(matches(*rows[:900]))
    await scan.appended([matches(*rows[900:]), END])
    end = (await scan.events())[-1]["data"]
    assert (end["matches"], end["truncated"]) == (1000, True)
    assert await scan.rows() == rows[:1000]
    assert end["digest"] == digest_rows(rows[:1000])


async def test_bytes_of_rows_are_bounded_too(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices, max_rows_bytes=100) as serving:
        scan = await produce(serving)
        await scan.appended([matches({"text": "x" * 60}, {"text": "x" * 60}, {"text": "small"}), END])
        end = (await scan.events())[-1]["data"]
        assert (end["matches"], end["truncated"]) == (1, True)


async def test_rows_with_different_columns_come_as_csv_and_parquet_too(serving: Serving) -> None:
    scan, empty = await produce(serving), await produce(serving)
    await scan.appended([matches(ROW, {"city": 7, "extra": "x"}), END])
    await empty.appended(END)
    table = pl.read_parquet((await serving.http.get(f"/v1/scans/{scan.id}/matches.parquet")).content)
    assert table["city"].to_list() == ["Oslo", "7"]
    assert table["extra"].to_list() == [None, "x"]
    assert (await serving.http.get(f"/v1/scans/{scan.id}/matches.csv")).text.startswith("city,population,")
    assert (await serving.http.get(f"/v1/scans/{empty.id}/matches.csv")).text.strip() == ""
    lines = (await serving.http.get(f"/v1/scans/{scan.id}/matches.ndjson")).text.splitlines()
    assert [json.loads(line) for line in lines] == await scan.rows()


# Refusals: nothing is appended


@pytest.mark.parametrize(
    ("events", "field"),
    [
        ("text", "events.0"),
        (7, "events.0"),
        ([[]], "events.0"),
        ([progress(1), {}], "events.1.type"),
        ([progress(1), {"type": "started"}], "events.1.type"),
        ({"type": "progress"}, "events.0.done"),
        (progress(-1), "events.0.done"),
        ({"type": "progress", "done": True}, "events.0.done"),
        ({"type": "progress", "done": 1.5}, "events.0.done"),
        ({"type": "progress", "done": 2**53}, "events.0.done"),
        (progress(1, total=-1), "events.0.total"),
        (progress(1, phase=""), "events.0.phase"),
        (progress(1, rate=5), "events.0.rate"),
        (progress(11), "events.0.done"),
        ([progress(5), progress(4)], "events.1.done"),
        ([progress(5), progress(6, total=5)], "events.1.done"),
        ([matches(ROW), matches(ROW, 7)], "events.1.rows.1"),
        (matches({}), "events.0.rows.0"),
        (matches({"nested": {"a": 1}}), "events.0.rows.0"),
        (matches({"list": [1]}), "events.0.rows.0"),
        (matches({"wide": 2**63}), "events.0.rows.0"),
        (matches(ROW, {"long": "x" * 1000}), "events.0.rows.1"),
        ({"type": "matches", "rows": {}}, "events.0.rows"),
        ({"type": "matches"}, "events.0.rows"),
        ([matches(*[{"a": 1}] * 2000)], "events"),
        ([progress(1)] * 2001, "events"),
        ({"type": "end"}, "events.0.state"),
        ({"type": "end", "state": "lost"}, "events.0.state"),
        ({"type": "end", "state": "cancelled", "error": "why"}, "events.0.error"),
        ([matches(ROW), END, progress(1)], "events.2"),
        ([matches(ROW), END, END], "events.2"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
async def test_one_wrong_event_refuses_the_whole_request(serving: Serving, events: Any, field: str) -> None:
    scan = await produce(serving, total=10)
    await scan.refused(422, events, field)
    await scan.refused(422, [matches(ROW), *events] if isinstance(events, list) else [matches(ROW), events], number=1)
    assert (await scan.appended([progress(5), matches(ROW)], 1))["seq"] == 2


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (b"", "events"),
        (b"{", "events"),
        (b"[" * 5000, "events"),
        (b'{"type":"matches","rows":[{"a":' + b"[" * 150 + b"]" * 150 + b"}]}", "events.0.rows.0"),
        (b'[{"type":"end","state":"completed"},{"type":"matches","rows":[{"a":NaN}]}]', "events.1.rows.0"),
        (b'{"type":"matches","rows":[{"b":1},{"a":-Infinity}]}', "events.0.rows.1"),
        (b'{"type":"matches","rows":[{"a":1e999}]}', "events.0.rows.0"),
        (b'{"type":"progress","done":NaN}', "events.0.done"),
        (b'{"type":"progress","done":' + b"9" * 4000 + b"}", "events.0.done"),
        (b'{"type":"matches","rows":[{"a":"\xff"}]}', "events"),
        (b'{"type":"matches","rows":[{"a":"\\ud800"}]}', "events"),
    ],
    ids=lambda value: repr(value[:40]),
)
async def test_a_body_that_is_not_json_or_not_finite_is_refused(serving: Serving, content: bytes, field: str) -> None:
    scan = await produce(serving)
    before = await scan.look()
    as_json = {"Content-Type": "application/json"}
    check_refusal(await serving.http.post(scan.path, content=content, headers=scan.headers | as_json), 422, field)
    assert await scan.look() == before


async def test_the_bad_line_is_named(serving: Serving) -> None:
    scan = await produce(serving)
    before = await scan.look()
    lines = b'{"type":"progress","done":1}\n\n{"type":\n'
    check_refusal(await serving.http.post(scan.path, content=lines, headers=scan.headers | NDJSON), 422, "events.1")
    plain = {"Content-Type": "text/plain"}
    check_refusal(await serving.http.post(scan.path, content=lines, headers=scan.headers | plain), 415)
    assert await scan.look() == before


async def test_a_body_may_be_a_mebibyte_here_and_64_kib_elsewhere(serving: Serving) -> None:
    scan = await produce(serving)
    rows = [{"text": "x" * 900}] * 1000
    await scan.appended(matches(*rows))
    await scan.refused(413, matches(*rows, *rows))

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(3000):
            yield b" " * 1000

    before = await scan.look()
    headers = scan.headers | {"Content-Type": "application/json"}
    check_refusal(await serving.http.post(scan.path, content=pieces(), headers=headers), 413)
    assert await scan.look() == before
    check_refusal(await serving.http.post("/v1/scans", content=b" " * 70_000, headers=headers), 413)


async def test_only_the_producers_token_lets_events_in(serving: Serving) -> None:
    scan, other = await produce(serving), await produce(serving)
    before = await scan.look()
    wrong: list[dict[str, str]] = [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {scan.snapshot['producer_token']}"},
        {"X-API-Key": scan.snapshot["producer_token"]},
        other.headers,
    ]
    for headers in wrong:
        answer = await serving.http.post(scan.path, json=END, headers=headers)
        check_refusal(answer, 401)
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert await scan.look() == before


async def test_a_scan_that_is_not_there_or_not_external_takes_no_events(serving: Serving) -> None:
    scan = await produce(serving)
    check_refusal(await serving.http.post("/v1/scans/s_nobody/events", json=END, headers=scan.headers), 404)
    market = await serving.submit("gap-up")
    ended = await serving.finish(market["id"])
    check_refusal(await serving.http.post(market["links"]["events"], json=END, headers=scan.headers), 409)
    assert (await serving.http.get(f"/v1/scans/{market['id']}")).json() == ended


async def test_after_the_end_nothing_comes_any_more(serving: Serving) -> None:
    scan = await produce(serving)
    await scan.appended(END)
    for events in ([progress(1)], [matches(ROW)], [END], []):
        assert (await scan.refused(409, events))["state"] == "completed"


async def test_with_api_keys_the_token_alone_is_enough_and_a_key_is_not(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices, api_keys=(f"ann:{hash_key('secret')}",)) as serving:
        check_refusal(await serving.http.post("/v1/scans", json={"scanner": "external"}), 401)
        serving.http.headers["X-API-Key"] = "secret"
        scan = await produce(serving)
        key = {"Authorization": "Bearer secret"}
        check_refusal(await serving.http.post(scan.path, json=END, headers=key), 401)
        del serving.http.headers["X-API-Key"]
        await scan.appended(matches(ROW))
        serving.http.headers["X-API-Key"] = "secret"
        assert await scan.rows() == [ROW]


# Producer-Seq


async def test_a_repeated_number_is_acknowledged_and_not_appended_twice(serving: Serving) -> None:
    scan = await produce(serving)
    first = await scan.appended(matches(ROW), 1)
    second = await scan.appended([matches({"b": 2}), END], 2)
    before = await scan.look()
    for number in (1, 2, 2, 1):
        assert await scan.appended([matches(ROW), END], number) == second
    assert await scan.look() == before
    assert first["seq"] + 2 == second["seq"]
    assert await scan.rows() == [ROW, {"b": 2}]


async def test_a_gap_is_refused_with_the_number_that_is_expected(serving: Serving) -> None:
    scan = await produce(serving)
    assert (await scan.refused(409, matches(ROW), number=2))["expected"] == 1
    await scan.appended(progress(1), 1)
    assert (await scan.refused(409, matches(ROW), number=3))["expected"] == 2
    for number in ("0", "-1", "1.5", "x", "", "9" * 30, "１"):
        headers = [(b"Producer-Seq", number.encode()), (b"Authorization", scan.headers["Authorization"].encode())]
        check_refusal(await serving.http.post(scan.path, json=END, headers=headers), 422, "Producer-Seq")
    await scan.appended(matches(ROW), 2)


async def test_the_same_number_at_the_same_time_is_appended_once(serving: Serving) -> None:
    scan = await produce(serving)
    answers = await asyncio.gather(*(scan.appended(matches(ROW), 1) for _ in range(20)))
    assert answers == [answers[0]] * 20
    assert await scan.rows() == [ROW]


async def test_pipelined_posts_keep_their_order(serving: Serving) -> None:
    scan = await produce(serving)
    host, port = serving.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    for number in range(1, 101):
        body = json.dumps([progress(number), matches({"number": number})])
        writer.write(
            f"POST {scan.path} HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: {scan.headers['Authorization']}\r\n"
            f"Producer-Seq: {number}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"{'Connection: close' if number == 100 else 'X-Number: 1'}\r\n\r\n{body}".encode()
        )
    async with asyncio.timeout(20):
        answers = (await reader.read()).decode()
    writer.close()
    assert answers.count("HTTP/1.1 202") == 100
    assert re.findall(r'"seq":(\d+)', answers) == [str(number + 1) for number in range(1, 101)]
    assert [row["number"] for row in await scan.rows()] == list(range(1, 101))


# Who may have one, and for how long


async def test_a_body_may_come_after_its_head(serving: Serving) -> None:
    production = await produce(serving)
    body = json.dumps({"type": "matches", "rows": [ROW]}).encode()
    async with meet(serving.url) as peer:
        fields = [f"{name}: {value}" for name, value in production.headers.items()]
        fields += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        await peer.ask(production.path, *fields, method="POST")
        await serving.http.get("/healthz")  # by now the head has been read
        await peer.send(body[:20])
        await serving.http.get("/healthz")
        await peer.send(body[20:])
        assert (await peer.read_answer())[0].split()[1] == b"202"
    assert await production.rows() == [ROW]


async def test_pages_of_an_allowed_origin_may_read_what_a_producer_and_a_poller_are_answered(
    tmp_path: Path, sample_prices: Path
) -> None:
    page = "https://friend.example"
    async with serve(tmp_path, sample_prices, allowed_origins=page) as serving:
        production = await produce(serving)
        production.headers["Origin"] = page
        posted = await production.post({"type": "progress", "done": 1})
        polled = await serving.http.get(f"/v1/scans/{production.id}", headers={"Origin": page})
        assert [posted.status_code, polled.status_code] == [202, 200]
        assert {answer.headers["access-control-allow-origin"] for answer in (posted, polled)} == {page}


async def test_equal_submissions_are_scans_of_their_own_but_for_an_idempotency_key(serving: Serving) -> None:
    body = {"scanner": "external", "params": {"title": "The same"}}
    one, two = [(await serving.http.post("/v1/scans", json=body)).json() for _ in range(2)]
    assert one["id"] != two["id"]
    assert one["producer_token"] != two["producer_token"]
    key = {"Idempotency-Key": "external-1"}
    first, again = [(await serving.http.post("/v1/scans", json=body, headers=key)).json() for _ in range(2)]
    assert (again["id"], again["joined"], first["joined"]) == (first["id"], True, False)
    assert "producer_token" in first
    assert "producer_token" not in again
    other = await serving.http.post("/v1/scans", json={"scanner": "external"}, headers=key)
    check_refusal(other, 409)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"title": ""}, "title"),
        ({"title": 7}, "title"),
        ({"total": -1}, "total"),
        ({"total": "many"}, "total"),
        ({"unit": "x" * 41}, "unit"),
        ({"symbols": ["AAPL"]}, "symbols"),
    ],
)
async def test_wrong_parameters_make_no_scan(serving: Serving, params: dict[str, Any], field: str) -> None:
    before = serving.service.log.statistics().scans, serving.service.producers.active
    answer = await serving.http.post("/v1/scans", json={"scanner": "external", "params": params})
    check_refusal(answer, 422, field)
    assert (serving.service.log.statistics().scans, serving.service.producers.active) == before


async def test_it_counts_against_the_scans_and_submissions_of_its_client(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices, max_active_per_client=2, max_queued=0, submit_per_min=4) as serving:
        one = await produce(serving)
        await produce(serving)
        full = await serving.http.post("/v1/scans", json={"scanner": "external"})
        assert check_refusal(full, 429)["limit"] == "max_active_per_client"
        market = await serving.http.post("/v1/scans", json={"scanner": "gap-up"})
        assert check_refusal(market, 429)["limit"] == "max_active_per_client"
        await one.appended(END)
        await serving.finish((await serving.submit())["id"])
        await (await produce(serving)).appended(END)
        # Refusals were not charged; four submissions were.
        spent = await serving.http.post("/v1/scans", json={"scanner": "external"})
        assert check_refusal(spent, 429)["limit"] == "submit"


async def test_its_client_cancels_it_at_once_and_the_producer_is_told(serving: Serving) -> None:
    scan = await produce(serving)
    await scan.appended(matches(ROW), 1)
    answer = await serving.http.delete(f"/v1/scans/{scan.id}")
    assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
    events = await scan.events()
    assert [event["type"] for event in events] == ["started", "matches", "cancelling", "end"]
    assert events[-1]["data"]["last_seq"] == events[-1]["seq"] == 4
    assert events[-1]["data"]["digest"] == digest_rows([ROW])
    assert (await scan.refused(409, matches(ROW), number=2))["state"] == "cancelled"
    assert (await scan.appended(matches(ROW), 1))["seq"] == 4  # a repeat: it was appended in its time
    assert (await serving.http.delete(f"/v1/scans/{scan.id}")).json()["state"] == "cancelled"


async def test_who_has_the_token_may_post_and_yet_not_cancel(tmp_path: Path, sample_prices: Path) -> None:
    keys = tuple(f"{name}:{hash_key(name)}" for name in ("ann", "bob"))
    async with serve(tmp_path, sample_prices, api_keys=keys) as serving:
        serving.http.headers["X-API-Key"] = "ann"
        scan = await produce(serving)
        serving.http.headers["X-API-Key"] = "bob"
        check_refusal(await serving.http.delete(f"/v1/scans/{scan.id}"), 403)
        await scan.appended({"type": "end", "state": "cancelled"})


async def test_the_example_of_the_readme_works_word_for_word(serving: Serving, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```sh\n(curl -s --json .*?)```", readme, re.DOTALL)
    require(shutil.which("curl") is not None, "curl is not installed")
    process = await asyncio.create_subprocess_exec(
        "sh", "-ec", example.replace("http://localhost:8000", serving.url), cwd=tmp_path, stdout=PIPE, stderr=PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err
    assert out.count(b'"cursor":') == 3
    snapshot = json.loads((tmp_path / "scan.json").read_text())
    scan = Production(serving, snapshot)
    assert [event["type"] for event in await scan.events()] == ["started", "matches", "end"]
    assert await scan.rows() == [{"page": "a", "errors": 2}]


async def test_over_the_websocket_the_token_comes_with_the_reply(serving: Serving) -> None:
    from websockets.asyncio.client import connect

    async with connect(serving.url.replace("http", "ws") + "/v1/ws") as socket:
        await socket.send(json.dumps({"op": "submit", "scanner": "external", "params": {"title": "From a page"}}))
        reply = json.loads(await socket.recv())
    scan = Production(serving, reply["snapshot"] | {"producer_token": reply["producer_token"]})
    await scan.appended(END)


# A restart


async def test_after_a_restart_the_producer_posts_on(tmp_path: Path, sample_prices: Path) -> None:
    async with serve(tmp_path, sample_prices) as before:
        scan = await produce(before, total=10)
        await scan.appended([matches(ROW), progress(4)], 1)
        await scan.appended(progress(6), 2)
        was = await scan.events()
    async with serve(tmp_path, sample_prices) as serving:
        scan.serving = serving
        assert await scan.events() == was
        assert (await serving.http.get(f"/v1/scans/{scan.id}")).json()["progress"]["done"] == 6
        assert (await scan.appended(progress(6), 2))["seq"] == 2
        assert (await scan.refused(409, END, number=4))["expected"] == 3
        await scan.refused(422, progress(5), "events.0.done")
        check_refusal(await serving.http.post(scan.path, json=END, headers={"Authorization": "Bearer wrong"}), 401)
        await scan.appended([matches({"b": 2}), progress(10), END], 3)
        events = await scan.events()
        assert [event["seq"] for event in events] == [1, 2, 3, 4]
        assert events[2]["data"]["chunk"] == 1
        assert events[-1]["data"]["digest"] == digest_rows([ROW, {"b": 2}])
        assert events[-1]["data"]["elapsed_s"] > 0
    async with serve(tmp_path, sample_prices) as serving:
        scan.serving = serving
        assert (await scan.appended([matches({"b": 2}), progress(10), END], 3))["seq"] == 4
        assert await scan.events() == events
        assert serving.service.producers.active == 0
