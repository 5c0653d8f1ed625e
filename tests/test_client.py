"""The client against the real server."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from app.client import Client, RequestRefused, ScanEvent
from app.follow import NDJSON, POLL, SSE
from tests.conftest import Gate
from tests.serving import Serving, serve

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("both_paths", "trial_scanners")]

RELAXED = {"preset": "relaxed", "start": "2005-01-01"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(
    tmp_path_factory: pytest.TempPathFactory, sample_prices: Path, trial_scanners: None, both_paths: None
) -> AsyncIterator[Serving]:
    async with serve(tmp_path_factory.mktemp("state"), sample_prices, chunk_rows=1) as serving:
        yield serving


@pytest_asyncio.fixture(loop_scope="module")
async def client(serving: Serving) -> AsyncIterator[Client]:
    async with Client(serving.url) as client:
        yield client


class Detour(httpx.AsyncHTTPTransport):
    """Sends every request to the port that is set just now, whatever its address says."""

    port = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.url = request.url.copy_with(port=self.port)
        return await super().handle_async_request(request)


def read_durable(events: list[ScanEvent]) -> list[bytes]:
    return [event.json for event in events if event.id is not None]


async def test_a_scan_is_submitted_followed_and_proved(client: Client) -> None:
    scan = await client.submit("gap-up", RELAXED, reuse="never")
    events = [event async for event in scan]
    assert [event.type for event in events if event.id][:2] == ["queued", "started"]
    assert events[-1].type == "end"
    assert [event.n for event in events if event.id] == sorted(event.n or 0 for event in events if event.id)
    result = await scan.result()
    assert result.end["state"] == "completed"
    assert len(result.rows) == result.end["matches"] > 100
    assert result.rows == await scan.matches()
    assert (await scan.snapshot())["state"] == "completed"
    # One that was never iterated reads for itself.
    assert await client.scan(scan.id).result() == result


async def test_every_format_tells_the_same(serving: Serving, client: Client) -> None:
    scan = await client.submit("gap-up", RELAXED)
    await scan.result()
    told = []
    for format_ in (SSE, NDJSON, POLL):
        async with Client(serving.url, formats=(format_,)) as one:
            told.append(read_durable([event async for event in one.scan(scan.id)]))
    assert told[0]
    assert told == [told[0]] * 3


@pytest.mark.parametrize("format_", [SSE, NDJSON, POLL])
async def test_any_cursor_resumes_with_exactly_the_rest(serving: Serving, client: Client, format_: str) -> None:
    scan = await client.submit("gap-up", RELAXED)
    await scan.result()
    every = [event async for event in scan if event.id]
    async with Client(serving.url, formats=(format_,)) as one:
        for place, event in enumerate(every):
            async with aclosing(one.scan(scan.id).events(after=event.id)) as rest:
                assert read_durable([event async for event in rest]) == read_durable(every[place + 1 :])


@pytest.mark.parametrize("format_", [SSE, NDJSON, POLL])
async def test_events_come_while_the_scan_runs(serving: Serving, gate: Gate, format_: str) -> None:
    async with asyncio.timeout(20), Client(serving.url, formats=(format_,)) as client:
        scan = await client.submit("trial-gated", gate=str(gate.path), only_symbol="MSFT", reuse="never")
        seen = []
        async for event in scan:
            seen.append(event.type)
            if seen.count("matches") == 4:
                gate.open()
        assert seen[-1] == "end"
        assert len((await scan.result()).rows) == 5


async def test_several_scans_come_over_one_connection(client: Client) -> None:
    ids = [(await client.submit(name, RELAXED, reuse="never")).id for name in ("gap-up", "volume-surge")]
    async with aclosing(client.watch(ids)) as events:
        every = [event async for event in events]
    assert {event.scan for event in every if event.type == "end"} == set(ids)
    numbers = [event.n for event in every if event.n is not None]
    assert numbers == sorted(set(numbers))


async def test_the_same_submission_is_joined(client: Client) -> None:
    first = await client.submit("gap-up", RELAXED, end="2010-01-01")
    second = await client.submit("gap-up", {**RELAXED, "end": "2010-01-01"})
    assert second.id == first.id
    assert second.submitted is not None
    assert second.submitted["joined"] is True


async def test_cancelling_ends_the_events(client: Client, gate: Gate) -> None:
    scan = await client.submit("trial-gated", gate=str(gate.path))
    events = []
    async for event in scan:
        events.append(event)
        if event.type == "started":
            await scan.cancel()
    assert events[-1].data["state"] == "cancelled"
    assert (await scan.cancel())["state"] == "cancelled"


async def test_lists_and_scanners_are_read(client: Client) -> None:
    scan = await client.submit("gap-up", RELAXED, reuse="never")
    assert (await client.list(limit=3))[0]["id"] == scan.id
    assert len(await client.list(limit=2)) == 2
    assert "gap-up" in [scanner["name"] for scanner in await client.scanners()]


async def test_a_refusal_carries_the_problem(client: Client) -> None:
    with pytest.raises(RequestRefused, match="gap_pct_min") as caught:
        await client.submit("gap-up", gap_pct_min=-7)
    assert caught.value.status == 422
    assert caught.value.problem["errors"][0]["field"] == "gap_pct_min"
    with pytest.raises(RequestRefused, match="s_unknown") as caught:
        async for _ in client.scan("s_unknown"):
            pass
    assert caught.value.status == 404


async def test_a_client_that_is_throttled_comes_back_when_it_may(tmp_path: Path, sample_prices: Path) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        serving.service.limits.refund("connect", serving.service.log.get(scan.id).client)

    async with (
        serve(tmp_path, sample_prices, connect_burst=1, connect_per_s=0.02) as serving,
        Client(serving.url, sleep=sleep, random=lambda: 0.0) as client,
    ):
        scan = await client.submit("gap-up", RELAXED)
        await scan.result()
        assert [event.type async for event in client.scan(scan.id)][-1] == "end"
    assert len(waits) == 1
    assert 40 < waits[0] <= 50


async def test_a_restart_of_the_server_is_survived(tmp_path: Path, sample_prices: Path, gate: Gate) -> None:
    detour = Detour()

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.02))

    async with asyncio.timeout(40), Client("http://127.0.0.1:1", transport=detour, sleep=sleep) as client:
        async with serve(tmp_path, sample_prices, chunk_rows=1) as before:
            detour.port = httpx.URL(before.url).port or 0
            scan = await client.submit("trial-gated", gate=str(gate.path), only_symbol="MSFT")
            events = scan.events()
            received = [await anext(events)]
            while [event.type for event in received].count("matches") < 4:
                received.append(await anext(events))
        async with serve(tmp_path, sample_prices, chunk_rows=1) as after:
            detour.port = httpx.URL(after.url).port or 0
            gate.open()
            received += [event async for event in events]
        durable = [json.loads(event.json) for event in received if event.id]
        assert [event["seq"] for event in durable] == list(range(1, len(durable) + 1))
        assert durable[-1]["data"]["state"] == "completed"
        assert len((await scan.result()).rows) == 5
