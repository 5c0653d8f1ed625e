"""Rules of the interface: every transport tells the same, cursors resume anywhere, answers are as documented."""

import asyncio
import io
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import pytest_asyncio
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from app.core.scan import digest_rows
from tests.conftest import Gate, until
from tests.serving import Serving, serve

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.usefixtures("both_paths", "trial_scanners", "nothing_leaks"),
]

SSE = {"Accept": "text/event-stream"}
NDJSON = {"Accept": "application/x-ndjson"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(
    tmp_path_factory: pytest.TempPathFactory, sample_prices: Path, trial_scanners: None, both_paths: None
) -> AsyncIterator[Serving]:
    async with serve(tmp_path_factory.mktemp("state"), sample_prices, chunk_rows=1, heartbeat_s=0.2) as serving:
        yield serving


@pytest_asyncio.fixture(loop_scope="module")
async def nothing_leaks(serving: Serving) -> AsyncIterator[None]:
    """After each test no slot, stream, subscriber or worker is held."""
    yield
    service = serving.service

    def held() -> list[object]:
        runner = service.runner.statistics()
        return [
            runner.running,
            runner.queued,
            runner.workers_busy,
            service.limits.statistics().streams,
            sum(service.hub.statistics().subscribers.values()),
            service.hub.statistics().channels,
            service.sessions.statistics().streams,
        ]

    for scan in list(service.log.list_scans()):
        if not scan.state.is_terminal:
            await service.runner.cancel(scan.id, "the end of the test")
    await until(lambda: not any(held()))


def parse_sse(body: bytes) -> list[dict[str, Any]]:
    """What an EventSource would make of it, by the letter of the standard as far as it is used here."""
    events = []
    for block in body.decode().split("\n\n"):
        fields: dict[str, str] = {}
        for line in block.split("\n"):
            name, _, value = line.partition(": ")
            if name:
                fields[name] = value
        if "data" in fields:
            event = json.loads(fields["data"])
            assert fields["event"] == event["type"]
            assert fields.get("id") == event.get("id")
            events.append(event)
    return events


def parse_lines(body: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in body.split(b"\n") if line]


def durable(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["type"] != "progress"]


async def read_sse(serving: Serving, scan_id: str, **headers: str) -> list[dict[str, Any]]:
    return parse_sse((await serving.http.get(f"/v1/scans/{scan_id}/events", headers=SSE | headers)).content)


async def read_ndjson(serving: Serving, scan_id: str) -> list[dict[str, Any]]:
    return parse_lines((await serving.http.get(f"/v1/scans/{scan_id}/events", headers=NDJSON)).content)


async def read_polls(serving: Serving, scan_id: str) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    cursor = ""
    while True:
        page = (
            await serving.http.get(
                f"/v1/scans/{scan_id}/events",
                params={"after": cursor} if cursor else {},
                headers={"Accept": "application/json", "Prefer": "wait=5"},
            )
        ).json()
        events += page["events"]
        cursor = page["cursor"]
        if page["closed"]:
            return events


async def read_websocket(serving: Serving, scan_id: str, after: str | None = None) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    async with connect(
        serving.url.replace("http", "ws") + "/v1/ws", subprotocols=[Subprotocol("scanwire.v1")]
    ) as socket:
        await socket.send(json.dumps({"op": "subscribe", "scan": scan_id, "after": after, "ref": 1}))
        async for text in socket:
            message = json.loads(text)
            if "ref" in message:
                assert message["ok"] is True
                continue
            events.append(message)
            if message["type"] == "end":
                break
    return events


async def test_every_transport_gives_the_same_durable_events(serving: Serving, gate: Gate) -> None:
    scan = await serving.submit("trial-gated", gate=str(gate.path), only_symbol="IBM")
    readers = [
        asyncio.create_task(read(serving, scan["id"]))
        for read in (read_sse, read_ndjson, read_polls, read_websocket)
        for _ in range(2)
    ]
    await asyncio.sleep(0)
    gate.open()
    live = [durable(events) for events in await asyncio.gather(*readers)]
    late = [durable(await read(serving, scan["id"])) for read in (read_sse, read_ndjson, read_polls, read_websocket)]
    assert all(events == live[0] for events in live + late)
    assert [event["seq"] for event in live[0]] == list(range(1, len(live[0]) + 1))
    assert live[0][-1]["type"] == "end"


async def test_a_subscriber_cut_off_at_any_event_resumes_with_none_lost_and_none_twice(serving: Serving) -> None:
    scan = await serving.submit("gap-up", preset="relaxed")
    whole = durable(await read_sse(serving, scan["id"]))
    for place, event in enumerate(whole, 1):
        rest = durable(await read_sse(serving, scan["id"], **{"Last-Event-ID": event["id"]}))
        assert rest == whole[place:]
        if rest:
            assert durable(await read_websocket(serving, scan["id"], event["id"])) == whole[place:]
        page = await serving.http.get(f"/v1/scans/{scan['id']}/events", params={"after": event["id"]})
        assert page.json()["events"] == whole[place:]


async def test_a_stream_cut_at_any_byte_resumes_from_its_last_whole_event(serving: Serving) -> None:
    scan = await serving.submit("trial-gated")
    body = (await serving.http.get(f"/v1/scans/{scan['id']}/events", headers=SSE)).content
    whole = durable(parse_sse(body))
    for cut in range(0, len(body), 97):
        kept = body[:cut].rpartition(b"\n\n")[0]  # an EventSource drops an event whose empty line never came
        got = durable(parse_sse(kept))
        headers = {"Last-Event-ID": got[-1]["id"]} if got else {}
        assert got + durable(await read_sse(serving, scan["id"], **headers)) == whole


async def test_the_digest_is_that_of_the_rows_received(serving: Serving) -> None:
    scan = await serving.submit("gap-up", preset="relaxed")
    events = await read_sse(serving, scan["id"])
    rows = [row for event in events if event["type"] == "matches" for row in event["data"]["rows"]]
    end = events[-1]["data"]
    assert end["digest"] == digest_rows(rows)
    assert end["matches"] == len(rows) > 0
    assert (await serving.http.get(f"/v1/scans/{scan['id']}/matches")).json()["rows"] == rows


async def test_the_first_bytes_of_a_stream_come_at_once_and_silence_has_heartbeats(
    serving: Serving, gate: Gate
) -> None:
    scan = await serving.submit("trial-gated", gate=str(gate.path))
    async with serving.http.stream("GET", f"/v1/scans/{scan['id']}/events", headers=SSE) as stream:
        chunks = stream.aiter_raw()
        assert (await anext(chunks)).startswith(b": ok\nretry: ")
        while b": hb\n\n" not in await anext(chunks):
            pass
        await chunks.aclose()  # type: ignore[attr-defined]


async def test_a_closed_and_caught_up_stream_answers_204_which_stops_an_event_source(serving: Serving) -> None:
    scan = await serving.submit("gap-up")
    events = await read_sse(serving, scan["id"])
    answer = await serving.http.get(f"/v1/scans/{scan['id']}/events", headers=SSE | {"Last-Event-ID": events[-1]["id"]})
    assert (answer.status_code, answer.content) == (204, b"")


async def test_last_event_id_wins_over_the_address_that_a_browser_keeps(serving: Serving) -> None:
    scan = await serving.submit("gap-up")
    whole = durable(await read_sse(serving, scan["id"]))
    answer = await serving.http.get(
        f"/v1/scans/{scan['id']}/events?after={whole[0]['id']}", headers=SSE | {"Last-Event-ID": whole[1]["id"]}
    )
    assert durable(parse_sse(answer.content)) == whole[2:]


async def test_many_scans_on_one_connection_come_in_one_order_and_resume_by_one_cursor(serving: Serving) -> None:
    scans = [await serving.submit("trial-gated") for _ in range(3)]
    for scan in scans:
        await serving.finish(scan["id"])
    address = "/v1/events?" + "&".join(f"scan={scan['id']}" for scan in scans)
    whole = durable(parse_sse((await serving.http.get(address, headers=SSE)).content))
    numbers = [int(event["id"].partition("-")[2]) for event in whole]
    assert numbers == sorted(numbers)
    assert {event["scan"] for event in whole} == {scan["id"] for scan in scans}
    for place in range(0, len(whole), 3):
        answer = await serving.http.get(address, headers=SSE | {"Last-Event-ID": whole[place]["id"]})
        assert durable(parse_sse(answer.content)) == whole[place + 1 :]


async def test_a_cursor_of_another_epoch_or_from_the_future_is_answered_in_band(serving: Serving) -> None:
    scan = await serving.submit("gap-up")
    whole = durable(await read_sse(serving, scan["id"]))
    epoch = whole[0]["id"].partition("-")[0]
    for cursor, reason in (("zzzz9-1", "epoch"), (f"{epoch}-999999999", "unknown")):
        for events in (
            await read_sse(serving, scan["id"], **{"Last-Event-ID": cursor}),
            await read_websocket(serving, scan["id"], cursor),
            (await serving.http.get(f"/v1/scans/{scan['id']}/events?after={cursor}")).json()["events"],
        ):
            assert (events[0]["type"], events[0]["data"]["reason"], "id" in events[0]) == ("reset", reason, False)
            assert events[0]["data"]["snapshot"]["id"] == scan["id"]
            assert durable(events[1:]) == whole


async def test_a_snapshot_and_the_events_behind_its_cursor_are_the_whole(serving: Serving, gate: Gate) -> None:
    scan = await serving.submit("trial-gated", gate=str(gate.path), only_symbol="IBM")
    snapshot: dict[str, Any] = {"matches": 0}
    while snapshot["matches"] < 3:
        snapshot = (await serving.http.get(f"/v1/scans/{scan['id']}")).json()
    gate.open()
    rest = await read_sse(serving, scan["id"], **{"Last-Event-ID": snapshot["cursor"]})
    rows = [row for event in rest if event["type"] == "matches" for row in event["data"]["rows"]]
    assert snapshot["matches"] + len(rows) == rest[-1]["data"]["matches"] == 5


async def test_an_unchanged_snapshot_is_304_and_says_when_to_come_back(serving: Serving, gate: Gate) -> None:
    scan = await serving.submit("trial-gated", gate=str(gate.path))
    first = await serving.http.get(f"/v1/scans/{scan['id']}")
    while first.json()["state"] != "running":
        first = await serving.http.get(f"/v1/scans/{scan['id']}")
    again = await serving.http.get(f"/v1/scans/{scan['id']}", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert int(again.headers["retry-after"]) >= 1
    gate.open()
    await serving.finish(scan["id"])
    changed = await serving.http.get(f"/v1/scans/{scan['id']}", headers={"If-None-Match": first.headers["etag"]})
    assert changed.status_code == 200
    assert changed.json()["poll_after_s"] is None


async def test_poll_hints_grow_while_nothing_changes(serving: Serving, gate: Gate) -> None:
    scan = await serving.submit("trial-gated", gate=str(gate.path))
    while (await serving.http.get(f"/v1/scans/{scan['id']}")).json()["state"] != "running":
        pass
    hints = [(await serving.http.get(f"/v1/scans/{scan['id']}")).json()["poll_after_s"] for _ in range(6)]
    assert all(1 <= hint <= 33 for hint in hints)
    assert all(later >= min(earlier * 1.19, 30) for earlier, later in itertools.pairwise(hints))


async def test_a_long_poll_answers_when_something_happens(serving: Serving, gate: Gate) -> None:
    scan = await serving.submit("trial-gated", gate=str(gate.path))
    snapshot = (await serving.http.get(f"/v1/scans/{scan['id']}")).json()
    while snapshot["state"] != "running":
        snapshot = (await serving.http.get(f"/v1/scans/{scan['id']}")).json()
    waiting = asyncio.create_task(
        serving.http.get(f"/v1/scans/{scan['id']}?after={snapshot['cursor']}", headers={"Prefer": "wait=25"})
    )
    await until(lambda: serving.service.hub.statistics().subscribers.get("long-poll") == 1)
    gate.open()
    answer = await waiting
    assert answer.headers["preference-applied"] == "wait=25"
    assert answer.json()["cursor"] != snapshot["cursor"]


async def test_a_long_poll_without_news_answers_when_its_time_is_over(serving: Serving, gate: Gate) -> None:
    scan = await serving.submit("trial-gated", gate=str(gate.path))
    snapshot = (await serving.http.get(f"/v1/scans/{scan['id']}")).json()
    while snapshot["state"] != "running":
        snapshot = (await serving.http.get(f"/v1/scans/{scan['id']}")).json()
    answer = await serving.http.get(f"/v1/scans/{scan['id']}?after={snapshot['cursor']}", headers={"Prefer": "wait=1"})
    assert answer.json()["cursor"] == snapshot["cursor"]


async def test_the_same_question_joins_and_costs_nothing(serving: Serving) -> None:
    body = {"scanner": "gap-up", "params": {"start": "2004-01-01"}}
    first = (await serving.http.post("/v1/scans", json=body)).json()
    await serving.finish(first["id"])
    again = await serving.http.post("/v1/scans", json=body)
    assert (again.status_code, again.json()["joined"], again.json()["id"]) == (200, True, first["id"])
    forced = (await serving.http.post("/v1/scans", json=body | {"reuse": "never"})).json()
    assert (forced["joined"], forced["id"] == first["id"]) == (False, False)


async def test_matches_come_in_every_format_and_are_the_same(serving: Serving) -> None:
    scan = await serving.submit("gap-up", preset="relaxed")
    await serving.finish(scan["id"])
    address = f"/v1/scans/{scan['id']}/matches"
    rows = (await serving.http.get(address)).json()["rows"]
    assert len(rows) > 100
    for suffix, media_type in (
        ("ndjson", "application/x-ndjson"),
        ("csv", "text/csv"),
        ("parquet", "application/vnd.apache.parquet"),
        ("json", "application/json"),
    ):
        by_suffix = await serving.http.get(f"{address}.{suffix}")
        by_accept = await serving.http.get(address, headers={"Accept": media_type})
        assert by_suffix.content == by_accept.content
        assert by_suffix.headers["content-type"].startswith(media_type)
        assert by_suffix.headers["scanwire-state"] == "completed"
        match suffix:
            case "ndjson":
                assert parse_lines(by_suffix.content) == rows
            case "csv":
                assert pl.read_csv(by_suffix.content).height == len(rows)
            case "parquet":
                assert pl.read_parquet(io.BytesIO(by_suffix.content)).to_dicts() == rows
            case _:
                assert by_suffix.json()["rows"] == rows


async def test_matches_of_invented_prices_are_marked_in_json_and_in_the_names_of_files(
    tmp_path: Path, synthetic_prices: Path, serving: Serving
) -> None:
    async with serve(tmp_path, synthetic_prices) as invented:
        for one, mark in ((invented, "synthetic-"), (serving, "")):
            scan = await one.submit("gap-up", preset="relaxed")
            await one.finish(scan["id"])
            address = f"/v1/scans/{scan['id']}/matches"
            assert (await one.http.get(address)).json()["data_version"] == scan["data_version"]
            assert scan["data_version"].startswith("synthetic-") is bool(mark)
            for suffix in ("csv", "parquet"):
                name = (await one.http.get(f"{address}.{suffix}")).headers["content-disposition"]
                assert name == f'attachment; filename="{mark}gap-up-{scan["id"][2:10]}.{suffix}"'


async def test_the_list_is_the_clients_own_newest_first_and_paged(serving: Serving) -> None:
    ids = [(await serving.submit("gap-up", start=f"200{year}-01-01"))["id"] for year in range(5)]
    got: list[str] = []
    address: str | None = "/v1/scans?limit=2"
    while address and len(got) < 5:
        page = (await serving.http.get(address)).json()
        got += [scan["id"] for scan in page["scans"]]
        address = page["next"]
    assert got[:5] == ids[::-1]


async def test_cancel_answers_at_once_and_ends_the_scan(serving: Serving, gate: Gate) -> None:
    scan = await serving.submit("trial-gated", gate=str(gate.path))
    while (await serving.http.get(f"/v1/scans/{scan['id']}")).json()["state"] != "running":
        pass
    assert (await serving.http.delete(f"/v1/scans/{scan['id']}")).status_code in (200, 202)
    ended = await serving.finish(scan["id"])
    assert ended["state"] == "cancelled"
    again = await serving.http.delete(f"/v1/scans/{scan['id']}")
    assert (again.status_code, again.json()["end"]) == (200, ended["end"])


async def test_a_client_that_leaves_gives_everything_back(serving: Serving, gate: Gate) -> None:
    scan = await serving.submit("trial-gated", gate=str(gate.path))
    for headers in (SSE, NDJSON):
        for _ in range(5):
            async with serving.http.stream("GET", f"/v1/scans/{scan['id']}/events", headers=headers) as stream:
                await anext(stream.aiter_raw())
    # `nothing_leaks` looks


async def test_head_does_not_open_a_stream(serving: Serving) -> None:
    scan = await serving.submit("gap-up")
    async with asyncio.timeout(5):
        answer = await serving.http.head(f"/v1/scans/{scan['id']}/events", headers=SSE)
    assert answer.status_code in (200, 204)


async def test_each_scanner_is_listed_with_its_schema_and_the_names_for_where(serving: Serving) -> None:
    answer = (await serving.http.get("/v1/scanners")).json()
    names = [scanner["name"] for scanner in answer["scanners"]]
    assert names[:8] == [
        "gap-up",
        "momentum-breakout",
        "volume-surge",
        "backside-b",
        "a-plus",
        "lc-d2",
        "lc-d2-1",
        "lc-d3-1",
    ]
    assert "trial-gated" in names
    assert [scanner["name"] for scanner in answer["scanners"] if scanner["is_external"]] == ["external"]
    for scanner in answer["scanners"]:
        if scanner["is_external"]:
            assert set(scanner["params"]["properties"]) == {"title", "total", "unit"}
            continue
        assert {"start", "end", "symbols", "where"} <= set(scanner["params"]["properties"])
        if scanner["name"] == "gap-up":
            assert scanner["params"]["properties"]["adv20_min_usd"]["title"] == "ADV20 min USD"
    assert "gap_pct" in answer["features"]


async def test_health_readiness_and_metrics_tell_how_it_is(serving: Serving) -> None:
    await serving.finish((await serving.submit("gap-up"))["id"])
    assert (await serving.http.get("/healthz")).json() == {"status": "ok"}
    assert (await serving.http.get("/readyz")).json()["status"] == "ready"
    text = (await serving.http.get("/metrics")).text
    for name in (
        'scanwire_scans{state="completed"}',
        "scanwire_queue_length",
        "scanwire_slots_used",
        "scanwire_subscribers",
        "scanwire_events_appended_total",
        'scanwire_events_pushed_total{transport="x-ndjson"}',
        "scanwire_push_lag_seconds_bucket",
        "scanwire_loop_lag_seconds_bucket",
        "scanwire_refusals_total",
        "scanwire_reaped_total",
    ):
        assert name in text
    performance = (await serving.http.get("/v1/performance")).json()
    assert performance["push_lag_ms"]["p50"] is not None
    operations = (await serving.http.get("/v1/operations")).json()
    assert operations["prices"]["symbols"] == 5


async def test_every_labelled_metric_is_there_from_the_first_moment_and_never_goes(
    tmp_path: Path, sample_prices: Path
) -> None:
    async with serve(tmp_path, sample_prices) as serving:

        async def read_series() -> set[str]:
            lines = (await serving.http.get("/metrics")).text.splitlines()
            return {line.rpartition(" ")[0] for line in lines if line.startswith("scanwire_") and "le=" not in line}

        first = await read_series()
        for series in (
            'scanwire_subscribers{transport="websocket"}',
            'scanwire_events_pushed_total{transport="long-poll"}',
            'scanwire_refusals_total{bucket="streams-in-all"}',
            'scanwire_refusals_total{bucket="submit"}',
            'scanwire_reaped_total{kind="unwatched"}',
        ):
            assert series in first
        scan = await serving.submit("gap-up")
        for read in (read_sse, read_ndjson, read_polls, read_websocket):
            await read(serving, scan["id"])
        await serving.service.reaper.reap()
        assert await read_series() == first


async def test_the_start_page_and_its_parts_are_served_under_a_strict_policy(serving: Serving) -> None:
    page = await serving.http.get("/")
    assert "<title>Scanwire</title>" in page.text
    assert (await serving.http.get("/scans/any")).text == page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for part in ("/static/page.css", "/static/icon.svg"):
        assert (await serving.http.get(part)).status_code == 200


async def test_every_answer_says_how_much_of_a_limit_is_left(serving: Serving) -> None:
    answers = {
        "read": await serving.http.get("/v1/scans"),
        "submit": await serving.http.post("/v1/scans", json={"scanner": "gap-up"}),
        "connect": await serving.http.get(f"/v1/scans/{(await serving.submit())['id']}/events", headers=NDJSON),
    }
    for policy, answer in answers.items():
        assert answer.headers["ratelimit-policy"].startswith(f'"{policy}";q=')
        assert answer.headers["ratelimit"].startswith(f'"{policy}";r=')


async def test_a_client_with_empty_buckets_is_told_when_to_come_back_and_that_is_enough(
    tmp_path: Path, sample_prices: Path
) -> None:
    async with serve(
        tmp_path, sample_prices, submit_per_min=2, connect_burst=1, connect_per_s=0.01, read_burst=5, read_per_s=0.01
    ) as serving:
        body = {"scanner": "gap-up", "reuse": "never"}
        for _ in range(2):
            assert (await serving.http.post("/v1/scans", json=body)).status_code == 202
        refused = await serving.http.post("/v1/scans", json=body)
        problem = refused.json()
        assert refused.status_code == 429
        assert refused.headers["content-type"] == "application/problem+json"
        assert problem["limit"] == "submit"
        assert 0 < problem["retry_after_s"] <= 30
        assert int(refused.headers["retry-after"]) >= problem["retry_after_s"]
        joined = await serving.http.post("/v1/scans", json={"scanner": "gap-up"})
        assert joined.json()["joined"] is True  # a join spends no token

        address = f"/v1/scans/{joined.json()['id']}/events"
        assert (await serving.http.get(address, headers=NDJSON)).status_code == 200
        assert (await serving.http.get(address, headers=NDJSON)).status_code == 429
        throttled = await serving.http.get(address, headers=SSE)
        # An EventSource gives up for good on any status but 200.
        assert throttled.status_code == 200
        (event,) = parse_sse(throttled.content)
        assert event["type"] == "throttled"
        assert b"retry: %d\n" % int(event["data"]["retry_after_s"] * 1000) in throttled.content

        answers = [await serving.http.get("/v1/scans") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]


async def test_api_keys_make_a_key_necessary_and_separate_clients(tmp_path: Path, sample_prices: Path) -> None:
    from app.core.settings import hash_key

    keys = (f"alice:{hash_key('a' * 32)}", f"bob:{hash_key('b' * 32)}")
    async with serve(tmp_path, sample_prices, api_keys=keys) as serving:
        assert (await serving.http.get("/v1/scans")).status_code == 401
        alice, bob = {"Authorization": f"Bearer {'a' * 32}"}, {"X-API-Key": "b" * 32}
        scan = await serving.submit("gap-up", headers=alice)
        assert (await serving.http.get(f"/v1/scans/{scan['id']}", headers=bob)).status_code == 200
        refused = await serving.http.delete(f"/v1/scans/{scan['id']}", headers=bob)
        assert refused.status_code == 403
        assert (await serving.http.get("/v1/scans", headers=bob)).json()["scans"] == []
        assert len((await serving.http.get("/v1/scans", headers=alice)).json()["scans"]) == 1


async def test_streams_hear_bye_at_a_stop_and_the_next_start_goes_on(
    tmp_path: Path, sample_prices: Path, gate: Gate
) -> None:
    async with serve(tmp_path, sample_prices, chunk_rows=1) as serving:
        scan = await serving.submit("trial-gated", gate=str(gate.path), only_symbol="IBM")
        readers = [asyncio.create_task(read(serving, scan["id"])) for read in (read_sse, read_ndjson)]
        await until(lambda: serving.service.log.get(scan["id"]).matches == 3)
        await until(lambda: sum(serving.service.hub.statistics().subscribers.values()) == 2)
        serving.service.hub.parting.say_at_once(100)
        seen = await asyncio.gather(*readers)
    assert all(events[-1]["type"] == "bye" and events[-1]["data"]["reconnect_ms"] <= 100 for events in seen)
    gate.open()
    async with serve(tmp_path, sample_prices, chunk_rows=1) as serving:
        last = durable(seen[0][:-1])
        rest = durable(await read_sse(serving, scan["id"], **{"Last-Event-ID": last[-1]["id"]}))
        events = last + rest
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
        rows = [row for event in events if event["type"] == "matches" for row in event["data"]["rows"]]
        assert events[-1]["data"]["digest"] == digest_rows(rows)
        assert len(rows) == 5


async def test_a_trimmed_scan_keeps_its_end_and_says_that_its_rows_are_gone(serving: Serving) -> None:
    scan = await serving.submit("gap-up", preset="relaxed")
    whole = durable(await read_sse(serving, scan["id"]))
    await serving.service.log.trim(scan["id"])
    events = await read_sse(serving, scan["id"], **{"Last-Event-ID": whole[0]["id"]})
    assert [event["type"] for event in events] == ["reset", "end"]
    assert events[0]["data"]["reason"] == "trimmed"
    assert (await serving.http.get(f"/v1/scans/{scan['id']}/matches")).status_code == 410
    assert (await serving.http.get(f"/v1/scans/{scan['id']}")).json()["end"] == whole[-1]["data"]
